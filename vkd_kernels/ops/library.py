"""How an operator of this package is declared: a typed function becomes ``torch.ops.vkd_kernels.<name>``.

    @operator(shapes=_shapes)                                   # the schema is read off the annotations
    def chunked_loss(*, student: torch.Tensor, ..., eps: float) -> tuple[torch.Tensor, torch.Tensor]: ...

    differentiable(chunked_loss, save=_save, backward=_backward)
    refuses_gradients(chunked_loss_backward, "what to use instead")

An operator is opaque to torch.compile, which knows its shapes, and its gradient is one autograd node. Where nobody but
autograd looks on, its function is called without PyTorch's dispatcher, whose conversion of arguments costs host time.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

NAMESPACE = "vkd_kernels"
library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Operator:
    """A function that is an operator as well; called by keyword, as both are."""

    def __init__(self, function: Callable[..., Any], overload: torch._ops.OpOverload) -> None:
        self.function, self.overload = function, overload
        self.name = function.__name__
        self.arguments = [argument.name for argument in overload._schema.arguments]
        self.tensors = [argument.name for argument in overload._schema.arguments if "Tensor" in str(argument.type)]
        self.node: type[torch.autograd.Function] | None = None  # made by ``differentiable``

    def __call__(self, **inputs: Any) -> Any:
        if not CAN_TELL or torch.compiler.is_compiling() or _is_watched():
            return self.overload(**inputs)
        names, tensors = self.tensors_of(inputs)
        for tensor in tensors:
            if not _is_plain(tensor):
                return self.overload(**inputs)
        return self.run(self.function, inputs, names, tensors)

    def dispatched(self, *inputs: Any) -> Any:
        """What PyTorch's dispatcher calls for autograd, by position."""
        by_name = dict(zip(self.arguments, inputs, strict=False))
        return self.run(self.overload, by_name, *self.tensors_of(by_name))

    def tensors_of(self, inputs: dict[str, Any]) -> tuple[list[str], list[torch.Tensor]]:
        """The tensors among the inputs, also those of a list, as autograd wants to see them, and the inputs' names."""
        names: list[str] = []
        tensors: list[torch.Tensor] = []
        for name in self.tensors:
            value = inputs.get(name)
            if isinstance(value, (list, tuple)):
                names += [name] * len(value)
                tensors += value
            elif value is not None:
                names.append(name)
                tensors.append(value)
        return names, tensors

    def run(
        self, compute: Callable[..., Any], inputs: dict[str, Any], names: list[str], tensors: list[torch.Tensor]
    ) -> Any:
        """``compute``, the function or the operator, with its gradient where there may be one."""
        if has_tangent(tensors):  # which would be lost without a word where gradients are off
            raise NotImplementedError(
                f"{NAMESPACE}::{self.name} has no forward-mode derivative (jvp): what calls it has one with "
                'backend="torch", or VKD_KERNELS_BACKEND=torch'
            )
        if self.node is None or not torch.is_grad_enabled():
            with _BelowAutograd():
                return compute(**inputs)
        return self.node.apply(compute, inputs, names, *tensors)


# Looked up once: an operator is called for every loss. They are private to PyTorch: where a version has moved one,
# every call takes the dispatcher.
try:
    _BelowAutograd = torch._C._AutoDispatchBelowAutograd
    _dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
    _transforms_active, _tracing_state = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
    _is_profiling, _is_batched = torch.autograd._profiler_enabled, torch._C._functorch.is_legacy_batchedtensor
    _is_zero = torch.Tensor._is_zerotensor
    CAN_TELL = True
