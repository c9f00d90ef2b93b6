"""float64 where it is needed and the device may have none: Apple's MPS, and some GPUs of Intel."""

import functools
from collections.abc import Callable

import torch
from torch import nn
from typing_extensions import Self

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


def sum_dtype(device: torch.device) -> torch.dtype:
    """What a sum of float32 losses is kept in, on its device."""
    return torch.float64 if has_float64(device) else torch.float32


def as_float64(x: torch.Tensor) -> torch.Tensor:
    """In float64: on its device, or on the CPU where the device has none. Differentiable."""
    return x.double() if has_float64(x.device) else x.cpu().double()


class KeepsDtypes(nn.Module):
    """A module whose own buffers no cast touches. If one is float64, all stay on the CPU where a device has none."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        for name in kept:
            self._buffers[name] = None
        try:
            super()._apply(fn, recurse)
        finally:
            anywhere = all(buffer.dtype != torch.float64 for buffer in kept.values())
            for name, buffer in kept.items():
                device = fn(torch.empty(0, device=buffer.device)).device
                if anywhere or has_float64(device):
                    moved = fn(buffer)
                    buffer = moved if moved.dtype == buffer.dtype else buffer.to(device)
                elif buffer.is_meta:  # by to_empty()
                    buffer = torch.empty_like(buffer, device="cpu")
                self._buffers[name] = buffer
        return self
