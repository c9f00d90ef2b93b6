"""Statistics over the rows, in plain PyTorch, a chunk at a time; triton/launch.py has some of them in one read.

mean(Z) = P mean(X) and var(Z)_j = p_j Cov(X) p_jᵀ: batch_norm of the projected student needs these sums over the
student's rows and no pass over Z. They are sums, not means, so that they can be added over ranks.
"""

import torch

from . import chunked
from .operators import accumulator_dtype, define, differentiate, refuse_second_order


def column_sums(xs, row_weights) -> torch.Tensor:
    """Σ_n w_n x_n: G of (N, C), G of (N,) or None -> (G, C) in float32 (float64 for float64); no gradient."""
    return _each(torch.ops.vkd_kernels.column_sum.default, [x.detach() for x in xs], row_weights)


def column_centred_square_sums(xs, row_weights, means: torch.Tensor) -> torch.Tensor:
    """Σ_n w_n (x_n - mean)²: as column_sums, about means (G, C) -> (G, C); no gradient."""
    op = torch.ops.vkd_kernels.column_centred_square_sum.default
    return _each(op, [x.detach() for x in xs], row_weights, means.detach())


def student_moments(students, row_weights, sums: torch.Tensor, means: torch.Tensor):
    """(sums, Σ_n w_n (x_n - mean)(x_n - mean)ᵀ): G of (N, S), G of (N,) or None, (G, S), (G, S) -> (G, S), (G, S, S).

    Differentiable in students; sums are their column_sums, which this gives their gradient. In the means the derivative
    is 0, where they are those of all rows (of all ranks), as they must be. Centred before the product and never in
    TF32: sound when |mean| >> std.
    """
    op = torch.ops.vkd_kernels.student_moments.default
    each = [op(*of_level) for of_level in zip(students, row_weights, sums.detach(), means.detach(), strict=True)]
    return [torch.stack(values) for values in zip(*each, strict=True)]


def _each(statistic, *lists):
    return torch.stack([statistic(*of_level) for of_level in zip(*lists, strict=True)])


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


def _centred_square_sum(x, row_weight, mean):
    total = torch.zeros_like(mean)
    for rows, w in _chunks(x, row_weight, 2):
        total += chunked.weighted_((x[rows].to(mean.dtype) - mean).square_(), w).sum(0)
    return total


def _centred(x, mean, w):
    """Rows of x minus the mean, rows of weight 0 as zeros."""
    return chunked.without_rows(x.to(mean.dtype) - mean, w)


def _moments(x, row_weight, sums, mean):
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
    return sums.clone(), total


def _moments_backward(grad_sum, grad_scatter, x, row_weight, mean):
    """dX_n = w_n ((C + Cᵀ)(x_n - m) + s) for the incoming s and C."""
    # float16 would underflow: incoming gradients carry 1 / (N T).
    operand = chunked.operand_dtype(x) if x.dtype == torch.bfloat16 else accumulator_dtype(x.dtype)
    symmetric = (grad_scatter + grad_scatter.T).to(operand)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    with _Ieee():
        for rows, w in _chunks(x, row_weight, 3):
            d = chunked.product(_centred(x[rows], mean, w).to(operand), symmetric)
            dx[rows] = chunked.weighted_(d.add_(grad_sum), w)
    return dx


def _save_moments(ctx, inputs, output):
    x, row_weight, _, mean = inputs
    ctx.save_for_backward(x, row_weight, mean)


def _differentiate_moments(ctx, *grads):
    saved = ctx.saved_tensors
    grads = moment_gradients(grads, saved[2])
    return torch.ops.vkd_kernels.student_moments_backward.default(*grads, *saved), None, None, None


def moment_gradients(grads, mean):
    """The incoming gradients of sums and scatters, zeros for those that there are not."""
    shapes = mean.shape, (*mean.shape, mean.shape[-1])
    return [mean.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, shapes, strict=True)]


define(
    "column_sum", "(Tensor rows, Tensor? row_weight) -> Tensor", _sum,
    lambda x, w: x.new_empty(x.shape[1:], dtype=accumulator_dtype(x.dtype)),
)  # fmt: skip
define(
    "column_centred_square_sum", "(Tensor rows, Tensor? row_weight, Tensor mean) -> Tensor", _centred_square_sum,
    lambda x, w, mean: torch.empty_like(mean),
)  # fmt: skip
define(
    "student_moments", "(Tensor student, Tensor? row_weight, Tensor sums, Tensor mean) -> (Tensor, Tensor)", _moments,
    lambda x, w, sums, mean: (torch.empty_like(sums), mean.new_empty((x.shape[1], x.shape[1]))),
)  # fmt: skip
define(
    "student_moments_backward",
    "(Tensor grad_sum, Tensor grad_scatter, Tensor student, Tensor? row_weight, Tensor mean) -> Tensor",
    _moments_backward,
    lambda s, c, x, w, mean: torch.empty_like(x, memory_format=torch.contiguous_format),
)  # fmt: skip
differentiate("student_moments", _save_moments, _differentiate_moments)
refuse_second_order("student_moments_backward")
