"""Whether float32 products may use TF32: PyTorch's setting, by the API that the installed version has."""

import contextlib
from collections.abc import Iterator

import torch

HAS_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # from PyTorch 2.9 on; before it, allow_tf32


def tf32_allowed() -> bool:
    """Reads either API. (Reading ``allow_tf32`` is an error from 2.9 on where the new setting has been used.)"""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if HAS_PRECISION else matmul.allow_tf32


def _allow(allowed: bool) -> None:
    if HAS_PRECISION:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    else:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """float32 products without TF32; PyTorch's setting comes back as it was."""
    before = tf32_allowed()
    if before:
        _allow(False)
    try:
        yield
    finally:
        if before:
            _allow(True)
