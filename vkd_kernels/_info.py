"""``vkd_kernels.info()``: versions, devices, and which implementation serves which op, and why not the others."""

import argparse
import json
import os
import platform
from typing import Any

import torch

from ._version import __version__
from .ops import implementations


def info() -> dict[str, Any]:
    """What this installation is and can do, as a dictionary of JSON types.

    Keys: ``vkd_kernels``, ``python``, ``torch``, ``cuda`` (of PyTorch), ``triton`` (versions or None), ``devices``
    (names), ``extension`` (build facts, or ``{"missing": reason}``), ``requested`` (VKD_KERNELS_BACKEND, or None), and
    ``ops``: for every op and device type, in float32 and unless a backend is asked for, ``served_by``, a list of
    ``{"implementation", "when"}`` of which the first that holds serves, and ``not``, the reasons why the others can't.

    Example:
        >>> import vkd_kernels as vk
        >>> [row["implementation"] for row in vk.info()["ops"]["ortho_proj_loss"]["cpu"]["served_by"]]
        ['chunked', 'reference']
    """
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    module, reason = implementations.extension()
    ops = {
        op: {device: implementations.served_by(op, torch.device(device)) for device in ("cpu", "cuda")}
        for op in implementations.CANDIDATES
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
        "requested": os.environ.get(implementations.ENVIRONMENT),
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
            print(f"{op} on {device}:")
            for served in row["served_by"]:
                print(f"    {served['implementation']:10} {served['when']}")
            for implementation, reason in row["not"].items():
                print(f"    not {implementation}: {reason}")
