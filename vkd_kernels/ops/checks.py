"""Argument checks shared by the interfaces: every message names the argument and shows what came."""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .library import is_free_to_read

FULL_PRECISION = (torch.float32, torch.float64)
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_WEIGHT = 1e32  # of all rows: times the number of channels it is still a float32


def describe(value: Any) -> str:
    """What came, in a few words: shape, dtype and device of a tensor; type and value of anything else."""
    if isinstance(value, torch.Tensor) and not value.is_nested:
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"[:200]


def can_be_read(tensor: torch.Tensor) -> bool:
    """Whether its values can be looked at: not while a CUDA graph is captured, under vmap, or without data."""
    capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
    return not (tensor.is_meta or isinstance(tensor, FakeTensor) or capturing or transforms_active())


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor, as parameters are under FSDP2, told without importing torch.distributed.tensor."""
    return hasattr(value, "device_mesh")


def check_tensor(name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATING, hint: str = "") -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {describe(value)}")
    if is_sharded(value):
        raise TypeError(
            f"{name} must be a whole tensor; got a DTensor of shape {tuple(value.shape)}. A parameter under "
            "fully_shard is whole in the forward pass of the module that was sharded, and between its unshard() and "
            "reshard(); other DTensors have full_tensor() and to_local()"
        )
    if value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {allowed}; got {describe(value)}{hint}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"{value.layout} of shape {tuple(value.shape)}"
        raise TypeError(f"{name} must be a dense tensor; got {kind}")


def check_same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on {other_name}'s device; got {name} on {value.device}, {other_name} on {other.device}"
        )


def check_choice(name: str, value: Any, choices: Iterable[str | None]) -> None:
    # Nothing else is compared: an array would answer by an array, an object perhaps by an error.
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r:.200}")


def check_number(
    name: str, value: Any, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> None:
    """A finite Python number within the given bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {describe(value)}")
    bounds = [
        *([f"> {above}"] if above is not None else []),
        *([f">= {at_least}"] if at_least is not None else []),
        *([f"<= {at_most}"] if at_most is not None else []),
    ]
    inside = (
        abs(value) <= sys.float_info.max  # not NaN, not Inf, no int beyond them
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
    )
    if not inside:
        within = " " + " and ".join(bounds) if bounds else ""
        raise ValueError(f"{name} must be a finite number{within}; got {value!r:.200}")


def check_dim(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {describe(value)}")
    if not 1 <= value < 2**31:
        raise ValueError(f"{name} must be at least 1{' and below 2**31' if value > 0 else ''}; got {value}")


def check_row_weights(name: str, mask: Any, rows: Sequence[int], features: torch.Tensor) -> None:
    """``mask``: None, or bool or non-negative float weights of the rows' shape; a constant."""
    if mask is None:
        return
    check_tensor(name, mask, (torch.bool, *FLOATING), "; a 0/1 mask of integers becomes one of bools with mask.bool()")
    if tuple(mask.shape) != tuple(rows):
        raise ValueError(f"{name} must have the shape of the rows {tuple(rows)}; got {tuple(mask.shape)}")
    check_same_device(name, mask, "the features", features)
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} is a constant, but the one given requires a gradient: pass its detach()")
    check_weights(name, mask)


def check_weights(name: str, mask: torch.Tensor) -> None:
    """Float weights must not be negative, NaN or too large; looked at on a CPU alone, because it would stall a GPU."""
    if not _are_weights(mask) or mask.numel() == 0 or not is_free_to_read(mask):
        return
    smallest, total = mask.amin().item(), mask.sum(dtype=torch.float64).item()
    if not (smallest >= 0 and total <= (sys.float_info.max if mask.dtype == torch.float64 else MOST_WEIGHT)):
        raise ValueError(
            f"{name} must hold bools, or finite weights of at least 0; got {describe(mask)} whose smallest weight is "
            f"{smallest:.3g} and whose sum is {total:.3g}"
            + (f", more than {MOST_WEIGHT:.0e}: divide it by its largest" if MOST_WEIGHT < total < math.inf else "")
        )


def at_least_0(mask: torch.Tensor) -> torch.Tensor:
    """The mask with 0 in place of negative weights, which nobody has looked for on a GPU; a NaN stays."""
    return mask.clamp_min(0) if _are_weights(mask) else mask


def _are_weights(mask: torch.Tensor) -> bool:
    return mask.dtype in FLOATING and mask.layout == torch.strided and not mask.is_nested


def row_weights(
    name: str, mask: Any, rows: Sequence[int], features: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """The mask, checked, as a flat tensor of weights in ``dtype``."""
    check_row_weights(name, mask, rows, features)
    return None if mask is None else at_least_0(mask.detach().reshape(-1)).to(dtype)
