"""The loss a chunk of rows at a time, in plain PyTorch: for any device and dtype, where N·T is large.

No temporary grows with N beyond ``workspace_bytes``, but for the gradients themselves. They are computed in the forward
pass, unscaled; backward multiplies them by the incoming gradient into new tensors. spec.py has the formulas.
"""

import torch
import torch.nn.functional as F

from ..float64 import has_float64, sum_dtype
from ..library import differentiable, needs_gradient, operator
from .chunks import (
    WORKSPACE_BYTES,
    add_product,
    balanced,
    chunk_of,
    inverse_lengths,
    operand_dtype,
    over,
    product,
    save_unscaled,
    scale_unscaled,
    target,
    unscaled_shapes,
    weighted_,
    without_masked_rows,
)
from .spec import Coefficients, LossGroup, LossInputs, LossSpec, acc_dtype
from .statistics import column_square_sums as column_square_sums  # offered here, too: see spec.py
from .statistics import column_sums as column_sums
from .statistics import student_scatters as student_scatters
from .without_z import chunked_loss_without_z


def loss(spec: LossSpec, inputs: LossInputs, *, workspace_bytes: int = WORKSPACE_BYTES) -> torch.Tensor:  # ()
    """The loss of spec.py, differentiable once in student, weight and bias."""
    tall = inputs.weight.shape[1] <= inputs.weight.shape[0]
    plain = inputs.bias is None and inputs.channel_shift is None
    # Without Z, the lengths of z need float64.
    if spec.is_cosine_alone and tall and plain and has_float64(inputs.student.device):
        return _without_z(spec, inputs, semi_orthogonal=False, workspace_bytes=workspace_bytes)
    row_weight, denominator, factor = balanced(inputs)
    coefficients = spec.coefficients(inputs.teacher.shape[1])
    return chunked_loss(
        student=inputs.student,
        teacher=inputs.teacher,
        weight=inputs.weight,
        bias=inputs.bias,
        row_weight=row_weight,
        channel_shift=inputs.channel_shift,
        channel_scale=inputs.channel_scale,
        denominator=denominator,
        factor=factor,
        normalization=spec.normalization,
        eps=spec.eps,
        mse=coefficients.mse,
        smooth_l1=coefficients.smooth_l1,
        cosine=coefficients.cosine,
        beta=spec.beta,
        workspace_bytes=workspace_bytes,
        need_student=needs_gradient(inputs.student),
        need_weight=needs_gradient(inputs.weight),
        need_bias=needs_gradient(inputs.bias),
    )[0]


def group_loss(spec: LossSpec, group: LossGroup) -> torch.Tensor:  # (G,)
    """The loss of each of the group's inputs, one after the other."""
    return torch.stack([loss(spec, inputs) for inputs in group.inputs()])


def semi_orthogonal_loss(
    spec: LossSpec, inputs: LossInputs, *, workspace_bytes: int = WORKSPACE_BYTES
) -> torch.Tensor:  # ()
    """The loss for weightᵀ weight = I without Z, as spec.py says; differentiable once in student, weight and scale."""
    if inputs.student.device.type != "cpu" and spec.share("mse"):
        # Telling whether the squares cancel would stall the device: Z does without them.
        return loss(spec, inputs.folded(), workspace_bytes=workspace_bytes)
    return _without_z(spec, inputs, semi_orthogonal=True, workspace_bytes=workspace_bytes)


def _without_z(
    spec: LossSpec, inputs: LossInputs, *, semi_orthogonal: bool, workspace_bytes: int
) -> torch.Tensor:  # ()
    row_weight, denominator, factor = balanced(inputs)
    coefficients = spec.coefficients(inputs.teacher.shape[1])
    scale = inputs.scale
    if not isinstance(scale, torch.Tensor):
        scale = inputs.student.new_full((), scale, dtype=acc_dtype(inputs.student.dtype))
    return chunked_loss_without_z(
        student=inputs.student,
        teacher=inputs.teacher,
        weight=inputs.weight,
        scale=scale,
        row_weight=row_weight,
        denominator=denominator,
        factor=factor,
        normalization=spec.normalization,
        eps=spec.eps,
        mse=coefficients.mse,
        cosine=coefficients.cosine,
        semi_orthogonal=semi_orthogonal,
        workspace_bytes=workspace_bytes,
        need_student=needs_gradient(inputs.student),
        need_weight=needs_gradient(inputs.weight),
        need_scale=needs_gradient(scale),
    )[0]


def semi_orthogonal_group_loss(spec: LossSpec, group: LossGroup) -> torch.Tensor:  # (G,)
    """The semi-orthogonal form of each of the group's inputs, one after the other."""
    return torch.stack([semi_orthogonal_loss(spec, inputs) for inputs in group.inputs()])


