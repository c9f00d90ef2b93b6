"""Squared error and cosine with a semi-orthogonal weight, PᵀP = I and S <= T: nothing of N x T is written.

With m = t P, row by row, and xᵀ(PᵀP)x for the length of z (P is rounded to 16 bits: PᵀP is off I by that)::

    ‖c x Pᵀ - t‖² = c² xᵀPᵀP x - 2 c ⟨x, m⟩ + ‖t‖²        cos = c ⟨x, m⟩ / (‖c x Pᵀ‖ ‖t‖)
    ∂/∂(c x) = on_z c x PᵀP - on_t m                      ∂/∂P = -tᵀ on_t c x, but for its part normal to the manifold

A chunk of rows runs teacher_products (m and the row's normalization in one read of the teacher), loss_rows, and the
library product Yᵀ X' of the weight's gradient. Where the squared error comes out small against what it is the
difference of, it has cancelled: loss_tile then computes it anew from Z, told by the device and not by the host.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ... import library
from ..chunks import add_product, product, save_unscaled, unscaled_shapes, without_masked_rows
from ..spec import NORM_FLOOR
from . import tiles
from .launch import aligned, blocks, on, precision, prepared, unit_stride
from .loss_tiles import LossTiles, Terms, launch_sum
from .many_rows import scale_unscaled
from .primitives import dot, load_tile

ROWS_BLOCK_N, ROWS_BLOCK_S = 32, 64
_LARGEST = tl.constexpr(2.0**14)  # of operand in float16, but for targets so faint that no factor reaches them
_NORM_FLOOR = tl.constexpr(NORM_FLOOR)


@triton.jit(do_not_specialize=["first_row", "last_row"])
def teacher_products(
    teacher,
    weight,
    weight_sums,
    products,
    row_shift,
    row_scale,
    squares,
    first_row,
    last_row,
    S,
    T,
    stride_teacher,
    stride_weight,
    eps,
    NORMALIZATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_S: tl.constexpr,
    EVEN_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """products (chunk, S) = t P for BLOCK_N rows, BLOCKS · BLOCK_S columns a program; t = (y - row_shift) · row_scale.

    Also leaves the rows' shift and scale and squares (N,) = ‖t‖². t P = row_scale (y P - row_shift 1ᵀP), so that Y is
    read once; weight_sums (S,) = 1ᵀP.
    """
    tl.assume(T > 0)
    column_block = tl.program_id(1)
    tile_row = first_row + tl.program_id(0) * BLOCK_N
    offs_n = tile_row.to(tl.int64) + tl.arange(0, BLOCK_N)
    mask_n = offs_n < last_row
    first_column = column_block * (BLOCKS * BLOCK_S)
    # y P, and the row's moments about its first block's mean: sums of squares are sound about a value near the mean.
    sums = ()
    for _ in tl.static_range(BLOCKS):
        sums += (tl.zeros((BLOCK_N, BLOCK_S), tl.float32),)  # type: ignore[assignment]  # tuples grow in Triton's loops
    origin = tl.zeros((BLOCK_N,), tl.float32)
    if NORMALIZATION == "layer_norm":
        start = tl.full((), 0, tl.int32)
        y = load_tile(teacher, tile_row, start, stride_teacher, last_row, T, BLOCK_N, BLOCK_T, EVEN_T, False)
        origin = tl.sum(y.to(tl.float32), 1) / tl.minimum(T, BLOCK_T)
    moment1 = tl.zeros((BLOCK_N,), tl.float32)
    moment2 = tl.zeros((BLOCK_N,), tl.float32)
    for first in tl.range(0, T, BLOCK_T, num_stages=STAGES):
        start = tl.full((), first, tl.int32)
        y = load_tile(teacher, tile_row, start, stride_teacher, last_row, T, BLOCK_N, BLOCK_T, EVEN_T, False)
        updated = ()
        for block in tl.static_range(BLOCKS):
            p = load_tile(
                weight,
                start,
                first_column + block * BLOCK_S,
                stride_weight,
                T,
                S,
                BLOCK_T,
                BLOCK_S,
                EVEN_S,
                False,
            )
            updated += (dot(y, p, sums[block], PRECISION),)  # type: ignore[assignment]
        sums = updated
        about = y.to(tl.float32) - origin[:, None]
        if NORMALIZATION == "layer_norm" and not EVEN_T:
            about = tl.where((start + tl.arange(0, BLOCK_T) < T)[None, :], about, 0.0)
        moment1 += tl.sum(about, 1)
        moment2 += tl.sum(about * about, 1)

    shift = tl.zeros((BLOCK_N,), tl.float32)
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    square = moment2
    if NORMALIZATION == "layer_norm":
        shift = origin + moment1 / T
        square = tl.maximum(moment2 - moment1 * (moment1 / T), 0.0, propagate_nan=tl.PropagateNan.ALL)
        scale = 1.0 / tl.sqrt(square / T + eps)
    elif NORMALIZATION == "l2":
        scale = 1.0 / tl.maximum(tl.sqrt(square), eps, propagate_nan=tl.PropagateNan.ALL)
    if column_block == 0:
        if row_shift is not None:
            tl.store(row_shift + offs_n, shift, mask=mask_n)
        if row_scale is not None:
            tl.store(row_scale + offs_n, scale, mask=mask_n)
        tl.store(squares + offs_n, square * scale * scale, mask=mask_n)
    for block in tl.static_range(BLOCKS):
        offs_s = first_column + block * BLOCK_S + tl.arange(0, BLOCK_S)
        m = sums[block]  # type: ignore[var-annotated]
        if NORMALIZATION == "layer_norm":
            m -= shift[:, None] * tl.load(weight_sums + offs_s, mask=offs_s < S, other=0.0)[None, :]
        m *= scale[:, None]
        at = products + (offs_n - first_row)[:, None] * S + offs_s[None, :]
        tl.store(at, m, mask=mask_n[:, None] & (offs_s < S)[None, :])


@triton.jit(do_not_specialize=["first_row", "last_row"])
def loss_rows(
    student,
    products,
    off_identity,
    scale,
    row_weight,
    row_shift,
    row_scale,
    squares,
    grad_student,
    operand,
    teacher_factor,
    shift_sums,
    squared_errors,
    energies,
    cosines,
    scale_sums,
    first_row,
    last_row,
    S,
    stride_student,
    mse,
    cosine,
    MSE: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The loss and the gradients of BLOCK_N rows, from x, m (products), x (PᵀP - I) (off_identity) and ‖t‖² (squares).

    products, off_identity, operand, teacher_factor and shift_sums hold the chunk alone. Leaves dX, operand = w on_t
    row_scale c x, its sums over the rows times row_shift, and the rows' shares of the loss (squared_errors, with the
    energies that they are the difference of, and cosines) and of the gradient of the scale c. In float16 operand is
    divided by teacher_factor, a power of two, which is 1 but for faint targets.
    """
    block_n = tl.program_id(0)
    offs_chunk = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = first_row + offs_chunk
    mask_n = offs_n < last_row
    w = tl.full((BLOCK_N,), 1.0, tl.float32)
    if row_weight is not None:
        w = tl.load(row_weight + offs_n, mask=mask_n, other=0.0)
    keep = mask_n & (w != 0)  # NaN weights stay in
    c = tl.load(scale).to(tl.float32)
    length = tl.zeros((BLOCK_N,), tl.float32)  # squared, of x
    xx = tl.zeros((BLOCK_N,), tl.float32)  # of x and x PᵀP
    xm = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, S, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = keep[:, None] & (offs_s < S)[None, :]
        at = offs_chunk[:, None] * S + offs_s[None, :]
        x = tl.load(student + offs_n[:, None] * stride_student + offs_s[None, :], mask=mask, other=0.0).to(tl.float32)
        q = x
        if off_identity is not None:
            q += tl.load(off_identity + at, mask=mask, other=0.0)
        length += tl.sum(x * x, 1)
        xx += tl.sum(x * q, 1)
        xm += tl.sum(x * tl.load(products + at, mask=mask, other=0.0), 1)
    tt = tl.load(squares + offs_n, mask=keep, other=0.0)
    xm = tl.where(tt == 0, 0.0, xm)  # of a target of 0 there may be rounding left, which the cosine would blow up
    zz = c * c * xx
    zt = c * xm
    on_z = tl.zeros((BLOCK_N,), tl.float32)
    on_t = tl.zeros((BLOCK_N,), tl.float32)
    share = first_row // BLOCK_N + block_n
    if MSE:
        on_z += mse
        on_t += mse
        squared_error = 0.5 * mse * (zz - 2.0 * zt + tt)
        tl.store(squared_errors + share, tl.sum(tl.where(keep, w * squared_error, 0.0)))
        tl.store(energies + share, tl.sum(tl.where(keep, w * (0.5 * mse) * (zz + tt), 0.0)))
    if COSINE:
        norm = tl.sqrt(tl.maximum(zz, 0.0, propagate_nan=tl.PropagateNan.ALL))
        raised = tl.maximum(norm, _NORM_FLOOR, propagate_nan=tl.PropagateNan.ALL)
        inverse = 1.0 / (raised * tl.maximum(tl.sqrt(tt), _NORM_FLOOR, propagate_nan=tl.PropagateNan.ALL))
        cos = zt * inverse
        on_z += cosine * tl.where(norm < _NORM_FLOOR, 0.0, cos / raised / raised)
        on_t += cosine * inverse
        tl.store(cosines + share, tl.sum(tl.where(keep, w * (cosine * (1.0 - cos)), 0.0)))
    on_t = tl.where(tt == 0, 0.0, on_t)  # such a target adds nothing
    if scale_sums is not None:
        tl.store(scale_sums + share, tl.sum(tl.where(keep, w * (on_z * c * xx - on_t * xm), 0.0)))

    if grad_student is not None or operand is not None:
        shift = tl.zeros((BLOCK_N,), tl.float32)
        target_scale = tl.full((BLOCK_N,), 1.0, tl.float32)
        if row_shift is not None:
            shift = tl.load(row_shift + offs_n, mask=keep, other=0.0)
        if row_scale is not None:
            target_scale = tl.load(row_scale + offs_n, mask=keep, other=0.0)
        on_operand = w * on_t * target_scale * c
        unit = tl.full((BLOCK_N,), 1.0, tl.float32)
        if teacher_factor is not None:
            largest = tl.abs(on_operand) * tl.sqrt(length) / _LARGEST
            largest = tl.where(largest > 1.0, largest, 1.0)  # 1 for NaN
            unit = tl.exp2(tl.minimum(tl.ceil(tl.log2(largest)), 15.0))
            tl.store(teacher_factor + offs_chunk, unit.to(teacher_factor.dtype.element_ty), mask=mask_n)
        for first in range(0, S, BLOCK_S):
            offs_s = first + tl.arange(0, BLOCK_S)
            mask = keep[:, None] & (offs_s < S)[None, :]
            written = mask_n[:, None] & (offs_s < S)[None, :]
            at = offs_chunk[:, None] * S + offs_s[None, :]
            x = tl.load(student + offs_n[:, None] * stride_student + offs_s[None, :], mask=mask, other=0.0)
            x = x.to(tl.float32)
            if grad_student is not None:
                q = x
                if off_identity is not None:
                    q += tl.load(off_identity + at, mask=mask, other=0.0)
                m = tl.load(products + at, mask=mask, other=0.0)
                dx = c * w[:, None] * (on_z[:, None] * (c * q) - on_t[:, None] * m)
                dx = tl.where(mask, dx, 0.0).to(grad_student.dtype.element_ty)
                tl.store(grad_student + offs_n[:, None] * S + offs_s[None, :], dx, mask=written)
            if operand is not None:
                scaled = tl.where(mask, (on_operand / unit)[:, None] * x, 0.0).to(operand.dtype.element_ty)
                tl.store(operand + at, scaled, mask=written)
                if shift_sums is not None:  # of the rounded operand, so that the mean drops out of dP exactly
                    sums = tl.sum(tl.where(mask, scaled.to(tl.float32) * (unit * shift)[:, None], 0.0), 0)
                    tl.store(shift_sums + block_n.to(tl.int64) * S + offs_s, sums, mask=offs_s < S)


