"""Helpers shared by the implementations that process rows in chunks: sizes, products, weights, targets, lengths.

Last comes the backward pass that they share: the forward pass leaves unscaled gradients, which it multiplies by the
incoming gradient into new tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..library import Operator, operator, refuses_gradients
from .spec import NORM_FLOOR, LossInputs, acc_dtype

WORKSPACE_BYTES = 128 << 20
CACHED_BYTES = 12 << 20  # on a CPU, a chunk whose float32 temporaries stay in the cache is the fastest
NO_SECOND_ORDER = (
    "this implementation of ortho_proj_loss has no second-order gradient: "
    'use ortho_proj_loss(..., backend="torch") or VKD_KERNELS_BACKEND=torch'
)


def even_chunk(rows: int, most: int, multiple: int = 1) -> int:
    """Rows per chunk: at most `most` (but one `multiple`), a multiple of `multiple`, and as even as can be."""
    most = max(most // multiple, 1) * multiple
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // (chunks * multiple)), 1) * multiple


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b accumulated in float32 (float64 for float64), into `out` of any dtype or a new tensor of that one."""
    acc = acc_dtype(a.dtype)
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]), dtype=acc)
    if a.dtype == out.dtype and (a.is_cuda or a.dtype == acc):
        return torch.mm(a, b, out=out)
    if a.is_cuda and _multiplies_into_float32(a.dtype):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a.to(acc), b.to(acc)))


def _multiplies_into_float32(dtype: torch.dtype) -> bool:
    """Whether PyTorch has a 16-bit product with a float32 result on this GPU, under its present settings."""
    if torch.version.hip is not None and torch.__version__ < "2.10":  # refused by 2.8, and by some builds of 2.9
        return False
    return dtype != torch.float16 or not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, accumulated in total's float32 (float64 for float64)."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:  # addmm takes an out_dtype too, but not with a float32 total in every PyTorch from 2.11 on
        total += product(a, b)


def operand_dtype(x: torch.Tensor) -> torch.dtype:
    """The products' operands: x's own dtype where there are units for it, at least float32 elsewhere."""
    return x.dtype if x.is_cuda else acc_dtype(x.dtype)


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """How the unscaled gradient of the student is kept: float16 would overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def without_masked_rows(rows: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:  # (n, C), (n,)
    """Rows of weight 0 replaced by zeros: whatever they hold, NaN included, takes no part in a product."""
    return rows if row_weight is None else torch.where(row_weight[:, None] != 0, rows, 0)


def weighted_(value: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:  # (n, ...), (n,)
    """The value times its rows' weights, in place; rows of weight 0 become 0 whatever they hold."""
    if row_weight is not None:
        w = row_weight.view(-1, *[1] * (value.dim() - 1))
        value.mul_(w).masked_fill_(w == 0, 0)
    return value


def balanced(inputs: LossInputs) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """(row weights, the denominator where it is a tensor, 1 or 1 / the denominator), as operators take them.

    For float16 the weights are in [0, 1], and the denominator matches, so that tiny ones do not underflow in G.
    """
    row_weight, denominator = inputs.row_weight, inputs.denominator
    if row_weight is not None and inputs.student.dtype == torch.float16:
        largest = row_weight.amax() if len(row_weight) else row_weight.new_zeros(())
        largest = largest.clamp_min(torch.finfo(row_weight.dtype).tiny)
        row_weight, denominator = row_weight / largest, denominator / largest
    if isinstance(denominator, torch.Tensor):
        return row_weight, denominator, 1.0
    return row_weight, None, 1.0 / denominator


def normalized(teacher: torch.Tensor, normalization: str, eps: float) -> torch.Tensor:  # (n, T) -> (n, T)
    """Each row of the teacher, in acc_dtype: layer_norm without affine, l2 (divided by its norm), or as it is."""
    if normalization == "layer_norm":
        return F.layer_norm(teacher, teacher.shape[-1:], eps=eps)
    if normalization == "l2":
        return F.normalize(teacher, dim=-1, eps=eps)
    return teacher


def target(
    teacher: torch.Tensor,  # (n, T)
    channel_shift: torch.Tensor | None,  # (T,)
    channel_scale: torch.Tensor | None,  # (T,)
    normalization: str,
    eps: float,
) -> torch.Tensor:  # (n, T)
    """t = (normalize(y) - shift) · scale, in acc_dtype."""
    t = normalized(teacher, normalization, eps)
    if channel_shift is not None:
        t = t - channel_shift
    return t if channel_scale is None else t * channel_scale


