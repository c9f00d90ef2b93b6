"""How an operator of this package is declared: a typed function becomes ``torch.ops.vkd_kernels.<name>``.

    @operator(shapes=_shapes)                                   # the schema is read off the annotations
    def chunked_loss(*, student: torch.Tensor, ..., eps: float) -> tuple[torch.Tensor, torch.Tensor]: ...

    differentiable(chunked_loss, save=_save, backward=_backward)
    refuses_gradients(chunked_loss_backward, "what to use instead")

An operator is opaque to torch.compile, which knows its shapes, and its gradient is one autograd node.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

NAMESPACE = "vkd_kernels"
library = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(*, shapes: Callable[..., Any]) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Declares the function that follows as an operator of its name, for every device, and returns the operator.

    The function takes its arguments by name (``*``), as do ``shapes``, which returns empty outputs, and the operator
    itself. It must neither change its arguments nor return any of them. Autograd is off where it runs.
    """

    def declare(function: Callable[..., Any]) -> torch._ops.OpOverload:
        name = function.__name__
        names = [*inspect.signature(function).parameters]
        implementation = by_position(function)

        def fake(*inputs: Any) -> Any:
            return shapes(**dict(zip(names, inputs, strict=False)))

        schema = torch.library.infer_schema(implementation, mutates_args=())
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return declare


def by_position(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose arguments have names alone (``*``), as PyTorch's dispatcher calls it: by position."""
    signature = inspect.signature(function)
    names = [*signature.parameters]

    def implementation(*inputs: Any) -> Any:
        return function(**dict(zip(names, inputs, strict=False)))

    positional = [p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in signature.parameters.values()]
    implementation.__signature__ = signature.replace(parameters=positional)  # type: ignore[attr-defined]
    return implementation


def needs_gradient(*tensors: torch.Tensor | float | None) -> bool:
    """Whether a gradient in any of them will be asked for."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


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
        if not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                return op(first, *others)
        if isinstance(first, torch.Tensor):
            return Differentiable.apply(None, first, *others)
        return Differentiable.apply(len(first), *first, *others)

    library.impl(op._schema.name.split("::")[1], call, "Autograd")


def refuses_gradients(op: torch._ops.OpOverload, message: str) -> None:
    """A gradient through the operator, which is a backward pass itself, is a RuntimeError with this message."""

    def refuse(ctx: Any, *grad_outputs: torch.Tensor | None) -> dict[str, Any]:
        raise RuntimeError(message)

    differentiable(op, save=lambda ctx, inputs, output: None, backward=refuse)
