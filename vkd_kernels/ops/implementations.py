"""Which implementation serves an op, decided in one place; ``vkd_kernels.info()`` shows the decision and its reasons.

    1. ``backend=`` or VKD_KERNELS_BACKEND asks for one, by the caller's word (``BACKENDS``): that one, or an error.
    2. Under torch.func: the reference, which is made of PyTorch's own operators.
    3. Otherwise the first of the op's candidates (``CANDIDATES``) that is meant for the device and can serve.

It also loads the compiled extension, once, and keeps the reason when that fails.
"""

import contextlib
import enum
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .tracing import constant_result


class Implementation(enum.Enum):
    """A way to compute an op. The reference defines; the others are held to it."""

    REFERENCE = "reference"
    CHUNKED = "chunked"
    TRITON = "triton"
    EXTENSION = "extension"


ENVIRONMENT = "VKD_KERNELS_BACKEND"
BACKENDS = {  # the caller's word: what it asks for
    "triton": Implementation.TRITON,
    "extension": Implementation.EXTENSION,
    "torch": Implementation.REFERENCE,
}
CANDIDATES = {  # of each op, in order of preference: (implementation, when it is a candidate)
    "ortho_proj_loss": (
        (Implementation.TRITON, "CUDA tensors, not in float64"),
        (Implementation.CHUNKED, "N·T above 2²³, or a process_group"),
        (Implementation.REFERENCE, "otherwise"),
    ),
    "cayley": (
        (Implementation.EXTENSION, "CPU tensors; CUDA tensors of S up to 1024"),
        (Implementation.REFERENCE, "otherwise"),
    ),
}
TRITON_FROM = (3, 4)  # what PyTorch 2.8, the oldest that the tests run on, brings
TRITON_CAPABILITY = (8, 0)  # of NVIDIA's GPUs: the least for which the kernels' table has tiles


@constant_result  # PyTorch 2.11 and older can't trace the call
def autocast_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast switched off, on devices that have it ("meta" has not)."""
    return torch.autocast(device_type, enabled=False) if autocast_available(device_type) else contextlib.nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives matrix products here, or None while it is off."""
    enabled = autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else None


def _build_record() -> dict[str, Any]:
    """What setup.py noted of the build: {"build", "reason", "torch"}; {"damaged": how} where that can't be read."""
    path = Path(__file__).parents[1].joinpath("_build.json")
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # an installation that was cut short
        return {"damaged": f"{path} can't be read ({error}): reinstall the package"}
    return record if isinstance(record, dict) else {"damaged": f"{path} holds no build record: reinstall the package"}


@functools.cache
def extension() -> tuple[ModuleType, None] | tuple[None, str]:
    """(the module ``vkd_kernels._C``, None), or (None, the reason why it is missing)."""
    record = _build_record()
    if "damaged" in record:  # which PyTorch the extension was built with is unknown, and another's crashes the process
        return None, record["damaged"]
    # An editable tree keeps an earlier build's file after a build in pure Python.
    if record.get("build") == "python" or importlib.util.find_spec("vkd_kernels._C") is None:
        return None, "the extension is not built: " + (record.get("reason") or "install the package to build it")
    built_with = record.get("torch", torch.__version__)
    if built_with != torch.__version__:
        # Loading it could crash the process: the C++ interface of PyTorch is not stable between versions.
        return None, (
            f"the extension was built with PyTorch {built_with} and this is {torch.__version__}: install the package "
            "anew: pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir . (pip may keep what it "
            "built before)"
        )
    try:
        return importlib.import_module("vkd_kernels._C"), None
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the extension can't be loaded: {type(error).__name__}: {error}"


@functools.cache
def why_no_triton() -> str | None:
    """The reason why Triton can't run kernels here, or None."""
    try:
        import triton
    except ImportError as error:
        return f"Triton can't be imported: {error}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < TRITON_FROM:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, TRITON_FROM))}"
    return None


@functools.cache
def why_no_launches() -> str | None:
    """The reason why Triton can't launch kernels on the GPU, or None; the first call compiles what launches them."""
    try:
        importlib.import_module("triton").runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, AssertionError, subprocess.CalledProcessError) as error:
        needs = "a C compiler, Python's headers and the driver's library"
        return f"Triton can't launch kernels, which needs {needs}: {error!s:.300}"
    return None


@functools.cache
def why_not_on_gpu(index: int) -> str | None:
    """The reason why the Triton kernels can't run on that GPU, or None."""
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and (major, minor) < TRITON_CAPABILITY:
        needed = ".".join(map(str, TRITON_CAPABILITY))
        return f"the Triton kernels need compute capability {needed}; this GPU has {major}.{minor}"
    return None if triton_interprets() else why_no_launches()


def triton_interprets() -> bool:
    """Whether TRITON_INTERPRET=1 makes Triton run kernels on the CPU."""
    return why_no_triton() is None and bool(importlib.import_module("triton").knobs.runtime.interpret)