def chunk_of(student: torch.Tensor, bytes_per_row: int, workspace_bytes: int) -> int:
    """Rows per chunk, for what the temporaries of a row take."""
    most = workspace_bytes if student.is_cuda else min(workspace_bytes, CACHED_BYTES)
    return even_chunk(student.shape[0], most // bytes_per_row)


def inverse_lengths(
    z_square: torch.Tensor, t_square: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # (n,), (n,) -> (n,), (n,)
    """1 / (max(‖z‖, floor) max(‖t‖, floor)), and 1 / ‖z‖² or, below the floor, where ‖z‖ has no gradient, 0."""
    length = z_square.sqrt()
    inverse = 1 / (length.clamp_min(NORM_FLOOR) * t_square.sqrt().clamp_min(NORM_FLOOR))
    return inverse, torch.where(length > NORM_FLOOR, 1 / z_square, 0.0)


def over(value: torch.Tensor, factor: float, denominator: torch.Tensor | None) -> torch.Tensor:
    """factor · value / denominator."""
    return value * factor if denominator is None else (value * factor / denominator).to(value.dtype)


# ----------------------------------------------------------------------------------------------- the unscaled gradients


def unscaled_shapes(
    *,
    student: torch.Tensor,
    weight: torch.Tensor,
    need_student: bool,
    need_weight: bool,
    need_bias: bool = False,
    need_scale: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss and the unscaled gradients of student, weight, and bias or scale; (0,) where none is needed."""
    acc = acc_dtype(student.dtype)
    third = weight.shape[:1] if need_bias else () if need_scale else (0,)
    return (
        student.new_empty((), dtype=acc),
        student.new_empty(student.shape if need_student else (0,), dtype=saved_dtype(student.dtype)),
        student.new_empty(weight.shape if need_weight else (0,), dtype=acc),
        student.new_empty(third, dtype=acc),
    )


def scaled_shapes(
    *,
    grad_student: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_third: torch.Tensor,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(grad_student, dtype=student_dtype),
        torch.empty_like(grad_weight, dtype=weight_dtype),
        torch.empty_like(grad_third),
    )


@operator(shapes=scaled_shapes)
def chunked_backward(
    *,
    grad_output: torch.Tensor,  # ()
    grad_student: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_third: torch.Tensor,
    denominator: torch.Tensor | None,  # ()
    factor: float,
    student_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """factor · grad_output / denominator times each unscaled gradient, in float32, into new tensors."""
    alpha = over(grad_output, factor, denominator)

    def scaled(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if gradient.dtype == dtype == alpha.dtype:
            return gradient * alpha
        # A 0-d alpha would be rounded to the gradient's 16 bits: go through float32, a part at a time.
        result = torch.empty_like(gradient, dtype=dtype)
        for source, destination in zip(gradient.split(4096), result.split(4096), strict=True):
            destination.copy_(source.to(alpha.dtype) * alpha)
        return result

    return scaled(grad_student, student_dtype), scaled(grad_weight, weight_dtype), scaled(grad_third, grad_third.dtype)


refuses_gradients(chunked_backward, NO_SECOND_ORDER)


def save_unscaled(ctx: Any, inputs: dict[str, Any], output: tuple[torch.Tensor, ...], unit: float = 1.0) -> None:
    """Keeps what ``scaled_by`` needs of an operator that returned (loss, its three unscaled gradients, in ``unit``)."""
    ctx.save_for_backward(*output[1:], inputs["denominator"])
    ctx.factor = unit * inputs["factor"]
    ctx.student_dtype, ctx.weight_dtype = inputs["student"].dtype, inputs["weight"].dtype
    ctx.need = {name.removeprefix("need_"): need for name, need in inputs.items() if name.startswith("need_")}


def scaled_by(scale: Operator) -> Callable[..., dict[str, torch.Tensor]]:
    """The backward pass of such an operator, in which ``scale`` multiplies its gradients."""

    def backward(ctx: Any, grad_output: torch.Tensor, *unused: torch.Tensor | None) -> dict[str, torch.Tensor]:
        grad_student, grad_weight, grad_third, denominator = ctx.saved_tensors
        gradients = scale(
            grad_output=grad_output,
            grad_student=grad_student,
            grad_weight=grad_weight,
            grad_third=grad_third,
            denominator=denominator,
            factor=ctx.factor,
            student_dtype=ctx.student_dtype,
            weight_dtype=ctx.weight_dtype,
        )
        return {name: gradient for (name, need), gradient in zip(ctx.need.items(), gradients, strict=True) if need}

    return backward


scale_unscaled = scaled_by(chunked_backward)
