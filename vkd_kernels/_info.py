"""``vkd_kernels.info()``: versions, devices, and which backend serves which op, with the reasons why not the others."""

import argparse
import json
import platform

import torch

from ._version import __version__
from .ops import implementations


def info() -> dict:
    """What this installation is and can do, as a dictionary of JSON types.

    Keys: ``vkd_kernels``, ``python``, ``torch``, ``cuda`` (of PyTorch), ``triton`` (versions or None), ``devices``
    (names), ``extension`` (build facts, or ``{"missing": reason}``), and ``ops``: for every op and device type the
    backend that serves it in float32 and, for each other backend, the reason why it can't serve.

    Example:
        >>> import vkd_kernels as vk
        >>> vk.info()["ops"]["cayley"]["cpu"]["served_by"] in ("extension", "torch")
        True
    """
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    module, reason = implementations.extension()
    ops: dict[str, dict] = {}
    for op, backends in implementations.SERVES.items():
        for device in ("cpu", "cuda"):
            reasons = {b: implementations.why_not(op, b, device, torch.float32) for b in backends}
            served_by = next(b for b, why in reasons.items() if why is None)
            ops.setdefault(op, {})[device] = {
                "served_by": served_by,
                "not": {b: why for b, why in reasons.items() if why is not None},
            }
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "vkd_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "devices": ["cpu", *gpus],
        "extension": module.build_info() if module else {"missing": reason},
        "ops": ops,
    }


def main(arguments: list[str] | None = None) -> None:
    """What `info` says, as text or JSON: ``python -m vkd_kernels.info`` and ``vkd info``."""
    parser = argparse.ArgumentParser("python -m vkd_kernels.info", description="What this installation is and can do.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    facts = info()
    if parser.parse_args(arguments).json:
        print(json.dumps(facts, indent=2))
        return
    ops = facts.pop("ops")
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(value)
        print(f"{name:12} {value}")
    for op, devices in ops.items():
        for device, row in devices.items():
            print(f"{op} on {device}: {row['served_by']}")
            for backend, reason in row["not"].items():
                print(f"    not {backend}: {reason}")
