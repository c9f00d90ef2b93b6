"""Losses of every form, on tensors that nothing reads: what is launched matters, not what comes out."""

from collections.abc import Callable
from typing import Any

import torch

from vkd_kernels.ops.ortho_proj_loss import triton
from vkd_kernels.ops.ortho_proj_loss.spec import LossGroup, LossInputs, LossSpec

EVERYTHING = {"bias": True, "row_weight": True, "channels": True, "on_device": True}
MIXTURE = {"cosine": 0.9, "smooth_l1": 0.1}


def spec(normalization: str = "layer_norm", loss: Any = "smooth_l1") -> LossSpec:
    return LossSpec(normalization=normalization, loss=LossSpec.shares(loss))


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).requires_grad_()


def inputs(
    n: int,
    s: int,
    t: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    teacher: torch.dtype | None = None,
    weight: torch.dtype = torch.float32,
    bias: bool = False,
    row_weight: bool = False,
    channels: bool = False,
    on_device: bool = False,
) -> LossInputs:
    return LossInputs(
        student=leaf(n, s, dtype=dtype),
        teacher=torch.empty(n, t, dtype=teacher or dtype),
        weight=leaf(t, s, dtype=weight),
        denominator=torch.ones(()) if on_device else float(n * t),
        row_weight=torch.ones(n) if row_weight else None,
        bias=leaf(t) if bias else None,
        channel_shift=torch.empty(t) if channels else None,
        channel_scale=torch.empty(t) if channels else None,
    )


def plain(spec: LossSpec, *args: Any, **options: Any) -> Callable[[], None]:
    """Forward and backward of one loss."""
    arguments = inputs(*args, **options)
    leaves = [x for x in (arguments.student, arguments.weight, arguments.bias) if x is not None]
    upstream = torch.ones(())
    return lambda: _both(triton.loss(spec, arguments), leaves, upstream)


def semi_orthogonal(spec: LossSpec, *args: Any, **options: Any) -> Callable[[], None]:
    arguments = inputs(*args, **options)
    upstream = torch.ones(())
    return lambda: _both(triton.semi_orthogonal_loss(spec, arguments), [arguments.student, arguments.weight], upstream)


def group(
    spec: LossSpec,
    rows: list[int],
    s: int,
    t: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = False,
    row_weight: bool = False,
    channels: bool = False,
    on_device: bool = False,
) -> Callable[[], None]:
    students = tuple(leaf(n, s, dtype=dtype) for n in rows)
    losses = LossGroup(
        students=students,
        teachers=tuple(torch.empty(n, t, dtype=dtype) for n in rows),
        weights=leaf(len(rows), t, s),
        denominators=torch.ones(len(rows)) if on_device else (1.0,) * len(rows),
        row_weights=tuple(torch.ones(n) if row_weight else None for n in rows),
        bias=leaf(len(rows), t) if bias else None,
        channel_shift=torch.empty(len(rows), t) if channels else None,
        channel_scale=torch.empty(len(rows), t) if channels else None,
    )
    leaves = [*students, losses.weights] + ([] if losses.bias is None else [losses.bias])
    upstream = torch.ones(len(rows))
    return lambda: _both(triton.group_loss(spec, losses), leaves, upstream)


def statistics(
    rows: list[int], c: int, weighted: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], None]:
    students = [leaf(n, c, dtype=dtype) for n in rows]
    row_weights = [torch.ones(n) if weighted else None for n in rows]
    means = torch.zeros(len(rows), c)

    def both() -> None:
        triton.column_sums(students, row_weights)
        triton.column_square_sums(students, row_weights, means)
        sums, scatters = triton.student_scatters(students, row_weights, means, means)
        torch.autograd.grad([sums, scatters], students, [torch.ones_like(sums), torch.ones_like(scatters)])

    return both


def _both(loss: torch.Tensor, leaves: list[torch.Tensor], upstream: torch.Tensor) -> None:
    torch.autograd.grad(loss, leaves, upstream)


