"""The next design of the loss of many rows, ready to be timed: dX stays in registers over all channels.

A program of BLOCK_N rows keeps X and dX (BLOCK_N, S) and goes over the teacher's channels: Z = X P_jᵀ, G = ρ'(Z - T_j),
dX += G P_j. G is written once, for the library product of dP; nothing reads it for dX. It serves one term (smooth L1 or
squared error) without bias and without statistics of channels, and only where tiles.ROW_STATIONARY_UP_TO says so: no
record shows yet that it wins.
"""

import torch
import triton
import triton.language as tl

from . import tiles
from .launch import blocks, descriptor, precision, prepared
from .loss_tiles import Terms
from .primitives import dot, weighted


@triton.jit(do_not_specialize=["first_row", "last_row"])
def row_stationary(
    student,
    weight,
    teacher,
    row_weight,
    row_shift,
    row_scale,
    gradient,
    grad_student,
    partial,
    first_row,
    last_row,
    S,
    T,
    beta,
    inverse_beta,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    SMOOTH_L1: tl.constexpr,
    BETA_IN_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows first_row to last_row; student, weight, teacher, gradient and grad_student are tensor descriptors."""
    tl.assume(T > 0)
    tile_row = first_row + tl.program_id(0) * BLOCK_N
    offs_n = tile_row + tl.arange(0, BLOCK_N)
    mask_n = offs_n < last_row
    shift = tl.zeros((BLOCK_N,), tl.float32)
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    if row_shift is not None:
        shift = tl.load(row_shift + offs_n, mask=mask_n, other=0.0)
    if row_scale is not None:
        scale = tl.load(row_scale + offs_n, mask=mask_n, other=0.0)
    xs = ()
    sums = ()
    for block in tl.static_range(BLOCKS):
        xs += (student.load([tile_row, block * BLOCK_S]),)  # type: ignore[assignment]  # tuples grow in Triton's loops
        sums += (tl.zeros((BLOCK_N, BLOCK_S), tl.float32),)  # type: ignore[assignment]
    loss = tl.zeros((BLOCK_N,), tl.float32)
    for first in tl.range(0, T, BLOCK_T, num_stages=STAGES):
        column = tl.full((), first, tl.int32)
        ps = ()
        for block in tl.static_range(BLOCKS):
            ps += (weight.load([column, block * BLOCK_S]),)  # type: ignore[assignment]
        y = teacher.load([tile_row, column]).to(tl.float32)
        z = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for block in tl.static_range(BLOCKS):
            z = dot(xs[block], tl.trans(ps[block]), z, PRECISION)
        mask = mask_n[:, None] & (column + tl.arange(0, BLOCK_T) < T)[None, :]
        d = tl.where(mask, z - (y - shift[:, None]) * scale[:, None], 0.0)
        if SMOOTH_L1:
            if BETA_IN_UNIT:
                grad = tl.clamp(d, -beta, beta, propagate_nan=tl.PropagateNan.ALL)
                rho = grad * (d - 0.5 * grad)
            else:
                grad = tl.clamp(d * inverse_beta, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
                rho = grad * (d - 0.5 * beta * grad)
        else:
            grad = d
            rho = 0.5 * d * d
        loss += tl.sum(weighted(rho, row_weight, tile_row, last_row, BLOCK_N), 1)
        half = weighted(grad, row_weight, tile_row, last_row, BLOCK_N).to(gradient.dtype)
        gradient.store([tile_row - first_row, column], half)
        updated = ()
        for block in tl.static_range(BLOCKS):
            updated += (dot(half, ps[block], sums[block], PRECISION),)  # type: ignore[assignment]
        sums = updated
    for block in tl.static_range(BLOCKS):
        grad_student.store([tile_row, block * BLOCK_S], sums[block].to(grad_student.dtype))  # type: ignore[attr-defined]
    # The sum of a column: Triton 3.6 can't reduce a vector that a tensor-core layout was reduced to, on sm_100.
    tl.store(partial + tile_row // BLOCK_N, tl.sum(loss[:, None]))


class RowStationary:
    """The launches for one loss, chunk by chunk: G of the chunk into gradient, dX of all rows into grad_student."""

    def __init__(
        self,
        tile: tiles.ProductsTile,
        terms: Terms,
        *,
        student: torch.Tensor,  # (N, S)
        teacher: torch.Tensor,  # (N, T)
        weight: torch.Tensor,  # (T, S)
        row_weight: torch.Tensor | None,  # (N,)
        rows_of_teacher: tuple[torch.Tensor | None, torch.Tensor | None],  # rows.normalization's
        gradient: torch.Tensor,  # (chunk, T)
        grad_student: torch.Tensor,  # (N, S)
    ) -> None:
        (n, s), t = student.shape, teacher.shape[1]
        self.tile = tile
        self.partial = student.new_empty(blocks(n, tile.block_n), dtype=torch.float32)
        row_shift, row_scale = rows_of_teacher
        launch = prepared(
            row_stationary,
            S=s,
            T=t,
            beta=terms.beta,
            inverse_beta=min(1.0 / terms.beta, 1e38),
            BLOCK_N=tile.block_n,
            BLOCK_T=tile.block_t,
            BLOCK_S=tile.block_s,
            BLOCKS=blocks(s, tile.block_s),
            STAGES=tile.stages,
            SMOOTH_L1=terms.smooth_l1 > 0,
            BETA_IN_UNIT=terms.beta >= 1.0,
            PRECISION=precision(student.dtype, tiles.chip(student.device)),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        self._launch = launch.bind(
            student=descriptor(student, tile.block_n, tile.block_s),
            weight=descriptor(weight, tile.block_t, tile.block_s),
            teacher=descriptor(teacher, tile.block_n, tile.block_t),
            row_weight=row_weight,
            row_shift=row_shift,
            row_scale=row_scale,
            gradient=descriptor(gradient, tile.block_n, tile.block_t),
            grad_student=descriptor(grad_student, tile.block_n, tile.block_s),
            partial=self.partial,
        )

    def launch(self, first_row: int, last_row: int) -> None:
        self._launch((blocks(last_row - first_row, self.tile.block_n),), first_row=first_row, last_row=last_row)
