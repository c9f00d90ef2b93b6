"""Whether float32 products may use TF32: PyTorch's setting, by the API that the installed version has."""

import contextlib
from collections.abc import Iterator

import torch

HAS_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # from PyTorch 2.9 on; before it, allow_tf32


def tf32_allowed() -> bool:
    """Reads either API. (Reading ``allow_tf32`` is an error from 2.9 on where the new setting has been used.)"""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if HAS_PRECISION else matmul.allow_tf32


def _refuse_tf32() -> None:
    if HAS_PRECISION:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    else:
        torch.backends.cuda.matmul.allow_tf32 = False


def _allow_tf32() -> None:
    """By the setting of all backends, if that allows it: it would not reach a setting of cuBLAS' own any more."""
    if HAS_PRECISION:
        torch.backends.cuda.matmul.fp32_precision = "none"
        if not tf32_allowed():
            torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.backends.cuda.matmul.allow_tf32 = True


@contextlib.contextmanager
def ieee_products(device: torch.device) -> Iterator[None]:
    """float32 products without TF32 on a GPU; PyTorch's setting comes back as it was."""
    allowed = device.type == "cuda" and tf32_allowed()
    if allowed:
        _refuse_tf32()
    try:
        yield
    finally:
        if allowed:
            _allow_tf32()