def forms() -> dict[str, Callable[[], None]]:
    """Every kind of launch; sizes of 1 are constants to Triton's compiler, odd ones rule out descriptors."""
    half, single = torch.float16, torch.float32
    squares = {"mse": 1.0, "cosine": 1.0}
    return {
        "tokens bf16": plain(spec(), 4096, 192, 3024),
        "tokens bf16, 768": plain(spec(), 4096, 768, 3024),
        "tokens bf16, channels of 16 bytes": plain(spec(), 4096, 200, 1000),
        "tokens bf16, ragged": plain(spec(loss="mse"), 4096, 100, 1001),
        "tokens bf16, 8 channels": plain(spec(), 4096, 8, 8),
        "tokens bf16, float32 teacher": plain(spec(), 4096, 192, 1024, teacher=single),
        "tokens fp16, everything": plain(spec(loss="mse"), 4096, 384, 1024, half, **EVERYTHING),
        "tokens fp16, raw teacher": plain(spec("none", "mse"), 4096, 192, 1024, half),
        "tokens fp16, ones": plain(spec(), 2000, 1, 1, half, **EVERYTHING),
        "tokens fp32": plain(spec("l2"), 4096, 192, 1024, single),
        "tokens fp32, everything": plain(spec(loss=MIXTURE), 4096, 100, 1001, single, **EVERYTHING),
        "tokens bf16, cosine": plain(spec("l2", "cosine"), 4096, 192, 1024),
        "tokens bf16, mixture of everything": plain(spec(loss=MIXTURE), 4096, 192, 1024, **EVERYTHING),
        "tokens fp16, mixture, ragged": plain(spec("l2", squares), 4096, 100, 1001, half, **EVERYTHING),
        "pooled bf16": plain(spec(), 512, 192, 3024),
        "pooled bf16, everything": plain(spec(), 512, 100, 1001, **EVERYTHING),
        "pooled bf16, float32 teacher": plain(spec(), 512, 192, 3024, teacher=single),
        "pooled bf16, mixture": plain(spec(loss=MIXTURE), 512, 192, 3024),
        "pooled fp16, raw teacher": plain(spec("none", "mse"), 512, 192, 3024, half),
        "pooled fp32": plain(spec(), 512, 192, 3024, single),
        "pooled bf16, one row": plain(spec(), 1, 192, 3024),
        "pooled bf16, ones": plain(spec(), 1, 1, 1, **EVERYTHING),
        "group of six bf16": group(spec(), [1024, 600, 300, 150, 75, 11], 256, 256),
        "group of six fp16, everything": group(spec(loss="mse"), [1024, 600, 11], 100, 1001, half, **EVERYTHING),
        "group of six fp32": group(spec(), [1024, 600, 300, 150, 75, 11], 256, 256, single),
        "group bf16, an empty entry": group(spec(), [5, 0, 7], 256, 256),
        "group bf16, one of many rows": group(spec("l2", "cosine"), [1024, 4096, 33], 256, 256),
        "semi-orthogonal bf16": semi_orthogonal(spec(loss="mse"), 4096, 192, 3024),
        "semi-orthogonal bf16, cosine": semi_orthogonal(spec("l2", "cosine"), 4096, 192, 3024, row_weight=True),
        "semi-orthogonal bf16, ragged": semi_orthogonal(spec(loss="mse"), 4096, 100, 1001),
        "semi-orthogonal bf16, ones": semi_orthogonal(spec(loss="mse"), 2000, 1, 1),
        "semi-orthogonal fp16, both": semi_orthogonal(spec(loss=squares), 4096, 768, 1024, half, row_weight=True),
        "semi-orthogonal fp32, raw": semi_orthogonal(spec("none", squares), 4096, 192, 3024, single),
        "statistics bf16": statistics([34000], 256),
        "statistics bf16, ones": statistics([1], 1),
        "statistics bf16, six": statistics([600] * 6, 256),
        "statistics fp16, six, weighted": statistics([5, 0, 1033, 7, 9, 2], 100, weighted=True, dtype=half),
        "statistics fp32, weighted": statistics([34000], 256, weighted=True, dtype=single),
        "statistics fp32, ten": statistics([600] * 10, 64, dtype=single),
    }
