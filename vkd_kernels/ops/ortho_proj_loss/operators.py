"""What chunked.py, statistics.py and triton/launch.py tell torch.library: operators, their autograd, their shapes.

A loss operator returns the loss and the unscaled gradients that are needed; its backward, an operator too, multiplies
them by the incoming gradient into new tensors and refuses to be differentiated itself.
"""

import torch

NO_SECOND_ORDER = (
    "this backend of ortho_proj_loss has no second-order gradient: "
    'use ortho_proj_loss(..., backend="torch") or VKD_KERNELS_BACKEND=torch'
)

library = torch.library.Library("vkd_kernels", "FRAGMENT")


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


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """How the unscaled dX is kept: float16 would overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def define(name: str, schema: str, forward, fake) -> None:
    """One operator for every device: its schema, its implementation and its shapes."""
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vkd_kernels::{name}", fake, lib=library)


def differentiate(name: str, save, backward) -> None:
    """Autograd of an operator: save(ctx, inputs, output) after the forward pass, backward(ctx, *grads) -> gradients.

    What torch.library.register_autograd does, which costs 70 µs a call on the host with as many arguments as here.
    A list of tensors in place of the first argument has a list of gradients.
    """
    op = getattr(torch.ops.vkd_kernels, name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, count, *inputs):  # count of the list's tensors, which autograd wants to see one by one
            if count is not None:
                inputs = (list(inputs[:count]), *inputs[count:])
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            ctx.set_materialize_grads(False)
            ctx.count = count
            save(ctx, inputs, output)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx, *grads):
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            first, *others = backward(ctx, *grads)
            return None, *([first] if ctx.count is None else first), *others

    def call(first, *others):
        if isinstance(first, torch.Tensor):
            return Differentiable.apply(None, first, *others)
        return Differentiable.apply(len(first), *first, *others)

    library.impl(name, call, "Autograd")


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


def balanced(student, row_weight, denominator):
    """Row weights in [0, 1] for float16 (with the denominator to match), so that tiny ones do not underflow in G."""
    if row_weight is None or student.dtype != torch.float16 or student.shape[0] == 0:
        return row_weight, denominator
    largest = row_weight.amax().clamp_min(torch.finfo(row_weight.dtype).tiny)
    return row_weight / largest, denominator / largest


def factor(denominator: float) -> float:
    return 0.0 if denominator == 0 else 1.0 / denominator


def needed(students, weight, third) -> list[bool]:
    """Which gradients are needed: of any student, the weight, the third."""
    students = any(x.requires_grad for x in students)
    others = [x is not None and x.requires_grad for x in (weight, third)]
    return [torch.is_grad_enabled() and need for need in (students, *others)]


def operands(student, weight, third, row_weight, denominator):
    """What every loss op is called with, worked out from the arguments of chunked_loss: which gradients are needed,
    and the denominator as (0-d tensor or None, factor). A denominator of 0 makes loss and gradients 0."""
    row_weight, denominator = balanced(student, row_weight, denominator)
    needs = needed([student], weight, third)
    if isinstance(denominator, torch.Tensor):
        return row_weight, denominator, 1.0, needs
    return row_weight, None, factor(denominator), needs


def parts(tensors, sizes: list[int]) -> list[tuple]:
    """[(a[:n], b[:n], ...), (a[n:n + m], ...), ...] of tensors or Nones, for sizes n, m, ... of the first dimension."""
    return list(zip(*([None] * len(sizes) if x is None else x.split(sizes) for x in tensors), strict=True))


def by_level(weight, *tensors):
    """(weight, other, ...) of each of G losses, for a weight (G, T, S) and tensors (G, ...) or None; the arguments
    themselves, once, for the weight (T, S) of one loss."""
    if weight.dim() == 2:
        return [(weight, *tensors)]
    count = weight.shape[0]
    return zip(*([None] * count if x is None else x.unbind(0) for x in (weight, *tensors)), strict=True)


def together(weight, losses):
    """(G,) of the G losses of a weight (G, T, S), or the one of (T, S)."""
    return losses[0] if weight.dim() == 2 else torch.stack(losses)


def loss_by_loss(loss):
    """The loss (contract of chunked_loss) of each of G lists' entries, one after the other, as one function."""

    def losses(students, teachers, weight, bias, row_weights, shift, scale, *, denominators, **options):
        return together(weight, [
            loss(x, y, p, b, w, here, factor, denominator=denominator, **options)
            for x, y, w, denominator, (p, b, here, factor) in zip(
                students, teachers, row_weights, denominators, by_level(weight, bias, shift, scale), strict=True)
        ])  # fmt: skip

    return losses


def mse_by_mse(mse):
    """The loss (contract of orthonormal_mse) of each of G lists' entries, one after the other, as one function."""

    def mses(students, teachers, weight, row_weights, *, scale, denominators, **options):
        each = scale if isinstance(scale, torch.Tensor) and scale.dim() else [scale] * len(students)
        return together(weight, [
            mse(x, y, p, w, scale=c, denominator=denominator, **options)
            for x, y, (p,), w, c, denominator in zip(
                students, teachers, by_level(weight), row_weights, each, denominators, strict=True)
        ])  # fmt: skip

    return mses


def over(value: torch.Tensor, factor: float, denominator: torch.Tensor | None) -> torch.Tensor:
    """factor * value / denominator, 0 where the denominator is 0."""
    if denominator is None:
        return value * factor
    return torch.where(denominator == 0, 0.0, value * factor / denominator).to(value.dtype)


def call_orthonormal_mse(
    op, student, teacher, weight, row_weight, scale, layer_norm, eps, denominator, workspace_bytes
):
    if not isinstance(scale, torch.Tensor):
        scale = student.new_full((), scale, dtype=accumulator_dtype(student.dtype))
    row_weight, denominator, factor, needed = operands(student, weight, scale, row_weight, denominator)
    return op(
        student, teacher, weight, scale, row_weight, denominator, factor, layer_norm, eps, workspace_bytes, *needed
    )[0]


def moment_gradients(grads, mean):
    """The incoming gradients of sums and scatters, zeros for those that there are not."""
    shapes = mean.shape, (*mean.shape, mean.shape[-1])
    return [mean.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, shapes, strict=True)]
