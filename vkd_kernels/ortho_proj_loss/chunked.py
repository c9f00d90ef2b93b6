"""The loss and its statistics a chunk of rows at a time, in plain PyTorch; triton_op.py runs the same schedule fused.

For any device and dtype, where N·T is too large for reference.py: no temporary grows with N beyond `workspace_bytes`
(but for the gradients themselves). Gradients are computed in the forward pass, unscaled; backward multiplies them by
the incoming gradient into new tensors.
"""

import torch
import torch.nn.functional as F

WORKSPACE_BYTES = 128 << 20
_CACHED_BYTES = 12 << 20  # on a CPU, a chunk whose float32 temporaries stay in the cache runs twice as fast

NO_SECOND_ORDER = (
    "this backend of ortho_proj_loss has no second-order gradient: "
    'use ortho_proj_loss(..., backend="torch") or VKD_KERNELS_BACKEND=torch'
)

library = torch.library.Library("vkd_kernels", "FRAGMENT")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """How the unscaled dX is kept: float16 would overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def balanced(student, row_weight, denominator):
    """Row weights in [0, 1] for float16 (with the denominator to match), so that tiny ones do not underflow in G."""
    if row_weight is None or student.dtype != torch.float16 or student.shape[0] == 0:
        return row_weight, denominator
    largest = row_weight.amax().clamp_min(torch.finfo(row_weight.dtype).tiny)
    return row_weight / largest, denominator / largest


def without_rows(rows: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:
    """Rows of weight 0 replaced by zeros: whatever they hold, NaN included, takes no part in a product."""
    return rows if row_weight is None else torch.where(row_weight[:, None] != 0, rows, 0)


def weighted_(value: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:
    """value (n, ...) times its rows' weights, in place; rows of weight 0 become 0 whatever they hold."""
    if row_weight is not None:
        w = row_weight.view(-1, *[1] * (value.dim() - 1))
        value.mul_(w).masked_fill_(w == 0, 0)
    return value


# ---------------------------------------------------------------------------------------------- the contract of an op

LOSS_ARGUMENTS = (
    "Tensor student, Tensor teacher, Tensor weight, Tensor? bias, Tensor? row_weight, Tensor? channel_shift, "
    "Tensor? channel_scale, Tensor? denominator, float factor, bool layer_norm, float eps, bool smooth_l1, float beta, "
    "int workspace_bytes, bool need_student, bool need_weight, bool need_bias"
)
MSE_ARGUMENTS = (
    "Tensor student, Tensor teacher, Tensor weight, Tensor scale, Tensor? row_weight, Tensor? denominator, "
    "float factor, bool layer_norm, float eps, int workspace_bytes, "
    "bool need_student, bool need_weight, bool need_scale"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor student, Tensor weight, Tensor third, Tensor? denominator, float factor, "
    "ScalarType student_dtype, ScalarType weight_dtype) -> (Tensor, Tensor, Tensor)"
)


def define(name: str, schema: str, forward, fake) -> None:
    """One operator for every device: its schema, its implementation and its shapes."""
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vkd_kernels::{name}", fake, lib=library)


