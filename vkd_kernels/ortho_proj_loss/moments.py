"""Statistics over the rows, in plain PyTorch, a chunk at a time; triton_op.py has some of them in one read.

mean(Z) = P mean(X) and var(Z)_j = p_j Cov(X) p_jᵀ: batch_norm of the projected student needs these sums over the
student's rows and no pass over Z. They are sums, not means, so that they can be added over ranks.
"""

import torch

from . import chunked
from .operators import accumulator_dtype, define, differentiate, refuse_second_order


def student_sum(student: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:
    """Σ_n w_n x_n: (N, S), (N,) or None -> (S,) in float32 (float64 for float64), differentiable in student."""
    return torch.ops.vkd_kernels.student_sum.default(student, row_weight)


def student_scatter(student: torch.Tensor, row_weight: torch.Tensor | None, mean: torch.Tensor) -> torch.Tensor:
    """Σ_n w_n (x_n - mean)(x_n - mean)ᵀ: (N, S), (N,) or None, (S,) -> (S, S) in float32 (float64 for float64).

    Differentiable in student. In the mean the derivative is 0, where it is the mean of all rows (of all ranks), as it
    must be. Centred before the product and never in TF32: sound when |mean| >> std.
    """
    return torch.ops.vkd_kernels.student_scatter.default(student, row_weight, mean.detach())


def student_moments(student, row_weight, total):
    """(mean (S,), covariance (S, S)) of one process's rows; total: the sum of the weights, a number or 0-d tensor."""
    mean = student_sum(student, row_weight) / total
    return mean, student_scatter(student, row_weight, mean) / total


def column_sum(teacher: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:
    """Σ_n w_n y_n: (N, T) -> (T,) in float32 (float64 for float64); no gradient."""
    return torch.ops.vkd_kernels.student_sum.default(teacher.detach(), row_weight)


def column_centred_square_sum(teacher, row_weight, mean) -> torch.Tensor:
    """Σ_n w_n (y_n - mean)²: (N, T), (N,) or None, (T,) -> (T,) in float32 (float64 for float64); no gradient."""
    return torch.ops.vkd_kernels.column_centred_square_sum.default(teacher.detach(), row_weight, mean.detach())


def _each(statistic):
    """The statistic of each of G sets of rows, one after the other: lists of G tensors (or Nones) -> (G, ...)."""
    return lambda *lists: torch.stack([statistic(*arguments) for arguments in zip(*lists, strict=True)])


student_sums = _each(student_sum)
student_scatters = _each(student_scatter)
column_sums = _each(column_sum)
column_centred_square_sums = _each(column_centred_square_sum)


def _chunks(x: torch.Tensor, row_weight, temporaries: int):
    """(rows, their weights or None) in chunks whose float32 temporaries fit the workspace."""
    bytes_per_row = temporaries * x.shape[1] * accumulator_dtype(x.dtype).itemsize
    step = chunked.even_chunk(x.shape[0], chunked.WORKSPACE_BYTES // bytes_per_row)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        yield rows, None if row_weight is None else row_weight[rows]


class _Ieee:
    """float32 products without TF32, for the statistics; PyTorch's setting comes back as it was."""

    def __enter__(self):
        self.before = torch.backends.cuda.matmul.fp32_precision
        if self.before == "tf32":
            torch.backends.cuda.matmul.fp32_precision = "ieee"

    def __exit__(self, *_):
        if self.before == "tf32":
            torch.backends.cuda.matmul.fp32_precision = self.before


def _sum(x, row_weight):
    exact = accumulator_dtype(x.dtype)
    if row_weight is None:
        return x.sum(0, dtype=exact)
    total = x.new_zeros(x.shape[1], dtype=exact)
    for rows, w in _chunks(x, row_weight, 2):
        total += chunked.weighted_(x[rows].to(exact, copy=True), w).sum(0)
    return total


def _sum_backward(grad, row_weight, n, dtype):
    if row_weight is None:
        return grad.to(dtype).expand(n, -1).contiguous()
    return torch.mul(row_weight[:, None], grad, out=grad.new_empty((n, grad.shape[0]), dtype=dtype))


def _centred(x, mean, w):
    """Rows of x minus the mean, rows of weight 0 as zeros."""
    return chunked.without_rows(x.to(mean.dtype) - mean, w)


def _scatter(x, row_weight, mean):
    operand = chunked.operand_dtype(x)
    s = x.shape[1]
    total = mean.new_zeros((s, s))
    with _Ieee():
        for rows, w in _chunks(x, row_weight, 4):
            d = _centred(x[rows], mean, w)
            if w is not None:
                d = d * w.sqrt()[:, None]
            if operand == d.dtype:
                total.addmm_(d.T, d)
            else:  # 16-bit products of d = high + low, together as exact as d is
                high = d.to(operand)
                both = torch.cat([high, (d - high).to(operand)], 1)
                total += chunked.product(both.T, both).view(2, s, 2, s).sum((0, 2))
    return total


def _scatter_backward(grad, x, row_weight, mean):
    """dX_n = w_n (C + Cᵀ)(x_n - m) for the incoming C."""
    # float16 would underflow: incoming gradients carry 1 / (N T).
    operand = chunked.operand_dtype(x) if x.dtype == torch.bfloat16 else accumulator_dtype(x.dtype)
    symmetric = (grad + grad.T).to(operand)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    with _Ieee():
        for rows, w in _chunks(x, row_weight, 3):
            dx[rows] = chunked.weighted_(chunked.product(_centred(x[rows], mean, w).to(operand), symmetric), w)
    return dx


def _centred_square_sum(x, row_weight, mean):
    total = torch.zeros_like(mean)
    for rows, w in _chunks(x, row_weight, 2):
        total += chunked.weighted_((x[rows].to(mean.dtype) - mean).square_(), w).sum(0)
    return total


def save_sum(ctx, inputs, output):
    student, row_weight = inputs
    ctx.save_for_backward(row_weight)
    ctx.n, ctx.dtype = student.shape[0], student.dtype


def differentiate_sum(ctx, grad):
    return torch.ops.vkd_kernels.student_sum_backward.default(grad, *ctx.saved_tensors, ctx.n, ctx.dtype), None


def _save_scatter(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_scatter(ctx, grad):
    return torch.ops.vkd_kernels.student_scatter_backward.default(grad, *ctx.saved_tensors), None, None


define(
    "student_sum", "(Tensor student, Tensor? row_weight) -> Tensor", _sum,
    lambda x, w: x.new_empty(x.shape[1:], dtype=accumulator_dtype(x.dtype)),
)  # fmt: skip
define(
    "student_sum_backward", "(Tensor grad, Tensor? row_weight, SymInt n, ScalarType dtype) -> Tensor", _sum_backward,
    lambda grad, w, n, dtype: grad.new_empty((n, grad.shape[0]), dtype=dtype),
)  # fmt: skip
define(
    "student_scatter", "(Tensor student, Tensor? row_weight, Tensor mean) -> Tensor", _scatter,
    lambda x, w, mean: mean.new_empty((x.shape[1], x.shape[1])),
)  # fmt: skip
define(
    "student_scatter_backward", "(Tensor grad, Tensor student, Tensor? row_weight, Tensor mean) -> Tensor",
    _scatter_backward,
    lambda grad, x, w, mean: torch.empty_like(x, memory_format=torch.contiguous_format),
)  # fmt: skip
define(
    "column_centred_square_sum", "(Tensor teacher, Tensor? row_weight, Tensor mean) -> Tensor", _centred_square_sum,
    lambda x, w, mean: torch.empty_like(mean),
)  # fmt: skip
for _name, _differentiate, _save in (
    ("student_sum", differentiate_sum, save_sum),
    ("student_scatter", _differentiate_scatter, _save_scatter),
):
    differentiate(_name, _save, _differentiate)
    refuse_second_order(f"{_name}_backward")
