"""Operators: their function is called where only autograd looks on, PyTorch's dispatcher where something else does."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vkd_kernels.ops import library


def _shapes(*, xs: list[torch.Tensor], weight: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(weight), weight.new_empty(())


@library.operator(shapes=_shapes)
def scaled_sum_for_a_test(
    *, xs: list[torch.Tensor], weight: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor · weight · Σ xs, the sum of it)."""
    product = factor * weight * torch.stack(xs).sum(0)
    return product, product.sum()


@library.operator(shapes=lambda *, grad, weight: torch.empty_like(grad))
def scaled_sum_for_a_test_backward(*, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return grad * weight


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs["weight"], *inputs["xs"])
    ctx.factor = inputs["factor"]


def _backward(ctx, grad, grad_sum):
    weight, *xs = ctx.saved_tensors
    grad_x = scaled_sum_for_a_test_backward(grad=ctx.factor * grad, weight=weight)
    return {"xs": [grad_x.clone() for _ in xs], "weight": ctx.factor * grad * sum(xs)}


library.differentiable(scaled_sum_for_a_test, save=_save, backward=_backward)
library.refuses_gradients(scaled_sum_for_a_test_backward, "no second order")


@pytest.fixture
def arguments():
    return {
        "xs": [torch.randn(3, requires_grad=True), torch.randn(3)],
        "weight": torch.nn.Parameter(torch.randn(3)),
        "factor": 0.5,
    }


class Names(TorchDispatchMode):
    """Keeps the names of the operators that pass through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_plain_call_equals_the_operator(arguments):
    leaves = [arguments["xs"][0], arguments["weight"]]
    upstream = torch.randn(3)
    results = []
    for call in (scaled_sum_for_a_test, torch.ops.vkd_kernels.scaled_sum_for_a_test.default):
        product, total = call(**arguments)
        first = torch.autograd.grad(product, leaves, upstream, retain_graph=True)
        again = torch.autograd.grad(product, leaves, upstream)
        results.append((product, total, *first, *again))
    for plain, dispatched in zip(*results, strict=True):
        assert torch.equal(plain, dispatched)


def test_a_second_derivative_is_refused(arguments):
    product, _ = scaled_sum_for_a_test(**arguments)
    (grad,) = torch.autograd.grad(product.sum(), arguments["xs"][0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second order"):
        torch.autograd.grad(grad.sum(), arguments["weight"])


def test_without_gradients_there_is_no_graph(arguments):
    with torch.no_grad():
        assert scaled_sum_for_a_test(**arguments)[0].grad_fn is None
    with torch.inference_mode():
        assert scaled_sum_for_a_test(**arguments)[0].is_inference()


def test_modes_see_the_operator(arguments):
    with Names() as mode:
        product, _ = scaled_sum_for_a_test(**arguments)
        product.sum().backward()
    assert "vkd_kernels::scaled_sum_for_a_test" in mode.names
    assert "vkd_kernels::scaled_sum_for_a_test_backward" in mode.names


def test_fake_tensors_take_its_shapes(arguments):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        product, total = scaled_sum_for_a_test(**arguments)
        assert product.shape == (3,) and total.shape == ()
        fake = {"xs": [mode.from_tensor(x) for x in arguments["xs"]], "weight": mode.from_tensor(arguments["weight"])}
    product, _ = scaled_sum_for_a_test(**fake, factor=2.0)  # a subclass of tensors, outside of its mode
    assert type(product) is not torch.Tensor


def test_compiled_it_is_one_node_of_a_full_graph(arguments):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda **inputs: scaled_sum_for_a_test(**inputs)[0].sin(), backend=backend, fullgraph=True)
    assert torch.equal(compiled(**arguments), scaled_sum_for_a_test(**arguments)[0].sin())
    targets = [node.target for node in graphs[0].graph.nodes]
    assert torch.ops.vkd_kernels.scaled_sum_for_a_test.default in targets


def test_a_trace_keeps_it():
    weight = torch.randn(3)
    trace = torch.jit.trace(lambda x: scaled_sum_for_a_test(xs=[x], weight=weight, factor=1.0)[0], torch.randn(3))
    assert "vkd_kernels::scaled_sum_for_a_test" in str(trace.graph)
