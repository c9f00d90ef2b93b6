"""What the loss needs of every row beforehand: the row's own normalization of the teacher, and the cosine's factors."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..spec import NORM_FLOOR
from . import tiles
from .launch import Launch, blocks, precision, prepared
from .primitives import projected_tile, rows_of, target_tile, weighted

_LARGEST = tl.constexpr(2.0**14)  # of G in float16, but for a factor of 2
_NORM_FLOOR = tl.constexpr(NORM_FLOOR)


@triton.jit(do_not_specialize=["N"])
def row_statistics(
    teacher,
    row_weight,
    row_shift,
    row_scale,
    counter,
    N,
    T,
    stride_teacher,
    eps,
    STATISTIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Y (N, T) -> by STATISTIC, all in one read; also clears the counter of loss_tile.

    layer_norm: row_shift (N,) = mean, row_scale (N,) = 1 / sqrt(biased variance + eps)
    l2: row_scale = 1 / max(norm, eps)        largest: row_scale = largest finite magnitude, 0 in rows of weight 0
    """
    pid = tl.program_id(0)
    if counter is not None:
        if pid == 0:
            tl.store(counter, 0)
    offs_n = pid.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    teacher += offs_n[:, None] * stride_teacher
    mean = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)  # sum of squared deviations from the mean so far
    count = 0.0
    for first in range(0, T, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        mask = mask_n[:, None] & (offs_t < T)[None, :]
        y = tl.load(teacher + offs_t[None, :], mask=mask, other=0.0).to(tl.float32)
        if STATISTIC == "layer_norm":
            # Chan's merge of two blocks: sound when |mean| >> std, which a sum of squares is not.
            size = tl.minimum(T - first, BLOCK_T).to(tl.float32)
            block_mean = tl.sum(y, 1) / size
            deviation = tl.where(mask, y - block_mean[:, None], 0.0)
            rounding = tl.sum(deviation, 1) / size  # what the sum of large values lost
            difference = block_mean + rounding - mean
            total = count + size
            mean += difference * (size / total)
            square += tl.sum(deviation * deviation, 1) - size * rounding * rounding
            square += difference * difference * (count * size / total)
            count = total
        elif STATISTIC == "l2":
            square += tl.sum(y * y, 1)
        else:
            magnitude = tl.abs(y)
            square = tl.maximum(square, tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), 1))
    if STATISTIC == "layer_norm":
        tl.store(row_shift + offs_n, mean, mask=mask_n)
        tl.store(row_scale + offs_n, 1.0 / tl.sqrt(square / T + eps), mask=mask_n)
    elif STATISTIC == "l2":
        norm = tl.maximum(tl.sqrt(square), eps, propagate_nan=tl.PropagateNan.ALL)
        tl.store(row_scale + offs_n, 1.0 / norm, mask=mask_n)
    else:
        if row_weight is not None:
            square = tl.where(tl.load(row_weight + offs_n, mask=mask_n, other=0.0) == 0, 0.0, square)
        tl.store(row_scale + offs_n, square, mask=mask_n)


