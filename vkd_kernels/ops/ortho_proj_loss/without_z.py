"""The chunked loss without Z: squared error and cosine of a semi-orthogonal weight, cosine of any (see spec.py)."""

import torch

from ..float64 import sum_dtype
from ..library import differentiable, operator
from .chunks import (
    add_product,
    chunk_of,
    inverse_lengths,
    normalized,
    operand_dtype,
    over,
    product,
    save_unscaled,
    scale_unscaled,
    unscaled_shapes,
    weighted_,
    without_masked_rows,
)
from .spec import acc_dtype

CANCELS_BELOW = 1 / 64  # of Σ‖t‖²: a remainder smaller than that is computed anew


@operator(shapes=unscaled_shapes)
def chunked_loss_without_z(
    *,
    student: torch.Tensor,  # (N, S)
    teacher: torch.Tensor,  # (N, T)
    weight: torch.Tensor,  # (T, S), S <= T
    scale: torch.Tensor,  # ()
    row_weight: torch.Tensor | None,  # (N,)
    denominator: torch.Tensor | None,  # (), where 1 / factor is not it
    factor: float,
    normalization: str,
    eps: float,
    mse: float,
    cosine: float,
    semi_orthogonal: bool,
    workspace_bytes: int,
    need_student: bool,
    need_weight: bool,
    need_scale: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss and its unscaled gradients from x, m = t weight and the lengths of x and t, row by row.

    With weightᵀ weight = I, ‖z‖ = ‖c x‖ and the gradient of weight leaves out what is normal to the manifold. Any other
    weight (cosine alone, c = 1) has ‖z‖² = ⟨x, q⟩ with q = x (weightᵀ weight), in float64, and all of its gradient.

        ∂/∂(c x) = 2 mse (c x - m) + cosine (κ q - m / (‖z‖ ‖t‖))     κ = cos / ‖z‖², q = c x where weightᵀ weight = I
        ∂/∂weight = -tᵀ (2 mse + cosine / (‖z‖ ‖t‖)) c x  + weight xᵀ (cosine κ) x, the last part for any other weight
    """
    n, t = teacher.shape
    acc = acc_dtype(student.dtype)
    operand = acc if student.dtype == torch.float16 else operand_dtype(student)  # t / ‖t‖ may be below float16
    # On a CPU the products are in float32 at least, and rounding weight first would leave weightᵀ weight off I.
    p = weight.to(operand)
    gram = None if semi_orthogonal else p.double().T @ p.double()  # of the weight that m is a product with
    _, grad_student, grad_weight, grad_scale = unscaled_shapes(
        student=student, weight=weight, need_student=need_student, need_weight=need_weight, need_scale=need_scale
    )
    grad_weight.zero_()
    normal = weight.new_zeros(weight.shape[1:] * 2, dtype=acc)  # (S, S)
    total, scale_total = (student.new_zeros((), dtype=sum_dtype(student.device)) for _ in range(2))

    bytes_per_row = (3 * t + 8 * student.shape[1]) * acc.itemsize
    step = chunk_of(student, bytes_per_row, workspace_bytes)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        w = None if row_weight is None else row_weight[rows]
        x = without_masked_rows(student[rows], w).to(acc)
        y = normalized(without_masked_rows(teacher[rows], w).to(acc), normalization, eps)
        y = without_masked_rows(y, w)
        y_operand = y.to(operand)
        m = product(y_operand, p)
        cx = scale * x
        y_square = y.square().sum(1)
        row_loss = torch.zeros_like(y_square)
        on_y = torch.zeros_like(y_square)  # ∂/∂weight = -yᵀ diag(on_y) c x
        grad_cx = torch.zeros_like(cx)
        if mse:
            row_loss += mse * _square_error(cx, m, y, y_square, p, w)
            on_y += 2 * mse
            grad_cx.add_(cx - m, alpha=2 * mse)
        if cosine:
            q = cx if gram is None else (cx.double() @ gram).to(acc)
            inverse, inverse_square = inverse_lengths((cx * q).sum(1).clamp_min(0), y_square)
            cos = (cx * m).sum(1) * inverse
            row_loss += cosine * (1 - cos)
            on_y += cosine * inverse
            kappa = cosine * cos * inverse_square
            grad_cx.addcmul_(kappa[:, None], q).addcmul_((cosine * inverse)[:, None], m, value=-1)
            if need_weight and gram is not None:
                normal.addmm_(x.T, weighted_(kappa[:, None] * x, w))
        total += weighted_(row_loss, w).sum(dtype=total.dtype)
        grad_cx = weighted_(grad_cx, w)
        if need_scale:
            scale_total += (x * grad_cx).sum(dtype=total.dtype)
        if need_weight:
            add_product(grad_weight, y_operand.T, (weighted_(on_y, w)[:, None] * cx).to(operand))
        if need_student:
            grad_student[rows] = grad_cx.mul_(scale)
    if need_weight:
        grad_weight.neg_()
        if gram is not None:
            grad_weight.addmm_(p.to(acc), normal)
    if need_scale:
        grad_scale.copy_(scale_total)
    return over(total, factor, denominator).to(acc), grad_student, grad_weight, grad_scale


def _square_error(
    cx: torch.Tensor,  # (n, S)
    m: torch.Tensor,  # (n, S), y p
    y: torch.Tensor,  # (n, T)
    y_square: torch.Tensor,  # (n,)
    p: torch.Tensor,  # (T, S)
    w: torch.Tensor | None,  # (n,)
) -> torch.Tensor:  # (n,)
    """‖c x pᵀ - y‖² of each row: ‖c x - m‖² and the square of y's distance from the span of p, ‖y‖² - ‖m‖².

    Where that difference is small against ‖y‖², summed over the weighted rows, or NaN, cancellation has destroyed it:
    then Z is formed after all.
    """
    left_of = y_square - m.square().sum(1)
    counted = (x if w is None else x * w for x in (left_of, y_square))
    left, whole = (x.sum(dtype=sum_dtype(x.device)) for x in counted)
    if left > CANCELS_BELOW * whole:  # on a CPU, looking costs nothing
        return (cx - m).square().sum(1) + left_of
    return (product(cx.to(p.dtype), p.T) - y).square().sum(1)


differentiable(chunked_loss_without_z, save=save_unscaled, backward=scale_unscaled)
