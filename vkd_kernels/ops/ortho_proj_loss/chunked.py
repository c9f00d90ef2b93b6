"""The loss a chunk of rows at a time, in plain PyTorch; triton/launch.py runs the same schedule fused.

For any device and dtype, where N·T is too large for reference.py: no temporary grows with N beyond `workspace_bytes`
(but for the gradients themselves). Gradients are computed in the forward pass, unscaled; backward multiplies them by
the incoming gradient into new tensors.
"""

import torch
import torch.nn.functional as F

from .operators import (
    LOSS_ARGUMENTS,
    MSE_ARGUMENTS,
    accumulator_dtype,
    loss_by_loss,
    mse_by_mse,
    operands,
    over,
    register_backward,
    register_loss,
    saved_dtype,
)

WORKSPACE_BYTES = 128 << 20
_CACHED_BYTES = 12 << 20  # on a CPU, a chunk whose float32 temporaries stay in the cache is the fastest


def even_chunk(rows: int, most: int, multiple: int = 1) -> int:
    """Rows per chunk: at most `most` (but one `multiple`), a multiple of `multiple`, and as even as can be."""
    most = max(most // multiple, 1) * multiple
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // (chunks * multiple)), 1) * multiple


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b accumulated in float32 (float64 for float64), into `out` of any dtype or a new tensor of that one."""
    exact = accumulator_dtype(a.dtype)
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]), dtype=exact)
    if a.dtype == out.dtype and (a.is_cuda or a.dtype == exact):
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a.to(exact), b.to(exact)))  # a CPU has no 16-bit product with a float32 result


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, accumulated in total's float32 (float64 for float64)."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:  # addmm takes an out_dtype too, but not with a float32 total in every PyTorch from 2.11 on
        total += product(a, b)


def operand_dtype(x: torch.Tensor) -> torch.dtype:
    """The products' operands: x's own dtype where there are units for it, at least float32 elsewhere."""
    return x.dtype if x.is_cuda else accumulator_dtype(x.dtype)


def without_rows(rows: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:
    """Rows of weight 0 replaced by zeros: whatever they hold, NaN included, takes no part in a product."""
    return rows if row_weight is None else torch.where(row_weight[:, None] != 0, rows, 0)


def weighted_(value: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:
    """value (n, ...) times its rows' weights, in place; rows of weight 0 become 0 whatever they hold."""
    if row_weight is not None:
        w = row_weight.view(-1, *[1] * (value.dim() - 1))
        value.mul_(w).masked_fill_(w == 0, 0)
    return value


# ------------------------------------------------------------------------------------------------------------ the loss


def chunked_loss(
    student: torch.Tensor,  # (N, S)
    teacher: torch.Tensor,  # (N, T), no gradient
    weight: torch.Tensor,  # (T, S)
    bias: torch.Tensor | None,  # (T,) float32
    row_weight: torch.Tensor | None,  # (N,) float32
    channel_shift: torch.Tensor | None,  # (T,) float32
    channel_scale: torch.Tensor | None,  # (T,) float32
    *,
    layer_norm: bool,
    eps: float,
    loss: str,
    beta: float,
    denominator: float | torch.Tensor,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> torch.Tensor:  # ()
    """Σ_n w_n Σ_j ρ(Z - T)_nj / denominator with Z = X Pᵀ + b and T = (layer_norm(Y) - shift) · scale.

    ρ is 'smooth_l1' (PyTorch's, with beta) or 'mse' (d²). Differentiable once in student, weight and bias; only the
    gradients that are needed are computed. A denominator of 0 makes loss and gradients 0.
    """
    row_weight, denominator, factor, needed = operands(student, weight, bias, row_weight, denominator)
    return torch.ops.vkd_kernels.chunked_loss.default(
        student, teacher, weight, bias, row_weight, channel_shift, channel_scale, denominator, factor,
        layer_norm, eps, loss == "smooth_l1", beta, workspace_bytes, *needed,
    )[0]  # fmt: skip


chunked_losses = loss_by_loss(chunked_loss)


def target(teacher, channel_shift, channel_scale, layer_norm, eps, dtype):
    """T (n, T) = (layer_norm(Y) - shift) · scale, as a new tensor."""
    y = teacher.to(dtype)
    if layer_norm:
        y = F.layer_norm(y, y.shape[-1:], eps=eps)
    if channel_shift is not None:
        y = y - channel_shift
    return y if channel_scale is None else y * channel_scale


def _forward(
    student, teacher, weight, bias, row_weight, channel_shift, channel_scale, denominator, factor,
    layer_norm, eps, smooth_l1, beta, workspace_bytes, need_student, need_weight, need_bias,
):  # fmt: skip
    n, t = teacher.shape
    exact = accumulator_dtype(student.dtype)
    operand = operand_dtype(student)
    p = weight.to(student.dtype).to(operand)
    dx = student.new_empty(student.shape if need_student else 0, dtype=saved_dtype(student.dtype))
    dp = weight.new_zeros(weight.shape if need_weight else 0, dtype=exact)
    db = weight.new_zeros(t if need_bias else 0, dtype=exact)
    total = student.new_zeros((), dtype=torch.float64)
    grad_rho = torch.ops.aten.smooth_l1_loss_backward
    one = total.to(exact) + 1

    temporaries = 5  # Z, T, two for ρ, and G once more where it is 16 bit
    bytes_per_row = temporaries * t * exact.itemsize + student.shape[1] * exact.itemsize
    step = even_chunk(n, min(workspace_bytes, workspace_bytes if student.is_cuda else _CACHED_BYTES) // bytes_per_row)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        w = None if row_weight is None else row_weight[rows]
        x = without_rows(student[rows], w).to(operand)
        z = product(x, p.T)
        if bias is not None:
            z += bias
        y = target(teacher[rows], channel_shift, channel_scale, layer_norm, eps, exact)
        if smooth_l1:
            rho = F.smooth_l1_loss(z, y, beta=beta, reduction="none")
            g = grad_rho.grad_input(one, z, y, 2, beta, grad_input=z)  # reduction 2, a sum: ρ'(Z - T)
        else:
            g = z.sub_(y)  # ρ' without its factor 2, which `save` adds
            rho = g.square()
        total += weighted_(rho.sum(1), w).sum(dtype=torch.float64)
        if not (need_student or need_weight or need_bias):
            continue
        g = weighted_(g, w)
        if need_bias:
            db += g.sum(0)
        g = g.to(operand)
        if need_student:
            product(g, p, out=dx[rows])
        if need_weight:
            add_product(dp, g.T, x)
    return over(total, factor, denominator).to(exact), dx, dp, db


def _scale(grad_output, student, weight, third, denominator, factor, student_dtype, weight_dtype):
    """alpha times each gradient, in float32, into new tensors."""
    alpha = over(grad_output, factor, denominator)

    def scaled(gradient, dtype):
        if gradient.dtype == dtype == alpha.dtype:
            return gradient * alpha
        # A 0-d alpha would be rounded to the gradient's 16 bits: go through float32, a part at a time.
        result = torch.empty_like(gradient, dtype=dtype)
        for source, destination in zip(gradient.split(4096), result.split(4096), strict=True):
            destination.copy_(source.to(alpha.dtype) * alpha)
        return result

    return scaled(student, student_dtype), scaled(weight, weight_dtype), scaled(third, third.dtype)


register_backward("chunked_backward", _scale)
register_loss("chunked_loss", LOSS_ARGUMENTS, _forward, "chunked_backward")


# --------------------------------------------------------------------- squared error with an orthonormal weight, S <= T


def orthonormal_mse(
    student: torch.Tensor,  # (N, S)
    teacher: torch.Tensor,  # (N, T), no gradient
    weight: torch.Tensor,  # (T, S) with orthonormal columns
    row_weight: torch.Tensor | None,  # (N,) float32
    *,
    scale: float | torch.Tensor = 1.0,  # number or 0-d float32 tensor
    layer_norm: bool,
    eps: float,
    denominator: float | torch.Tensor,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> torch.Tensor:  # ()
    """Σ_n w_n ‖c X Pᵀ - T‖²_n / denominator for PᵀP = I, without Z: c²‖X‖² - 2 c ⟨X, T P⟩ + ‖T‖².

    T is layer_norm(Y) or Y. Differentiable once in student, weight and scale c. The gradient of the weight leaves out
    2 c² P Xᵀ diag(w) X / denominator, which is normal to the manifold PᵀP = I and vanishes through any orthogonal
    parametrisation; as the gradient of a free matrix it would be wrong.
    """
    return call_orthonormal_mse(
        torch.ops.vkd_kernels.chunked_orthonormal_mse.default, student, teacher, weight, row_weight, scale,
        layer_norm, eps, denominator, workspace_bytes,
    )  # fmt: skip


orthonormal_mses = mse_by_mse(orthonormal_mse)


def call_orthonormal_mse(
    op, student, teacher, weight, row_weight, scale, layer_norm, eps, denominator, workspace_bytes
):
    if not isinstance(scale, torch.Tensor):
        scale = student.new_full((), scale, dtype=accumulator_dtype(student.dtype))
    row_weight, denominator, factor, needed = operands(student, weight, scale, row_weight, denominator)
    return op(
        student, teacher, weight, scale, row_weight, denominator, factor, layer_norm, eps, workspace_bytes, *needed
    )[0]


def _orthonormal_mse(
    student, teacher, weight, scale, row_weight, denominator, factor, layer_norm, eps, workspace_bytes,
    need_student, need_weight, need_scale,
):  # fmt: skip
    """dX = w c (c X - T P), dP = -c Tᵀ diag(w) X, dc = Σ w X (c X - T P), each without its factor 2."""
    n, t = teacher.shape
    exact = accumulator_dtype(student.dtype)
    operand = operand_dtype(student)
    p = weight.to(student.dtype).to(operand)
    dx = student.new_empty(student.shape if need_student else 0, dtype=saved_dtype(student.dtype))
    dp = weight.new_zeros(weight.shape if need_weight else 0, dtype=exact)
    total, dc = (student.new_zeros((), dtype=torch.float64) for _ in range(2))

    bytes_per_row = (3 * t + 6 * student.shape[1]) * exact.itemsize
    step = even_chunk(n, min(workspace_bytes, workspace_bytes if student.is_cuda else _CACHED_BYTES) // bytes_per_row)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        w = None if row_weight is None else row_weight[rows]
        x = without_rows(student[rows], w).to(exact)
        y = target(without_rows(teacher[rows], w), None, None, layer_norm, eps, exact)
        y_operand = y.to(operand)
        tp = product(y_operand, p)
        cx = scale * x
        total += weighted_((cx * (cx - 2 * tp)).sum(1) + y.square().sum(1), w).sum(dtype=torch.float64)
        residual = weighted_(cx - tp, w)
        if need_scale:
            dc += (x * residual).sum(dtype=torch.float64)
        if need_student:
            dx[rows] = residual.mul_(scale)
        if need_weight:
            add_product(dp, y_operand.T, weighted_(x.clone(), w).to(operand))
    if need_weight:
        dp.mul_(-scale)
    dc = dc.to(exact) if need_scale else total.new_empty(0, dtype=exact)
    return over(total, factor, denominator).to(exact), dx, dp, dc


register_loss("chunked_orthonormal_mse", MSE_ARGUMENTS, _orthonormal_mse, "chunked_backward")
