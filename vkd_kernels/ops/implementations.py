"""Which backend serves an op: what is available here, the caller's request, and the reason when one can't serve.

Loads the compiled extension once and keeps the reason when it can't be loaded; ``vkd_kernels.info()`` shows it all.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import warnings
from pathlib import Path

import torch

ENVIRONMENT = "VKD_KERNELS_BACKEND"
SERVES = {"ortho_proj_loss": ("triton", "torch"), "cayley": ("extension", "torch")}
BACKENDS = ("triton", "extension", "torch")
TRITON_FROM = (3, 4)  # what PyTorch 2.8, the oldest that the tests run on, brings


@torch.compiler.assume_constant_result  # PyTorch 2.11 and older can't trace the call
def autocast_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def no_autocast(device_type: str):
    """Autocast switched off, on devices that have it ("meta" has not)."""
    available = autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives matrix products here, or None while it is off."""
    enabled = autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else None


def _build_record() -> dict:
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
def extension():
    """(the module ``vkd_kernels._C``, None), or (None, the reason why it is missing)."""
    record = _build_record()
    if "damaged" in record:  # which PyTorch the extension was built with is unknown, and another's crashes the process
        return None, record["damaged"]
    if importlib.util.find_spec("vkd_kernels._C") is None:
        return None, "the extension is not built: " + (record.get("reason") or "install the package to build it")
    built_with = record.get("torch", torch.__version__)
    if built_with != torch.__version__:
        # Loading it could crash the process: the C++ interface of PyTorch is not stable between versions.
        return None, f"the extension was built with PyTorch {built_with} and this is {torch.__version__}: reinstall it"
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


def has_code_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for "80-real 90-virtual" runs on a GPU: by code for its generation, or PTX for an older one."""
    for entry in architectures.split():
        number, kind = entry.split("-")
        built = divmod(int(number.rstrip("af")), 10)
        if built <= capability and (kind == "virtual" or built[0] == capability[0]):
            return True
    return False


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """The reason why ``backend`` can't serve ``op`` for tensors of this device and dtype, or None when it can."""
    if backend not in SERVES[op]:
        return f"{op} has no {backend!r} backend; it has {', '.join(map(repr, SERVES[op]))}"
    if backend == "triton":
        if why_no_triton():
            return why_no_triton()
        if device_type != "cuda":
            return f"Triton kernels take CUDA tensors; got a tensor on {device_type}"
        if dtype == torch.float64:
            return "the Triton kernels take float32, bfloat16 and float16; got float64"
    if backend == "extension":
        module, reason = extension()
        if module is None:
            return reason
        if device_type == "cuda" and module.build_info()["cuda"] is None:
            return "the extension was built without CUDA: " + (_build_record().get("reason") or "unknown reason")
        if device_type == "cuda" and torch.cuda.is_available():
            built, (major, minor) = module.build_info()["cuda_architectures"], torch.cuda.get_device_capability()
            if not has_code_for(built, (major, minor)):
                return f"the extension was built for the GPU architectures {built} and this GPU is {major}.{minor}"
        if device_type not in ("cpu", "cuda"):
            return f"the extension takes CPU and CUDA tensors; got a tensor on {device_type}"
    return None


@functools.cache
def _warn_once(op: str, backend: str, reason: str) -> None:
    warnings.warn(
        f"vkd_kernels: {op} falls back to the PyTorch reference because {reason}. "
        f"{ENVIRONMENT}=torch asks for the reference and silences this.",
        stacklevel=4,
    )


def requested(op: str, backend: str | None) -> tuple[str | None, str]:
    """(the backend asked for by argument or environment, or None; which of the two asked)."""
    if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}; got {backend!r:.200}")
    if backend is not None:
        return backend, "backend"
    asked = os.environ.get(ENVIRONMENT)
    if asked and asked not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT} must be one of {', '.join(map(repr, BACKENDS))}; got {asked!r}")
    # The variable speaks for every op at once, so it binds the ops that have such a backend.
    return (asked if asked in SERVES[op] else None), ENVIRONMENT


@torch.compiler.assume_constant_result  # what is installed and asked for does not change under a compiled graph
def choose(
    op: str, backend: str | None, device_type: str, dtype: torch.dtype, fastest: str | None = None
) -> tuple[str, bool]:
    """(the backend that serves ``op``, whether it was asked for): the one asked for or an error, else the fastest.

    ``fastest`` is the op's own advice for these shapes; by default its first backend.
    """
    asked, source = requested(op, backend)
    if asked is not None:
        reason = why_not(op, asked, device_type, dtype)
        if reason:
            raise RuntimeError(f"{source}={asked!r} was requested for {op}, but {reason}")
        return asked, True
    if torch._C._are_functorch_transforms_active():
        return "torch", True  # torch.func differentiates what is made of PyTorch's own operators
    best = fastest or SERVES[op][0]
    reason = why_not(op, best, device_type, dtype)
    if reason is None:
        return best, False
    expected = best == "triton" and (device_type != "cuda" or dtype == torch.float64)
    expected = expected or (best == "extension" and device_type not in ("cpu", "cuda"))
    if not expected:
        _warn_once(op, best, reason)
    return "torch", False
