"""float64 where it is needed and the device may have none: Apple's MPS, and some GPUs of Intel."""

import functools

import torch

from .tracing import constant_result

HAVE_FLOAT64 = ("cpu", "cuda", "meta")  # types of devices; others are tried


@constant_result
def has_float64(device: torch.device) -> bool:
    """Whether tensors on the device can be float64."""
    return device.type in HAVE_FLOAT64 or _accepts_float64(device.type)


@functools.cache
def _accepts_float64(device_type: str) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device_type)
    except (TypeError, RuntimeError):
        return False
    return True


def as_float64(x: torch.Tensor) -> torch.Tensor:
    """In float64: on its device, or on the CPU where the device has none. Differentiable."""
    return x.double() if has_float64(x.device) else x.cpu().double()