def _part(row_weight: torch.Tensor | None, first_row: int, last_row: int) -> torch.Tensor | None:
    return None if row_weight is None else row_weight[first_row:last_row]


class _Buffers:
    """What the kernels leave: for all rows, for the rows of a chunk, and for each block of rows."""

    def __init__(
        self,
        student: torch.Tensor,
        normalization: str,
        chunk: int,
        *,
        terms: Terms,
        need_weight: bool,
        need_scale: bool,
    ) -> None:
        (n, s), new = student.shape, student.new_empty
        layer_norm = normalization == "layer_norm"
        self.row_shift = new(n, dtype=torch.float32) if layer_norm else None
        self.row_scale = new(n, dtype=torch.float32) if normalization != "none" else None
        self.squares = new(n, dtype=torch.float32)
        self.products = new((chunk, s), dtype=torch.float32)
        self.off_identity = new((chunk, s), dtype=torch.float32)
        self.operand = new((chunk, s)) if need_weight else None
        self.teacher_factor = new((chunk, 1)) if need_weight and student.dtype == torch.float16 else None
        chunk_blocks, row_blocks = blocks(chunk, ROWS_BLOCK_N), blocks(n, ROWS_BLOCK_N)
        self.shift_sums = new((chunk_blocks, s), dtype=torch.float32) if need_weight and layer_norm else None
        self.squared_errors = new(row_blocks, dtype=torch.float32) if terms.mse else None
        self.energies = new(row_blocks, dtype=torch.float32) if terms.mse else None
        self.cosines = new(row_blocks, dtype=torch.float32) if terms.cosine else None
        self.scale_sums = new(row_blocks, dtype=torch.float32) if need_scale else None
        self.shift_total: torch.Tensor | None = None  # (S,)

    def add_weight_product(self, grad_weight: torch.Tensor, teacher: torch.Tensor, *, first: bool) -> None:
        """grad_weight += Yᵀ operand of a chunk, and the sums of operand times row_shift."""
        assert self.operand is not None
        operand = self.operand[: teacher.shape[0]]
        if self.teacher_factor is not None:
            teacher = teacher * self.teacher_factor[: teacher.shape[0]]
        if first:
            product(teacher.T, operand, out=grad_weight)
        else:
            add_product(grad_weight, teacher.T, operand)
        if self.shift_sums is not None:
            sums = self.shift_sums[: blocks(teacher.shape[0], ROWS_BLOCK_N)].sum(0)
            self.shift_total = sums if self.shift_total is None else self.shift_total + sums

    def finish_weight(self, grad_weight: torch.Tensor) -> None:
        """-(Y - row_shift)ᵀ operand from Yᵀ operand."""
        grad_weight.neg_()
        if self.shift_total is not None:
            grad_weight += self.shift_total


