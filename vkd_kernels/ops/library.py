"""How an operator of this package is declared: a typed function becomes ``torch.ops.vkd_kernels.<name>``.

    @operator(shapes=_shapes)                                   # the schema is read off the annotations
    def chunked_loss(student: torch.Tensor, ..., eps: float) -> tuple[torch.Tensor, torch.Tensor]: ...

    differentiable(chunked_loss, save=_save, backward=_backward)
    refuses_gradients(chunked_loss_backward, "what to use instead")

An operator is opaque to torch.compile, which knows its shapes, and its gradient is one autograd node.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

NAMESPACE = "vkd_kernels"
library = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(*, shapes: Callable[..., Any]) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Declares the function that follows as an operator of its name, for every device, and returns the operator.

    ``shapes`` takes the same arguments and returns empty outputs. The function must neither change its arguments nor
    return any of them, and it is called with autograd switched off.
    """

    def declare(function: Callable[..., Any]) -> torch._ops.OpOverload:
        name = function.__name__
        library.define(
            name + torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
        )
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=library)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return declare


def differentiable(
    op: torch._ops.OpOverload,
    *,
    save: Callable[[Any, dict[str, Any], Any], None],
    backward: Callable[..., dict[str, Any]],
) -> None:
    """Gives an operator its gradient: ``save(ctx, inputs, output)`` after the forward pass, inputs by their names, and
    ``backward(ctx, *grad_outputs) -> {name of an input: its gradient}``, called where there is a gradient at all.

    This is what torch.library.register_autograd does, which takes 40 µs longer a call for a loss's 17 arguments: 60
    against 17 µs forward in results/cpu/operators.json, measured by benchmarks/bench_operators.py. A list of tensors
    as the first argument has a list of gradients.
    """
    names = [argument.name for argument in op._schema.arguments]

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, count: int | None, *flat: Any) -> Any:  # autograd wants to see the tensors of a list
            inputs = flat if count is None else (list(flat[:count]), *flat[count:])
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            ctx.set_materialize_grads(False)
            ctx.count = count
            save(ctx, dict(zip(names, inputs, strict=False)), output)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> Any:
            if all(grad is None for grad in grad_outputs):
                return (None,) * len(ctx.needs_input_grad)
            gradients = backward(ctx, *grad_outputs)
            first = gradients.get(names[0])
            leading = [first] if ctx.count is None else first or [None] * ctx.count
            rest = [gradients.get(name) for name in names[1:]]
            return None, *leading, *rest[: len(ctx.needs_input_grad) - 1 - len(leading)]

    def call(first: torch.Tensor | Sequence[torch.Tensor], *others: Any) -> Any:
        if isinstance(first, torch.Tensor):
            return Differentiable.apply(None, first, *others)
        return Differentiable.apply(len(first), *first, *others)

    library.impl(op._schema.name.split("::")[1], call, "Autograd")


def refuses_gradients(op: torch._ops.OpOverload, message: str) -> None:
    """A gradient through the operator, which is a backward pass itself, is a RuntimeError with this message."""

    def refuse(ctx: Any, *grad_outputs: torch.Tensor | None) -> dict[str, Any]:
        raise RuntimeError(message)

    differentiable(op, save=lambda ctx, inputs, output: None, backward=refuse)
