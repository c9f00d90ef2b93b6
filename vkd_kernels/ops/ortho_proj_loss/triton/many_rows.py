"""The loss of many rows: chunks of rows whose G fits a workspace, unscaled gradients in the forward pass.

Row statistics and the sum over tiles run once; a chunk runs loss_tile, which leaves its G, and two library products,
dX = G P and dP += Gᵀ X (or row_stationary.py, which leaves dX as well, and one). Backward multiplies the gradients by
the incoming one, in one launch, into new tensors.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ... import library
from ..chunks import (
    NO_SECOND_ORDER,
    add_product,
    product,
    save_unscaled,
    scaled_by,
    scaled_shapes,
    unscaled_shapes,
    without_masked_rows,
)
from . import rows, tiles
from .launch import aligned, blocks, on, prepared, unit_stride
from .loss_tiles import TERMS, LossTiles, Terms, launch_sum
from .primitives import over
from .row_stationary import RowStationary

SCALE_BLOCK = 2048


def empty_gradient(student: torch.Tensor, n: int, t: int) -> torch.Tensor:
    """Room for G (n, T) in the student's dtype, its rows a multiple of 16 bytes apart whatever T is."""
    return student.new_empty_strided((n, t), (-(-t // 8) * 8, 1))


@library.operator(shapes=unscaled_shapes)
def fused_loss(
    *,
    student: torch.Tensor,  # (N, S)
    teacher: torch.Tensor,  # (N, T)
    weight: torch.Tensor,  # (T, S)
    bias: torch.Tensor | None,  # (T,)
    row_weight: torch.Tensor | None,  # (N,)
    channel_shift: torch.Tensor | None,  # (T,)
    channel_scale: torch.Tensor | None,  # (T,)
    denominator: torch.Tensor | None,  # ()
    factor: float,
    normalization: str,
    eps: float,
    mse: float,
    smooth_l1: float,
    cosine: float,
    beta: float,
    workspace_bytes: int,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, dX, dP, db), the gradients unscaled and empty where they are not needed.

    factor is 1, or 1 / the denominator where that is a number.
    """
    (n, s), t, dtype = student.shape, teacher.shape[1], student.dtype
    weight = unit_stride(weight.to(dtype))
    loss, grad_student, grad_weight, grad_bias = unscaled_shapes(
        student=student, weight=weight, need_student=need_student, need_weight=need_weight, need_bias=need_bias
    )
    if n == 0:
        return loss.zero_(), grad_student, grad_weight.zero_(), grad_bias.zero_()
    terms = Terms.of(mse=mse, smooth_l1=smooth_l1, cosine=cosine, beta=beta)
    with on(student.device):
        chip = tiles.chip(student.device)
        tile = tiles.loss_tile(
            dtype, s, chip, aligned=aligned(student, teacher, weight), several=terms.several or terms.cosine > 0
        )
        chunk = tiles.loss_chunk(
            n, s, t, dtype, workspace_bytes=workspace_bytes, block_n=tile.block_n, processors=chip.processors
        )
        chunk = min(chunk, n)
        gradient = gradient_scale = row_unit = column_sums = None
        if need_student or need_weight:
            gradient = empty_gradient(student, chunk, t)
            if dtype == torch.float16 and terms.may_overflow_float16(normalization, channel_scale):
                gradient_scale = rows.gradient_scale(teacher, row_weight)
            if dtype == torch.float16 and terms.cosine:
                row_unit = student.new_empty((n, 1), dtype=torch.float32)
        if need_bias:
            column_sums = student.new_empty((blocks(chunk, tile.block_n), t), dtype=torch.float32)
        stationary = None
        if need_student and not (need_bias or bias is not None or channel_shift is not None or terms.several):
            stationary = tiles.row_stationary_tile(dtype, s, chip, aligned(student, teacher, weight, grad_student))
        launches: LossTiles | RowStationary
        if stationary is not None and gradient is not None and gradient_scale is None and not terms.cosine:
            launches = RowStationary(
                stationary,
                terms,
                student=student,
                teacher=teacher,
                weight=weight,
                row_weight=row_weight,
                rows_of_teacher=rows.normalization(normalization, teacher, eps),
                gradient=gradient,
                grad_student=grad_student,
            )
        else:
            launches = LossTiles(
                tile,
                terms,
                student=student,
                teacher=teacher,
                weight=weight,
                bias=bias,
                row_weight=row_weight,
                channel_shift=channel_shift,
                channel_scale=channel_scale,
                group=[n],
                normalization=normalization,
                eps=eps,
                gradient=gradient,
                gradient_scale=gradient_scale,
                row_unit=row_unit,
                column_sums=column_sums,
            )
        for first_row in range(0, n, chunk):
            last_row = min(first_row + chunk, n)
            launches.launch(first_row, last_row)
            if gradient is not None:
                g = gradient if last_row - first_row == chunk else gradient[: last_row - first_row]
            if need_student and isinstance(launches, LossTiles):
                product(g, weight, out=grad_student[first_row:last_row])
                if row_unit is not None:
                    grad_student[first_row:last_row].div_(row_unit[first_row:last_row])
            if need_weight:
                w = None if row_weight is None else row_weight[first_row:last_row]
                x = without_masked_rows(student[first_row:last_row], w)
                if row_unit is not None:
                    x = x.div(row_unit[first_row:last_row]).to(dtype)
                if first_row == 0:
                    product(g.T, x, out=grad_weight)
                else:
                    add_product(grad_weight, g.T, x)
            if column_sums is not None:
                sums = column_sums[: blocks(last_row - first_row, tile.block_n)]
                torch.sum(sums, 0, out=grad_bias) if first_row == 0 else grad_bias.add_(sums.sum(0))
        launch_sum(launches.partial, loss, factor=terms.unit * factor, denominator=denominator)
    if gradient_scale is not None:
        grad_student.div_(gradient_scale)
        grad_weight.div_(gradient_scale)
    return loss, grad_student, grad_weight, grad_bias


@triton.jit(do_not_specialize=["student_size", "weight_size", "third_size"])
def scale_gradients(
    unscaled_student,
    unscaled_weight,
    unscaled_third,
    grad_student,
    grad_weight,
    grad_third,
    grad_output,
    denominator,
    student_size,
    weight_size,
    third_size,
    factor,
    BLOCK: tl.constexpr,
):
    """grad = alpha · the unscaled gradient, in float32, of three tensors: alpha = grad_output factor / denominator."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_student = tl.cdiv(student_size.to(tl.int64), BLOCK)  # cdiv adds BLOCK - 1
    blocks_weight = tl.cdiv(weight_size.to(tl.int64), BLOCK)
    alpha = tl.load(grad_output).to(tl.float32) * over(factor, denominator, 0)
    if pid < blocks_student:
        index = pid * BLOCK + tl.arange(0, BLOCK)
        mask = index < student_size
        value = alpha * tl.load(unscaled_student + index, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_student + index, value.to(grad_student.dtype.element_ty), mask=mask)
    elif pid < blocks_student + blocks_weight:
        index = (pid - blocks_student) * BLOCK + tl.arange(0, BLOCK)
        mask = index < weight_size
        value = alpha * tl.load(unscaled_weight + index, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_weight + index, value.to(grad_weight.dtype.element_ty), mask=mask)
    else:
        index = (pid - blocks_student - blocks_weight) * BLOCK + tl.arange(0, BLOCK)
        mask = index < third_size
        value = alpha * tl.load(unscaled_third + index, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_third + index, value.to(grad_third.dtype.element_ty), mask=mask)


@library.operator(shapes=scaled_shapes)
def scaled_gradients(
    *,
    grad_output: torch.Tensor,  # ()
    grad_student: torch.Tensor,  # any of these three may be empty
    grad_weight: torch.Tensor,
    grad_third: torch.Tensor,
    denominator: torch.Tensor | None,  # ()
    factor: float,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The unscaled gradients times grad_output factor / denominator."""
    scaled = scaled_shapes(
        grad_student=grad_student,
        grad_weight=grad_weight,
        grad_third=grad_third,
        student_dtype=student_dtype,
        weight_dtype=weight_dtype,
    )
    sizes = [gradient.numel() for gradient in scaled]
    with on(grad_student.device):
        prepared(scale_gradients, BLOCK=SCALE_BLOCK, num_warps=4)(
            (sum(blocks(size, SCALE_BLOCK) for size in sizes),),
            unscaled_student=grad_student,
            unscaled_weight=grad_weight,
            unscaled_third=grad_third,
            grad_student=scaled[0],
            grad_weight=scaled[1],
            grad_third=scaled[2],
            grad_output=grad_output,
            denominator=denominator,
            student_size=sizes[0],
            weight_size=sizes[1],
            third_size=sizes[2],
            factor=factor,
        )
    return scaled


scale_unscaled = scaled_by(scaled_gradients)


def _save(ctx: Any, inputs: dict[str, Any], output: tuple[torch.Tensor, ...]) -> None:
    save_unscaled(ctx, inputs, output, Terms.of(**{name: inputs[name] for name in TERMS}).unit)


library.differentiable(fused_loss, save=_save, backward=scale_unscaled)
library.refuses_gradients(scaled_gradients, NO_SECOND_ORDER)