@operator(shapes=unscaled_shapes)
def chunked_loss(
    *,
    student: torch.Tensor,  # (N, S)
    teacher: torch.Tensor,  # (N, T)
    weight: torch.Tensor,  # (T, S)
    bias: torch.Tensor | None,  # (T,)
    row_weight: torch.Tensor | None,  # (N,)
    channel_shift: torch.Tensor | None,  # (T,)
    channel_scale: torch.Tensor | None,  # (T,)
    denominator: torch.Tensor | None,  # (), where 1 / factor is not it
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
    """The loss and, unscaled, Σ over rows of G weight, Gᵀ student and G, where G = w ∂(loss of a row)/∂z."""
    n, t = teacher.shape
    acc = acc_dtype(student.dtype)
    coefficients = Coefficients(mse=mse, smooth_l1=smooth_l1, cosine=cosine)
    # Smooth L1 by itself, and with a beta that is not huge, has a G of up to 1, which float16 holds.
    holds = student.dtype != torch.float16 or (not (mse or cosine) and smooth_l1 == 1.0 and beta <= 2**12)
    operand = operand_dtype(student) if holds else acc
    p = weight.to(student.dtype).to(operand)
    _, grad_student, grad_weight, grad_bias = unscaled_shapes(
        student=student, weight=weight, need_student=need_student, need_weight=need_weight, need_bias=need_bias
    )
    grad_weight.zero_()
    grad_bias.zero_()
    total = student.new_zeros((), dtype=sum_dtype(student.device))
    need_gradient = need_student or need_weight or need_bias

    temporaries = 5 if normalization != "l2" and not cosine else 6  # Z, T, two for ρ, and G once more in 16 bit
    bytes_per_row = temporaries * t * acc.itemsize + student.shape[1] * acc.itemsize
    step = chunk_of(student, bytes_per_row, workspace_bytes)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        w = None if row_weight is None else row_weight[rows]
        x = without_masked_rows(student[rows], w).to(operand)
        z = product(x, p.T)
        if bias is not None:
            z += bias
        y = target(teacher[rows].to(acc), channel_shift, channel_scale, normalization, eps)
        row_loss, g = _row_losses(z, y, coefficients, beta, need_gradient)
        total += weighted_(row_loss, w).sum(dtype=total.dtype)
        if g is None:
            continue
        g = weighted_(g, w)
        if need_bias:
            grad_bias += g.sum(0)
        g = g.to(operand)
        if need_student:
            product(g, p, out=grad_student[rows])
        if need_weight:
            add_product(grad_weight, g.T, x)
    return over(total, factor, denominator).to(acc), grad_student, grad_weight, grad_bias


def _row_losses(
    z: torch.Tensor,  # (n, T), which may be overwritten
    t: torch.Tensor,  # (n, T)
    coefficients: Coefficients,
    beta: float,
    need_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # (n,), (n, T)
    """The loss of each row, mse · Σ d² + smooth_l1 · Σ h(d) + cosine · (1 - cos(z, t)), and its gradient in z."""
    terms: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    if coefficients.cosine:
        row_loss, gradient = _cosine(z, t, coefficients.cosine, need_gradient)
        terms.append(row_loss)
        gradients += [] if gradient is None else [gradient]
    last = not coefficients.mse
    if coefficients.smooth_l1:
        huber = F.smooth_l1_loss(z, t, beta=beta, reduction="none").sum(1)
        terms.append(huber if coefficients.smooth_l1 == 1.0 else coefficients.smooth_l1 * huber)
        if need_gradient:
            upstream = z.new_full((), coefficients.smooth_l1)
            into = z if last else torch.empty_like(z)
            reduction = 2  # a sum: h'(d) itself
            gradients.append(
                torch.ops.aten.smooth_l1_loss_backward.grad_input(upstream, z, t, reduction, beta, grad_input=into)
            )
    if coefficients.mse:
        d = z.sub_(t)
        terms.append(coefficients.mse * d.square().sum(1))
        if need_gradient:
            gradients.append(d.mul_(2 * coefficients.mse))
    gradient = None
    for part in gradients:
        gradient = part if gradient is None else gradient.add_(part)
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0], gradient


def _cosine(
    z: torch.Tensor, t: torch.Tensor, coefficient: float, need_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """coefficient · (1 - cos) of each row, and coefficient · (κ z - t / (‖z‖ ‖t‖)), κ = cos / ‖z‖² above the floor."""
    inverse, inverse_square = inverse_lengths(z.square().sum(1), t.square().sum(1))
    cos = (z * t).sum(1) * inverse
    if not need_gradient:
        return coefficient * (1 - cos), None
    gradient = (coefficient * cos * inverse_square)[:, None] * z
    return coefficient * (1 - cos), gradient.addcmul_((coefficient * inverse)[:, None], t, value=-1)


differentiable(chunked_loss, save=save_unscaled, backward=scale_unscaled)