def differentiate(name: str, save, backward) -> None:
    """Autograd of an operator: save(ctx, inputs, output) after the forward pass, backward(ctx, *grads) -> gradients.

    What torch.library.register_autograd does, which costs 70 µs a call on the host with as many arguments as here.
    """
    op = getattr(torch.ops.vkd_kernels, name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            nothing = all(grad is None for grad in grads)
            return (None,) * len(ctx.needs_input_grad) if nothing else backward(ctx, *grads)

    library.impl(name, Differentiable.apply, "Autograd")


def refuse_second_order(name: str) -> None:
    """Gradients through the operator, a backward, are an error that says what to use instead."""

    def refuse(ctx, *grads):
        raise RuntimeError(NO_SECOND_ORDER)

    differentiate(name, lambda ctx, inputs, output: None, refuse)


def register_backward(name: str, scale) -> None:
    """vkd_kernels::<name>: alpha times each unscaled gradient of a loss, into new tensors."""

    def fake(grad_output, student, weight, third, denominator, factor, student_dtype, weight_dtype):
        return (
            torch.empty_like(student, dtype=student_dtype),
            torch.empty_like(weight, dtype=weight_dtype),
            torch.empty_like(third),
        )

    define(name, _BACKWARD_SCHEMA, scale, fake)
    refuse_second_order(name)


def register_loss(name: str, arguments: str, forward, scale_op: str) -> None:
    """vkd_kernels::<name> -> (loss, dX, dP, and dbias or dscale), unscaled gradients, empty where not needed.

    loss = factor * sum / denominator (a missing denominator is 1). `arguments` names the three leaves and, last, the
    three need_<leaf>; the backward of the operator scales the gradients by vkd_kernels::<scale_op>.
    """
    names = [argument.split()[-1] for argument in arguments.split(", ")]
    leaves = [argument.removeprefix("need_") for argument in names[-3:]]

    def fake(*inputs):
        named = dict(zip(names, inputs, strict=True))
        student = named["student"]
        exact = accumulator_dtype(student.dtype)
        dtypes = (saved_dtype(student.dtype), exact, exact)
        return student.new_empty((), dtype=exact), *(
            student.new_empty(named[leaf].shape if named[f"need_{leaf}"] else (0,), dtype=dtype)
            for leaf, dtype in zip(leaves, dtypes, strict=True)
        )

    define(name, f"({arguments}) -> (Tensor, Tensor, Tensor, Tensor)", forward, fake)
    scale_op = getattr(torch.ops.vkd_kernels, scale_op).default

    def save(ctx, inputs, output):
        named = dict(zip(names, inputs, strict=True))
        ctx.save_for_backward(*output[1:], named["denominator"])
        factor = named["factor"] if named.get("smooth_l1") else 2 * named["factor"]  # G = d has its 2 from here
        ctx.scalars = factor, named["student"].dtype, named["weight"].dtype
        ctx.needed = inputs[-3:]

    def backward(ctx, grad_output, *_):
        *saved, denominator = ctx.saved_tensors
        grads = scale_op(grad_output, *saved, denominator, *ctx.scalars)
        of_leaf = {leaf: grad for leaf, grad, need in zip(leaves, grads, ctx.needed, strict=True) if need}
        return tuple(of_leaf.get(argument) for argument in names)

    differentiate(name, save, backward)


def operands(student, weight, third, row_weight, denominator):
    """What every loss op is called with, worked out from the arguments of chunked_loss: which gradients are needed,
    and the denominator as (0-d tensor or None, factor). A denominator of 0 makes loss and gradients 0."""
    row_weight, denominator = balanced(student, row_weight, denominator)
    if isinstance(denominator, torch.Tensor):
        factor = 1.0
    else:
        factor = 0.0 if denominator == 0 else 1.0 / denominator
        denominator = None
    grad = torch.is_grad_enabled()
    needed = [grad and x is not None and x.requires_grad for x in (student, weight, third)]
    return row_weight, denominator, factor, needed


def over(value: torch.Tensor, factor: float, denominator: torch.Tensor | None) -> torch.Tensor:
    """factor * value / denominator, 0 where the denominator is 0."""
    if denominator is None:
        return value * factor
    return torch.where(denominator == 0, 0.0, value * factor / denominator).to(value.dtype)


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

# ------------------------------------------------- statistics: mean(Z) = P mean(X) and var(Z)_j = p_j Cov(X) p_jᵀ need
# no pass over Z, only these sums over the rows. Sums, not means, so that they can be added over ranks.


def student_sum(student: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:
    """Σ_n w_n x_n: (N, S), (N,) or None -> (S,) in float32 (float64 for float64), differentiable in student."""
    return torch.ops.vkd_kernels.student_sum.default(student, row_weight)


def student_scatter(student: torch.Tensor, row_weight: torch.Tensor | None, mean: torch.Tensor) -> torch.Tensor:
    """Σ_n w_n (x_n - mean)(x_n - mean)ᵀ: (N, S), (N,) or None, (S,) -> (S, S) in float32 (float64 for float64).

    Differentiable in student and mean. Centred before the product and never in TF32: sound when |mean| >> std.
    """
    return torch.ops.vkd_kernels.student_scatter.default(student, row_weight, mean)


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


def _chunks(x: torch.Tensor, row_weight, temporaries: int):
    """(rows, their weights or None) in chunks whose float32 temporaries fit the workspace."""
    step = even_chunk(x.shape[0], WORKSPACE_BYTES // (temporaries * x.shape[1] * accumulator_dtype(x.dtype).itemsize))
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
        total += weighted_(x[rows].to(exact, copy=True), w).sum(0)
    return total


def _sum_backward(grad, row_weight, n, dtype):
    if row_weight is None:
        return grad.to(dtype).expand(n, -1).contiguous()
    return torch.mul(row_weight[:, None], grad, out=grad.new_empty((n, grad.shape[0]), dtype=dtype))


def _centred(x, mean, w):
    """Rows of x minus the mean, rows of weight 0 as zeros."""
    return without_rows(x.to(mean.dtype) - mean, w)


def _scatter(x, row_weight, mean):
    operand = operand_dtype(x)
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
                total += product(both.T, both).view(2, s, 2, s).sum((0, 2))
    return total


def _scatter_backward(grad, x, row_weight, mean):
    """dX_n = w_n (C + Cᵀ)(x_n - m) and dm = -Σ_n dX_n for the incoming C."""
    # float16 would underflow: incoming gradients carry 1 / (N T).
    operand = operand_dtype(x) if x.dtype == torch.bfloat16 else accumulator_dtype(x.dtype)
    symmetric = (grad + grad.T).to(operand)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dm = torch.zeros_like(mean)
    with _Ieee():
        for rows, w in _chunks(x, row_weight, 3):
            d = weighted_(product(_centred(x[rows], mean, w).to(operand), symmetric), w)
            dx[rows] = d
            dm -= d.sum(0)
    return dx, dm


def _centred_square_sum(x, row_weight, mean):
    total = torch.zeros_like(mean)
    for rows, w in _chunks(x, row_weight, 2):
        total += weighted_((x[rows].to(mean.dtype) - mean).square_(), w).sum(0)
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
    dx, dm = torch.ops.vkd_kernels.student_scatter_backward.default(grad, *ctx.saved_tensors)
    return dx, None, dm


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
    "student_scatter_backward", "(Tensor grad, Tensor student, Tensor? row_weight, Tensor mean) -> (Tensor, Tensor)",
    _scatter_backward,
    lambda grad, x, w, mean: (torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(mean)),
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
