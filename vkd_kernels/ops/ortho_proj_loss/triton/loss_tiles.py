"""One tile of the loss: Z, the target, their difference, its share of the loss and its G; and the sum over tiles.

For an element d = z - t, with the coefficients c of the terms in a unit of their own (``Terms``)::

    loss += c_h (beta or 1) h(d) + c_m d²/2 + cosine's share of the row (rows.py)
    g     = c_h (beta or 1) h'(d) + c_m d + c_c (z · student_factor - t · teacher_factor)

h is smooth L1; its beta, where it is 1 or more, is in the unit, so that no beta under- or overflows. Rows of weight 0
contribute nothing, whatever they hold; any other NaN or Inf goes through. G is multiplied by unit / denominator later.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import rows, tiles
from .launch import Launch, blocks, descriptor, group_rows, precision, prepared, row_stride
from .primitives import over, projected_tile, rows_of, sum_in_order, swizzle, target_tile, weighted

GROUP_N = 8  # blocks of rows that walk the columns together, so that the weight's tiles stay in L2
SUM_BLOCK = 4096
TERMS = ("mse", "smooth_l1", "cosine", "beta")  # the arguments of Terms.of, which operators take by these names
_CANCELS_BELOW = tl.constexpr(1 / 32)  # of Σ energy, in float32; without_z.py, which adds up in float64, has 1 / 64
COSINE_UNIT = 64.0  # G of the cosine is about 1 / (‖z‖ √T): times this, float16 does not underflow


class Terms(NamedTuple):
    """The terms of a loss in the unit in which G is stored: the largest coefficient is 1."""

    unit: float
    smooth_l1: float
    mse: float
    cosine: float
    beta: float

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(mse: float, smooth_l1: float, cosine: float, beta: float) -> "Terms":
        """From the coefficients of ``LossSpec.coefficients``."""
        smooth_l1, mse = smooth_l1 / max(beta, 1.0), 2.0 * mse
        unit = max(smooth_l1, mse, cosine / COSINE_UNIT)
        return Terms(unit=unit, smooth_l1=smooth_l1 / unit, mse=mse / unit, cosine=cosine / unit, beta=beta)

    @property
    def several(self) -> bool:
        return sum(term > 0 for term in (self.smooth_l1, self.mse, self.cosine)) > 1

    def may_overflow_float16(self, normalization: str, channel_scale: torch.Tensor | None) -> bool:
        """Whether G can be as large as a teacher that nothing normalizes."""
        raw = normalization == "none" and channel_scale is None  # the latter standardizes, too
        return raw and (self.mse > 0 or (self.smooth_l1 > 0 and self.beta > 2**12))


@triton.jit(do_not_specialize=["first_row", "last_row", "partials"])
def loss_tile(
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
    gradient,
    gradient_scale,
    row_unit,
    column_sums,
    partial,
    counter,
    losses,
    denominator,
    only_if,
    group_rows,
    first_row,
    last_row,
    S,
    T,
    stride_student,
    stride_weight,
    stride_teacher,
    stride_gradient,
    partials,
    beta,
    inverse_beta,
    smooth_l1,
    mse,
    cosine,
    factors,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_S: tl.constexpr,
    EVEN_T: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SMOOTH_L1: tl.constexpr,
    MSE: tl.constexpr,
    COSINE: tl.constexpr,
    SEVERAL: tl.constexpr,
    BETA_IN_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_N: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """One (BLOCK_N, BLOCK_T) tile of rows first_row to last_row (a chunk), or of each entry of a group.

    student, weight, teacher and gradient are pointers, or tensor descriptors with DESCRIPTOR. gradient holds the rows
    of the chunk alone. partial is (G, partials), a tile's index in it that of the tile among all rows; with a counter
    (cleared beforehand) the program that is last to arrive adds them up. only_if: nothing is done where it holds 0.
    Programs past the end of their group write zeros.
    """
    if only_if is not None:
        if tl.load(only_if) == 0:
            return
    pid = tl.program_id(0)
    g = tl.program_id(1)
    blocks_n = tl.cdiv(last_row - first_row, BLOCK_N)
    blocks_t = tl.cdiv(T, BLOCK_T)
    block_n, block_t = swizzle(pid, blocks_n, blocks_t, GROUP_N)
    tile_row = first_row + block_n * BLOCK_N
    tile_column = block_t * BLOCK_T
    if group_rows is not None:
        group_first, last_row = rows_of(group_rows, g)
        tile_row += group_first
        sums_row = g * blocks_n + block_n
    else:
        sums_row = block_n
    channel = g * T
    share = partial + g * partials + (first_row // BLOCK_N + block_n) * blocks_t + block_t
    offs_t = tile_column + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T

    if tile_row < last_row:
        # Z = X Pᵀ + b, T = normalize(Y)
        z = projected_tile(
            student,
            weight,
            bias,
            tile_row,
            tile_column,
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
            DESCRIPTOR,
            PRECISION,
        )
        t = target_tile(
            teacher,
            row_shift,
            row_scale,
            channel_shift,
            channel_scale,
            tile_row,
            tile_column,
            stride_teacher,
            last_row,
            channel,
            T,
            BLOCK_N,
            BLOCK_T,
            EVEN_T,
            DESCRIPTOR,
        )
        offs_n = tile_row + tl.arange(0, BLOCK_N)
        mask_n = offs_n < last_row
        mask = mask_n[:, None] & mask_t[None, :]
        d = tl.where(mask, z - t, 0.0)

        rho = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        grad = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        if SMOOTH_L1:
            # h'(d) = clamp(d / beta, ±1) and h = h' (d - beta h' / 2): both branches in one. The clamp must let NaN
            # through, or a gradient scaler misses an overflow.
            if BETA_IN_UNIT:
                h = tl.clamp(d, -beta, beta, propagate_nan=tl.PropagateNan.ALL)
                rho = h * (d - 0.5 * h)
            else:
                h = tl.clamp(d * inverse_beta, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
                rho = h * (d - 0.5 * beta * h)
            grad = h
            if SEVERAL:
                rho *= smooth_l1
                grad *= smooth_l1
        if MSE:
            if SEVERAL:
                rho += mse * (0.5 * d * d)
                grad += mse * d
            else:
                rho = 0.5 * d * d
                grad = d
        if COSINE:
            for_z = tl.load(student_factor + offs_n, mask=mask_n, other=0.0)[:, None]
            for_t = tl.load(teacher_factor + offs_n, mask=mask_n, other=0.0)[:, None]
            grad += tl.where(mask, cosine * (z * for_z - t * for_t), 0.0)
        rho = weighted(rho, row_weight, tile_row, last_row, BLOCK_N)
        tl.store(share, tl.sum(rho))

        if column_sums is not None or gradient is not None:
            grad = weighted(grad, row_weight, tile_row, last_row, BLOCK_N)
        if column_sums is not None:
            tl.store(column_sums + sums_row.to(tl.int64) * T + offs_t, tl.sum(grad, 0), mask=mask_t)
        if gradient is not None:
            if gradient_scale is not None:
                grad *= tl.load(gradient_scale)
            if row_unit is not None:
                grad *= tl.load(row_unit + offs_n, mask=mask_n, other=0.0)[:, None]
            chunk_row = tile_row - first_row
            if DESCRIPTOR:
                gradient.store([chunk_row, tile_column], grad.to(gradient.dtype))
            else:
                gradient += chunk_row.to(tl.int64) * stride_gradient
                at = gradient + tl.arange(0, BLOCK_N)[:, None] * stride_gradient + offs_t[None, :]
                tl.store(at, grad.to(gradient.dtype.element_ty), mask=mask)
    else:
        tl.store(share, 0.0)
        if column_sums is not None:
            tl.store(column_sums + sums_row.to(tl.int64) * T + offs_t, tl.zeros((BLOCK_T,), tl.float32), mask=mask_t)

    if counter is not None:
        tl.debug_barrier()
        arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:
            for i in tl.static_range(len(factors)):
                total = sum_in_order(partial + i * partials, partials, SUM_BLOCK)
                tl.store(losses + i, total * over(factors[i], denominator, i))


@triton.jit
def sum_shares(
    partial, others, energy, cancelled, only_if, loss, denominator, count, count_others, factor, BLOCK: tl.constexpr
):
    """loss = factor (Σ partial + Σ others) / denominator, by one program. The sum over tiles of many rows.

    With energy (as partial), cancelled becomes 1 where Σ partial is so small against Σ energy that it has cancelled.
    """
    if only_if is not None:
        if tl.load(only_if) == 0:
            return
    total = sum_in_order(partial, count, BLOCK)
    if energy is not None:
        tl.store(cancelled, tl.where(total < sum_in_order(energy, count, BLOCK) * _CANCELS_BELOW, 1, 0))
    if others is not None:
        total += sum_in_order(others, count_others, BLOCK)
    tl.store(loss, total * over(factor, denominator, 0))


@functools.lru_cache(maxsize=1024)
def _loss_launch(
    *,
    tile: tiles.LossTile,
    terms: Terms,
    precision: str,
    stride_gradient: int,
    **sizes: int,  # S, T and the strides of student, weight and teacher
) -> Launch:
    """loss_tile with what is the same for every call, whatever its number of rows."""
    return prepared(
        loss_tile,
        **sizes,
        stride_gradient=stride_gradient,
        beta=terms.beta,
        inverse_beta=min(1.0 / terms.beta, 1e38),
        smooth_l1=terms.smooth_l1,
        mse=terms.mse,
        cosine=terms.cosine,
        BLOCK_N=tile.block_n,
        BLOCK_T=tile.block_t,
        BLOCK_S=tile.block_s,
        STAGES=tile.stages,
        EVEN_S=sizes["S"] % tile.block_s == 0,
        EVEN_T=sizes["T"] % tile.block_t == 0,
        DESCRIPTOR=tile.descriptors,
        SMOOTH_L1=terms.smooth_l1 > 0,
        MSE=terms.mse > 0,
        COSINE=terms.cosine > 0,
        SEVERAL=terms.several,
        BETA_IN_UNIT=terms.beta >= 1.0,
        PRECISION=precision,
        GROUP_N=GROUP_N,
        SUM_BLOCK=SUM_BLOCK,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


class LossTiles:
    """The launches of a loss, chunk by chunk, or for all losses of a group at once: row statistics when it is made
    (for the cosine also its factors), then loss_tile."""

    def __init__(
        self,
        tile: tiles.LossTile,
        terms: Terms,
        *,
        student: torch.Tensor,  # (N, S)
        teacher: torch.Tensor,  # (N, T)
        weight: torch.Tensor,  # (T, S) or (G, T, S)
        row_weight: torch.Tensor | None,  # (N,)
        group: list[int],  # rows of each loss
        bias: torch.Tensor | None = None,  # (T,) or (G, T), as what follows
        channel_shift: torch.Tensor | None = None,
        channel_scale: torch.Tensor | None = None,
        normalization: str = "none",
        eps: float = 0.0,
        rows_of_teacher: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,  # normalization's, if known
        gradient: torch.Tensor | None = None,  # (chunk, T), for G
        gradient_scale: torch.Tensor | None = None,  # (), what G is multiplied by
        row_unit: torch.Tensor | None = None,  # (N,), what its rows are, for the cosine in float16; written
        column_sums: torch.Tensor | None = None,  # (blocks of the chunk's rows, T), for sums of G
        denominator: torch.Tensor | None = None,  # () or (G,)
        factors: tuple[float, ...] = (1.0,),  # G
        losses: torch.Tensor | None = None,  # () or (G,), written by the last program; None: launch_sum is to come
        only_if: torch.Tensor | None = None,  # (1,) int32
    ) -> None:
        s, t, chip = student.shape[1], teacher.shape[1], tiles.chip(student.device)
        self.tile, self.group = tile, group
        self.blocks_t = blocks(t, tile.block_t)
        counter = None if losses is None else student.new_empty(1, dtype=torch.int32)
        row_shift, row_scale = rows_of_teacher or rows.normalization(normalization, teacher, eps, counter)
        tensors: dict[str, Any] = {
            "student": student,
            "weight": weight,
            "teacher": teacher,
            "bias": bias,
            "row_weight": row_weight,
            "row_shift": row_shift,
            "row_scale": row_scale,
            "channel_shift": channel_shift,
            "channel_scale": channel_scale,
            "row_unit": row_unit,
            "group_rows": group_rows(group),
        }
        sizes = {
            "S": s,
            "T": t,
            "stride_student": student.stride(0),
            "stride_weight": row_stride(weight),
            "stride_teacher": teacher.stride(0),
        }
        loss_tiles = blocks(max(group), tile.block_n) * self.blocks_t
        student_factor = teacher_factor = None
        if terms.cosine:
            student_factor, teacher_factor, self.partial = rows.cosine(
                tiles.cosine_tile(student.dtype, s, t, chip), terms.cosine, loss_tiles, group, tensors, sizes
            )
        else:
            self.partial = student.new_empty((len(group), loss_tiles), dtype=torch.float32)
        gradient_tiles: Any = gradient
        if tile.descriptors:
            tensors["student"] = descriptor(student, tile.block_n, tile.block_s)
            tensors["weight"] = descriptor(weight, tile.block_t, tile.block_s)
            tensors["teacher"] = descriptor(teacher, tile.block_n, tile.block_t)
            gradient_tiles = None if gradient is None else descriptor(gradient, tile.block_n, tile.block_t)
        launch = _loss_launch(
            tile=tile,
            terms=terms,
            precision=precision(student.dtype, chip),
            stride_gradient=0 if gradient is None else gradient.stride(0),
            **sizes,
        )
        self._launch = launch.bind(
            **tensors,
            student_factor=student_factor,
            teacher_factor=teacher_factor,
            gradient=gradient_tiles,
            gradient_scale=gradient_scale,
            column_sums=column_sums,
            partial=self.partial,
            partials=self.partial.shape[1],
            factors=factors,
            counter=counter,
            losses=losses,
            denominator=denominator,
            only_if=only_if,
        )

    def launch(self, first_row: int, last_row: int) -> None:
        """The tiles of rows first_row to last_row; of a group, 0 to the largest number of rows."""
        grid = (blocks(last_row - first_row, self.tile.block_n) * self.blocks_t, len(self.group))
        self._launch(grid, first_row=first_row, last_row=last_row)


def launch_sum(
    partial: torch.Tensor,  # (count,)
    loss: torch.Tensor,  # (), written
    *,
    factor: float,
    denominator: torch.Tensor | None,  # ()
    others: torch.Tensor | None = None,  # (count_others,)
    energy: torch.Tensor | None = None,  # (count,)
    cancelled: torch.Tensor | None = None,  # (1,) int32, written
    only_if: torch.Tensor | None = None,  # (1,) int32
) -> None:
    prepared(sum_shares, BLOCK=SUM_BLOCK, num_warps=8)(
        (1,),
        partial=partial,
        others=others,
        energy=energy,
        cancelled=cancelled,
        only_if=only_if,
        loss=loss,
        denominator=denominator,
        count=partial.numel(),
        count_others=0 if others is None else others.numel(),
        factor=factor,
    )