@library.operator(shapes=unscaled_shapes)
def fused_semi_orthogonal_loss(
    *,
    student: torch.Tensor,  # (N, S)
    teacher: torch.Tensor,  # (N, T), of the student's dtype
    weight: torch.Tensor,  # (T, S), weightᵀ weight = I
    scale: torch.Tensor,  # ()
    row_weight: torch.Tensor | None,  # (N,)
    denominator: torch.Tensor | None,  # ()
    factor: float,
    normalization: str,
    eps: float,
    mse: float,
    cosine: float,
    workspace_bytes: int,
    need_student: bool,
    need_weight: bool,
    need_scale: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, dX, dP, dc), the gradients unscaled and empty where they are not needed."""
    (n, s), t, dtype = student.shape, teacher.shape[1], student.dtype
    projection, weight = weight, unit_stride(weight.to(dtype))
    loss, grad_student, grad_weight, grad_scale = unscaled_shapes(
        student=student, weight=weight, need_student=need_student, need_weight=need_weight, need_scale=need_scale
    )
    with on(student.device):
        chip = tiles.chip(student.device)
        copies = need_weight * ((row_weight is not None) + (dtype == torch.float16))  # of the chunk's teacher
        bytes_per_row = 8 * s + dtype.itemsize * (s + copies * t)
        chunk = min(tiles.chunk_rows(bytes_per_row, n, workspace_bytes, tiles.CHUNK_BLOCK, chip.processors), n)
        terms = Terms.of(mse=mse, smooth_l1=0.0, cosine=cosine, beta=1.0)
        buffers = _Buffers(student, normalization, chunk, terms=terms, need_weight=need_weight, need_scale=need_scale)
        # 16 bits round P, and PᵀP is off I by it.
        off_identity = None
        if dtype != torch.float32:
            off_identity = product(weight.T, weight)
            off_identity.diagonal().sub_(1.0)
            off_identity = off_identity.to(dtype)
        tile = tiles.products_tile(dtype, chip, aligned(teacher, weight))
        column_blocks = min(tile.blocks, blocks(s, tile.block_s))
        products_kernel = prepared(
            teacher_products,
            S=s,
            T=t,
            stride_teacher=teacher.stride(0),
            stride_weight=weight.stride(0),
            eps=eps,
            NORMALIZATION=normalization,
            BLOCK_N=tile.block_n,
            BLOCK_S=tile.block_s,
            BLOCKS=column_blocks,
            BLOCK_T=tile.block_t,
            STAGES=tile.stages,
            EVEN_S=s % (column_blocks * tile.block_s) == 0,
            EVEN_T=t % tile.block_t == 0,
            PRECISION=precision(dtype, chip),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        launch_products = products_kernel.bind(
            teacher=teacher,
            weight=weight,
            weight_sums=weight.sum(0, dtype=torch.float32) if normalization == "layer_norm" else None,
            products=buffers.products,
            row_shift=buffers.row_shift,
            row_scale=buffers.row_scale,
            squares=buffers.squares,
        )
        rows_kernel = prepared(
            loss_rows,
            S=s,
            stride_student=student.stride(0),
            mse=terms.mse,
            cosine=terms.cosine,
            MSE=terms.mse > 0,
            COSINE=terms.cosine > 0,
            BLOCK_N=ROWS_BLOCK_N,
            BLOCK_S=ROWS_BLOCK_S,
            num_warps=8,
        )
        launch_rows = rows_kernel.bind(
            student=student,
            products=buffers.products,
            off_identity=None if off_identity is None else buffers.off_identity,
            scale=scale,
            row_weight=row_weight,
            row_shift=buffers.row_shift,
            row_scale=buffers.row_scale,
            squares=buffers.squares,
            grad_student=grad_student if need_student else None,
            operand=buffers.operand,
            teacher_factor=buffers.teacher_factor,
            shift_sums=buffers.shift_sums,
            squared_errors=buffers.squared_errors,
            energies=buffers.energies,
            cosines=buffers.cosines,
            scale_sums=buffers.scale_sums,
        )
        for first_row in range(0, n, chunk):
            last_row = min(first_row + chunk, n)
            rows = last_row - first_row
            grid = (blocks(rows, tile.block_n), blocks(s, column_blocks * tile.block_s))
            launch_products(grid, first_row=first_row, last_row=last_row)
            if off_identity is not None:
                x = without_masked_rows(student[first_row:last_row], _part(row_weight, first_row, last_row))
                product(x, off_identity, out=buffers.off_identity[:rows])
            launch_rows((blocks(rows, ROWS_BLOCK_N),), first_row=first_row, last_row=last_row)
            if need_weight:
                y = without_masked_rows(teacher[first_row:last_row], _part(row_weight, first_row, last_row))
                buffers.add_weight_product(grad_weight, y, first=first_row == 0)
        if need_weight:
            buffers.finish_weight(grad_weight)
        if buffers.scale_sums is not None:
            torch.sum(buffers.scale_sums, 0, out=grad_scale)
        cancelled = None if buffers.energies is None else student.new_empty(1, dtype=torch.int32)
        summed = buffers.cosines if buffers.squared_errors is None else buffers.squared_errors
        assert summed is not None
        others = None if summed is buffers.cosines else buffers.cosines
        total: dict[str, Any] = {"factor": terms.unit * factor, "denominator": denominator, "others": others}
        launch_sum(summed, loss, **total, energy=buffers.energies, cancelled=cancelled)
        if cancelled is not None:
            folded = unit_stride((projection * scale).to(dtype))
            anew = LossTiles(
                tiles.loss_tile(dtype, s, chip, aligned=aligned(student, teacher, folded)),
                Terms.of(mse=mse, smooth_l1=0.0, cosine=0.0, beta=1.0),
                student=student,
                teacher=teacher,
                weight=folded,
                row_weight=row_weight,
                group=[n],
                rows_of_teacher=(buffers.row_shift, buffers.row_scale),
                only_if=cancelled,
            )
            anew.launch(0, n)
            if terms.cosine:  # the unit is another with it
                anew.partial.mul_(terms.mse)
            launch_sum(anew.partial, loss, **total, only_if=cancelled)
    return loss, grad_student, grad_weight, grad_scale


def _save(ctx: Any, inputs: dict[str, Any], output: tuple[torch.Tensor, ...]) -> None:
    terms = Terms.of(mse=inputs["mse"], smooth_l1=0.0, cosine=inputs["cosine"], beta=1.0)
    save_unscaled(ctx, inputs, output, terms.unit)


library.differentiable(fused_semi_orthogonal_loss, save=_save, backward=scale_unscaled)