def has_code_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for "80-real 90-virtual" runs on a GPU: by code for its generation, or PTX for an older one.

    With the suffix a ("90a") either runs on that very GPU alone, with f ("100f") on those of its generation.
    """
    for entry in architectures.split():
        number, kind = entry.split("-")
        built = divmod(int(number.rstrip("af")), 10)
        if number.endswith("a"):
            runs = built == capability
        else:
            same = built[0] == capability[0]
            runs = built <= capability and (same or (kind == "virtual" and not number.endswith("f")))
        if runs:
            return True
    return False


def implementations_of(op: str) -> tuple[Implementation, ...]:
    return tuple(implementation for implementation, _ in CANDIDATES[op])


def why_not(op: str, implementation: Implementation, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why it can't serve ``op`` for tensors of this device and dtype, or None when it can."""
    if implementation not in implementations_of(op):
        words = [word for word, asked in BACKENDS.items() if asked in implementations_of(op)]
        return f"{op} has no {implementation.value!r} backend; it has {', '.join(map(repr, words))}"
    if implementation is Implementation.TRITON:
        return _why_not_triton(device, dtype)
    if implementation is Implementation.EXTENSION:
        return _why_not_extension(device)
    return None


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if why_no_triton():
        return why_no_triton()
    if device.type != "cuda" and not (device.type == "cpu" and triton_interprets()):
        return f"Triton kernels take CUDA tensors (CPU tensors with TRITON_INTERPRET=1); got a tensor on {device.type}"
    if dtype == torch.float64:
        return "the Triton kernels take float32, bfloat16 and float16; got float64"
    if device.type == "cuda" and torch.cuda.is_available():
        return why_not_on_gpu(torch.cuda.current_device() if device.index is None else device.index)
    return None


def _why_not_extension(device: torch.device) -> str | None:
    module, reason = extension()
    if module is None:
        return reason
    if device.type not in ("cpu", "cuda"):
        return f"the extension takes CPU and CUDA tensors; got a tensor on {device.type}"
    if device.type == "cuda" and module.build_info()["cuda"] is None:
        return "the extension was built without CUDA: " + (_build_record().get("reason") or "unknown reason")
    if device.type == "cuda" and torch.cuda.is_available():
        built, (major, minor) = module.build_info()["cuda_architectures"], torch.cuda.get_device_capability(device)
        if not has_code_for(built, (major, minor)):
            return f"the extension was built for the GPU architectures {built} and this GPU is {major}.{minor}"
    return None


@functools.cache
def _warn_once(op: str, implementation: Implementation, reason: str) -> None:
    warnings.warn(
        f"vkd_kernels: {op} falls back to PyTorch ({implementation.value}) because {reason}. "
        f'warnings.filterwarnings("ignore", message="vkd_kernels: {op}") silences this.',
        stacklevel=3,
    )


def requested(op: str, backend: str | None) -> tuple[Implementation | None, str]:
    """(the implementation asked for by argument or environment, or None; which of the two asked)."""
    if backend is not None:
        if not isinstance(backend, str) or backend not in BACKENDS:
            raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}; got {backend!r:.200}")
        return BACKENDS[backend], "backend"
    word = os.environ.get(ENVIRONMENT)
    if not word:
        return None, ENVIRONMENT
    if word not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT} must be one of {', '.join(map(repr, BACKENDS))}; got {word!r}")
    # The variable speaks for every op at once, so it binds the ops that have such an implementation.
    asked = BACKENDS[word]
    return (asked if asked in implementations_of(op) else None), ENVIRONMENT


def _under_torch_func() -> bool:
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and active()


def _is_meant_for(implementation: Implementation, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether its absence there would be worth a warning."""
    if implementation is Implementation.TRITON:
        return device.type == "cuda" and dtype != torch.float64
    return implementation is not Implementation.EXTENSION or device.type in ("cpu", "cuda")


@constant_result  # what is installed and asked for does not change under a compiled graph
def decide(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    candidates: Sequence[Implementation],
) -> Implementation:
    """The implementation that serves a call: the one asked for, or an error; else the first candidate that can.

    Args:
        candidates: the op's advice for these sizes, in order of preference; the last one always can.
    """
    asked, source = requested(op, backend)
    if asked is not None:
        reason = why_not(op, asked, device, dtype)
        if reason:
            raise RuntimeError(f"{source}={_word(asked)!r} was requested for {op}, but {reason}")
        return asked
    if _under_torch_func():
        return Implementation.REFERENCE
    *preferred, last = candidates
    for candidate in preferred:
        if _is_meant_for(candidate, device, dtype):
            reason = why_not(op, candidate, device, dtype)
            if reason is None:
                return candidate
            _warn_once(op, last, reason)
    return last


def served_by(op: str, device: torch.device) -> dict[str, Any]:
    """The row of info() for float32 on a device: the candidates that can serve, when, and why not the others."""
    rows: dict[str, Any] = {"served_by": [], "not": {}}
    for implementation, when in CANDIDATES[op]:
        reason = why_not(op, implementation, device, torch.float32)
        if reason is not None:
            rows["not"][implementation.value] = reason
        elif _is_meant_for(implementation, device, torch.float32):
            rows["served_by"].append({"implementation": implementation.value, "when": when})
    return rows


def _word(implementation: Implementation) -> str:
    return next(word for word, asked in BACKENDS.items() if asked is implementation)