@functools.lru_cache(maxsize=1024)
def _statistics_launch(statistic: str, t: int, stride_teacher: int, eps: float) -> tuple[Launch, int]:
    """(row_statistics for such rows, its rows of a block)."""
    block_t = min(1 << (t - 1).bit_length(), tiles.STATISTICS_ELEMENTS)
    block_n = min(tiles.STATISTICS_ELEMENTS // block_t, tiles.STATISTICS_ROWS)
    launch = prepared(
        row_statistics,
        T=t,
        stride_teacher=stride_teacher,
        eps=eps,
        STATISTIC=statistic,
        BLOCK_N=block_n,
        BLOCK_T=block_t,
        num_warps=4,
    )
    return launch, block_n


def _launch_statistics(
    statistic: str,
    teacher: torch.Tensor,  # (N, T)
    *,
    row_weight: torch.Tensor | None = None,  # (N,)
    row_shift: torch.Tensor | None = None,  # (N,), written
    row_scale: torch.Tensor,  # (N,), written
    counter: torch.Tensor | None = None,  # (1,) int32, cleared
    eps: float = 0.0,
) -> None:
    n, t = teacher.shape
    launch, block_n = _statistics_launch(statistic, t, teacher.stride(0), eps)
    launch(
        (blocks(n, block_n),),
        teacher=teacher,
        row_weight=row_weight,
        row_shift=row_shift,
        row_scale=row_scale,
        counter=counter,
        N=n,
    )


def normalization(
    name: str,
    teacher: torch.Tensor,  # (N, T)
    eps: float,
    counter: torch.Tensor | None = None,  # (1,) int32, uninitialized: cleared
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # (N,), (N,)
    """(row_shift, row_scale) of the teacher's rows: the target is (Y - shift) · scale."""
    if name == "none":
        if counter is not None:
            counter.zero_()
        return None, None
    scale = teacher.new_empty(teacher.shape[0], dtype=torch.float32)
    row_shift = torch.empty_like(scale) if name == "layer_norm" else None
    _launch_statistics(name, teacher, row_shift=row_shift, row_scale=scale, counter=counter, eps=eps)
    return row_shift, scale


def gradient_scale(
    teacher: torch.Tensor,  # (N, T)
    row_weight: torch.Tensor | None,  # (N,)
) -> torch.Tensor:  # ()
    """A power of two, at most 1, times which no finite value of the teacher overflows float16."""
    largest = teacher.new_empty(teacher.shape[0], dtype=torch.float32)
    _launch_statistics("largest", teacher, row_weight=row_weight, row_scale=largest)
    return torch.exp2(torch.floor(torch.log2(1024.0 / largest.amax())).clamp(-120, 0))


@triton.jit(do_not_specialize=["N", "first_partial", "partials"])
def cosine_rows(
    student,
    weight,
    teacher,
    bias,
    row_weight,
    row_shift,
    row_scale,
    channel_shift,
    channel_scale,
    student_factor,
    teacher_factor,
    row_unit,
    partial,
    group_rows,
    N,
    S,
    T,
    stride_student,
    stride_weight,
    stride_teacher,
    first_partial,
    partials,
    cosine,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_S: tl.constexpr,
    EVEN_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The cosine of BLOCK_N rows, c = ⟨z, t⟩ / (‖z‖ ‖t‖), whose gradient is -t / (‖z‖ ‖t‖) + z c / ‖z‖².

    Leaves teacher_factor (N,) = 1 / (‖z‖ ‖t‖), student_factor (N,) = c / ‖z‖² and the rows' share of the loss,
    cosine Σ w (1 - c). Norms are at least NORM_FLOOR, and a norm that is raised to it has no gradient. row_unit (N,):
    what the rows of G are multiplied by so that float16 holds them, 1 but for nearly dead rows; their x is as small.
    """
    first_row = tl.program_id(0) * BLOCK_N
    g = tl.program_id(1)
    last_row = N
    if group_rows is not None:
        group_first, last_row = rows_of(group_rows, g)
        first_row += group_first
    channel = g * T
    zz = tl.zeros((BLOCK_N,), tl.float32)
    zt = tl.zeros((BLOCK_N,), tl.float32)
    tt = tl.zeros((BLOCK_N,), tl.float32)
    for first_column in range(0, T, BLOCK_T):
        first = tl.full((), first_column, tl.int32)
        z = projected_tile(
            student,
            weight,
            bias,
            first_row,
            first,
            stride_student,
            stride_weight,
            last_row,
            channel,
            S,
            T,
            BLOCK_N,
            BLOCK_T,
            BLOCK_S,
            STAGES,
            EVEN_S,
            False,
            PRECISION,
        )
        t = target_tile(
            teacher,
            row_shift,
            row_scale,
            channel_shift,
            channel_scale,
            first_row,
            first,
            stride_teacher,
            last_row,
            channel,
            T,
            BLOCK_N,
            BLOCK_T,
            EVEN_T,
            False,
        )
        mask_t = (first + tl.arange(0, BLOCK_T) < T)[None, :]
        z = tl.where(mask_t, z, 0.0)
        t = tl.where(mask_t, t, 0.0)
        zz += tl.sum(z * z, 1)
        zt += tl.sum(z * t, 1)
        tt += tl.sum(t * t, 1)
    student_norm = tl.maximum(tl.sqrt(zz), _NORM_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    inverse = 1.0 / (student_norm * tl.maximum(tl.sqrt(tt), _NORM_FLOOR, propagate_nan=tl.PropagateNan.ALL))
    c = zt * inverse
    offs_n = first_row + tl.arange(0, BLOCK_N)
    mask_n = offs_n < last_row
    raised = tl.sqrt(zz) < _NORM_FLOOR
    tl.store(teacher_factor + offs_n, inverse, mask=mask_n)
    tl.store(student_factor + offs_n, tl.where(raised, 0.0, c / student_norm / student_norm), mask=mask_n)
    if row_unit is not None:
        unit = student_norm * (_LARGEST / cosine)
        tl.store(row_unit + offs_n, tl.where(unit < 1.0, unit, 1.0), mask=mask_n)  # 1 for NaN
    loss = weighted(tl.where(mask_n, 1.0 - c, 0.0), row_weight, first_row, last_row, BLOCK_N)
    # The sum of a column: Triton 3.6 can't reduce a vector that a tensor-core layout was reduced to, on sm_100.
    tl.store(partial + g * partials + first_partial + tl.program_id(0), cosine * tl.sum(loss[:, None]))


def cosine(
    tile: tiles.LossTile,
    coefficient: float,
    first_partial: int,
    group: list[int],  # rows of each loss
    tensors: dict[str, Any],  # of cosine_rows, by name
    sizes: dict[str, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # (N,), (N,), (G, first_partial + blocks of rows)
    """(student_factor, teacher_factor, partial), the rows' shares of the loss from entry first_partial on."""
    student: torch.Tensor = tensors["student"]
    row_blocks = blocks(max(group), tile.block_n)
    student_factor = student.new_empty(student.shape[0], dtype=torch.float32)
    teacher_factor = torch.empty_like(student_factor)
    partial = student.new_empty((len(group), first_partial + row_blocks), dtype=torch.float32)
    launch = prepared(
        cosine_rows,
        **sizes,
        cosine=coefficient,
        BLOCK_N=tile.block_n,
        BLOCK_T=tile.block_t,
        BLOCK_S=tile.block_s,
        STAGES=tile.stages,
        EVEN_S=sizes["S"] % tile.block_s == 0,
        EVEN_T=sizes["T"] % tile.block_t == 0,
        PRECISION=precision(student.dtype, tiles.chip(student.device)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    launch(
        (row_blocks, len(group)),
        **tensors,
        student_factor=student_factor,
        teacher_factor=teacher_factor,
        partial=partial,
        first_partial=first_partial,
        partials=partial.shape[1],
        N=max(group),
    )
    return student_factor, teacher_factor, partial