except AttributeError:
    CAN_TELL = False
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def has_tangent(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether one is a dual number of ``torch.autograd.forward_ad``, of whose tangent an operator knows nothing.

    While torch.compile traces, that can't be seen: any tensor may be one where dual numbers are in use at all.
    """
    if getattr(forward_ad, "_current_level", 0) < 0:  # as nearly always; looking costs 12 µs a tensor
        return False
    return torch.compiler.is_compiling() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _is_watched() -> bool:
    """Whether a mode, a transform, a tracer or a profiler has to see the operator."""
    return bool(
        _dispatch_modes()
        or _function_modes()
        or _transforms_active()
        or _tracing_state() is not None
        or _is_profiling()
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the dispatcher, too, would hand the function this tensor as it is."""
    kind = type(tensor)
    return (kind is _Tensor or kind is _Parameter) and not (
        tensor.is_meta
        or tensor.is_neg()  # a negation that is yet to come: the gradient of an imaginary part may be one
        or _is_zero(tensor)  # in no memory
        or _is_batched(tensor)  # torch.autograd.grad(..., is_grads_batched=True)
    )


def is_free_to_read(tensor: torch.Tensor) -> bool:
    """Whether looking at its values stalls nothing and tells something: on a CPU, in plain eager mode."""
    plain = CAN_TELL and not torch.compiler.is_compiling() and not _is_watched()
    return plain and tensor.device.type == "cpu" and _is_plain(tensor)


def operator(*, shapes: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operator]:
    """Declares the function that follows as an operator of its name, for every device.

    The function takes its arguments by name (``*``), as do ``shapes``, which returns empty outputs, and the operator
    itself. It must neither change its arguments nor return any of them. Autograd is off where it runs.
    """

    def declare(function: Callable[..., Any]) -> Operator:
        name = function.__name__
        names = [*inspect.signature(function).parameters]
        implementation = by_position(function)

        def fake(*inputs: Any) -> Any:
            return shapes(**dict(zip(names, inputs, strict=False)))

        schema = torch.library.infer_schema(implementation, mutates_args=())
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        return Operator(function, getattr(getattr(torch.ops, NAMESPACE), name).default)

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
    if torch.is_grad_enabled():
        for x in tensors:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                return True
    return False


def differentiable(
    op: Operator,
    *,
    save: Callable[[Any, dict[str, Any], Any], None],
    backward: Callable[..., dict[str, Any]],
) -> None:
    """Gives an operator its gradient: ``save(ctx, inputs, output)`` after the forward pass, inputs by their names, and
    ``backward(ctx, *grad_outputs) -> {name of an input: its gradient}``, called where there is a gradient at all.

    This is what torch.library.register_autograd does, which takes 90 µs longer a call for 17 arguments: 132 against
    42 µs forward in results/cpu/operators.json, measured by benchmarks/bench_operators.py. A list of tensors has a list
    of gradients. Where PyTorch has moved a private name, register_autograd serves.
    """
    if not CAN_TELL:
        _register_autograd(op, save=save, backward=backward)
        return

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, compute: Callable[..., Any], inputs: dict[str, Any], names: list[str], *tensors: torch.Tensor
        ) -> Any:
            with _BelowAutograd():
                output = compute(**inputs)
            ctx.set_materialize_grads(False)
            ctx.input_names = names
            save(ctx, inputs, output)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> Any:
            if all(grad is None for grad in grad_outputs):
                return (None,) * len(ctx.needs_input_grad)
            gradients = backward(ctx, *grad_outputs)
            flat = []
            for name in ctx.input_names:
                gradient = gradients.get(name)
                flat.append(gradient.pop(0) if isinstance(gradient, list) else gradient)
            return None, None, None, *flat

    op.node = type(op.name, (Differentiable,), {})  # profiles and grad_fn show the name
    library.impl(op.name, op.dispatched, "Autograd")


def _register_autograd(
    op: Operator,
    *,
    save: Callable[[Any, dict[str, Any], Any], None],
    backward: Callable[..., dict[str, Any]],
) -> None:
    """``differentiable`` by what PyTorch documents."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, dict(zip(op.arguments, inputs, strict=True)), output)

    def gradients(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[Any, ...]:
        by_name = backward(ctx, *grad_outputs) if any(grad is not None for grad in grad_outputs) else {}
        return tuple(by_name.get(name) for name in op.arguments)

    torch.library.register_autograd(f"{NAMESPACE}::{op.name}", gradients, setup_context=setup_context, lib=library)


def refuses_gradients(op: Operator, message: str) -> None:
    """A gradient through the operator, which is a backward pass itself, is a RuntimeError with this message."""

    def refuse(ctx: Any, *grad_outputs: torch.Tensor | None) -> dict[str, Any]:
        raise RuntimeError(message)

    differentiable(op, save=lambda ctx, inputs, output: None, backward=refuse)
