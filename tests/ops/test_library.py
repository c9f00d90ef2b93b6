"""Operators: their function is called where only autograd looks on, PyTorch's dispatcher where something else does."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import processes
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
    assert not grad.is_neg() and not grad._is_zerotensor()  # a kernel would read what lies in memory
    return grad * weight


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs["weight"], *inputs["xs"])
    ctx.factor = inputs["factor"]


def _backward(ctx, grad, grad_sum):
    weight, *xs = ctx.saved_tensors
    grad_x = ctx.factor * scaled_sum_for_a_test_backward(grad=grad, weight=weight)
    return {"xs": [grad_x.clone() for _ in xs], "weight": ctx.factor * grad * sum(xs)}


library.differentiable(scaled_sum_for_a_test, save=_save, backward=_backward)
library.refuses_gradients(scaled_sum_for_a_test_backward, "no second order")
OVERLOAD = torch.ops.vkd_kernels.scaled_sum_for_a_test.default
NAME = "vkd_kernels::scaled_sum_for_a_test"


@pytest.fixture
def arguments():
    return {
        "xs": [torch.randn(3, requires_grad=True), torch.randn(3)],
        "weight": torch.nn.Parameter(torch.randn(3)),
        "factor": 0.5,
    }


@pytest.fixture
def dispatched(monkeypatch):
    """The operators that went through the dispatcher."""
    names = set()

    def noted(name, overload):
        def call(**inputs):
            names.add(name)
            return overload(**inputs)

        return call

    for name, op in (("forward", scaled_sum_for_a_test), ("backward", scaled_sum_for_a_test_backward)):
        monkeypatch.setattr(op, "overload", noted(name, op.overload))
    return names


def of_vector(x):
    """A function of one tensor, as transforms and tracers take it."""
    return scaled_sum_for_a_test(xs=[x], weight=torch.arange(1.0, 4.0), factor=0.5)[0].sin()


# ------------------------------------------------------------------------------------------------------ nobody looks on


def saved_by_hooks():
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor)


@pytest.mark.parametrize(
    "context", [nullcontext, saved_by_hooks, lambda: torch.autocast("cpu")], ids=["plain", "hooks", "autocast"]
)
def test_a_plain_call_equals_the_operator(arguments, dispatched, context):
    leaves = [arguments["xs"][0], arguments["weight"]]
    upstream = torch.randn(3)

    def results(call):
        with context():
            product, total = call(**arguments)
        first = torch.autograd.grad(product, leaves, upstream, retain_graph=True)
        return product, total, *first, *torch.autograd.grad(product, leaves, upstream)

    plain = results(scaled_sum_for_a_test)
    assert not dispatched
    assert all(torch.equal(a, b) for a, b in zip(plain, results(OVERLOAD), strict=True))


def test_a_hook_has_every_saved_tensor(arguments):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor
    ):
        scaled_sum_for_a_test(**arguments)
    assert [torch.equal(a, b) for a, b in zip(packed, [arguments["weight"], *arguments["xs"]], strict=True)] == 3 * [
        True
    ]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(arguments, use_reentrant):
    leaves = arguments["xs"][0], arguments["weight"]

    def product(x, weight):
        return scaled_sum_for_a_test(xs=[x], weight=weight, factor=0.5)[0].sin().sum()

    product(*leaves).backward()
    plain = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint(product, *leaves, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, plain, strict=True))


def test_a_second_derivative_is_refused(arguments):
    product, _ = scaled_sum_for_a_test(**arguments)
    (grad,) = torch.autograd.grad(product.sum(), arguments["xs"][0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second order"):
        torch.autograd.grad(grad.sum(), arguments["weight"])


def test_without_gradients_there_is_no_graph(arguments, dispatched):
    with torch.no_grad():
        assert scaled_sum_for_a_test(**arguments)[0].grad_fn is None
    with torch.inference_mode():
        assert scaled_sum_for_a_test(**arguments)[0].is_inference()
    constants = {"xs": [torch.ones(3)], "weight": torch.ones(3), "factor": 1.0}
    assert scaled_sum_for_a_test(**constants)[0].grad_fn is None
    assert not dispatched


def test_a_node_has_the_name_of_its_operator(arguments):
    assert scaled_sum_for_a_test(**arguments)[0].grad_fn.name() == "scaled_sum_for_a_testBackward"


@pytest.mark.parametrize(
    "place, name", [("_C._functorch", "is_legacy_batchedtensor"), ("_C", "_AutoDispatchBelowAutograd")]
)
def test_where_pytorch_has_moved_a_private_name_the_dispatcher_serves(place, name):
    """PyTorch itself needs them: they are gone for the import alone."""
    program = (
        f"import torch; place, name = torch.{place}, {name!r}; value = getattr(place, name); delattr(place, name)\n"
        "import vkd_kernels as vk; setattr(place, name, value)\n"
        "from tests.ops import test_library as ops\n"
        "from vkd_kernels.ops import library\n"
        "from vkd_kernels.ops.ortho_proj_loss import dispatch\n"
        "assert not library.CAN_TELL\n"
        "weight = torch.randn(9, 3, requires_grad=True)\n"
        "vk.cayley(weight).sum().backward()\n"
        "losses = []\n"
        "for dispatch.CHUNKED_FROM in (2**40, -1):\n"
        "    torch.manual_seed(0)\n"
        "    x, y, leaf = torch.randn(7, 3), torch.randn(7, 9), weight.detach().clone().requires_grad_()\n"
        "    value = vk.functional.ortho_proj_loss(x, y, leaf, normalization='batch_norm')\n"
        "    losses.append([value, *torch.autograd.grad(value, leaf)])\n"
        "torch.testing.assert_close(*losses)\n"
        "x = torch.randn(3, requires_grad=True)\n"
        "value, _ = ops.scaled_sum_for_a_test(xs=[x, torch.ones(3)], weight=torch.full((3,), 2.0), factor=0.5)\n"
        "(grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)\n"
        "assert torch.equal(grad, torch.ones(3))\n"
    )
    ended = processes.run_python("-c", program, seconds=300)
    assert ended.returncode == 0, ended.stderr


# ------------------------------------------------------------------------------------------------- something looks on


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name() if isinstance(func, torch._ops.OpOverload) else str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_operators(arguments):
    with Dispatched() as mode:
        product, _ = scaled_sum_for_a_test(**arguments)
        product.sum().backward()
    assert {NAME, f"{NAME}_backward"} <= set(mode.names)


def test_function_modes_see_the_operator(arguments):
    with Called() as mode:
        scaled_sum_for_a_test(**arguments)
    assert NAME in mode.names


def test_flops_are_counted(arguments):
    formulas = {torch.ops.vkd_kernels.scaled_sum_for_a_test: lambda *shapes, **options: 7}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        scaled_sum_for_a_test(**arguments)
    assert counter.get_total_flops() == 7


def test_profiles_show_the_operator(arguments):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scaled_sum_for_a_test(**arguments)[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {NAME, f"{NAME}_backward", "scaled_sum_for_a_testBackward"} <= names


class Traced(torch.Tensor):
    """A subclass that keeps what is called with it."""

    names: list[str] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(func.name() if isinstance(func, torch._ops.OpOverload) else str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("place", ["weight", "xs"])
def test_subclasses_see_the_operator(arguments, place):
    Traced.names.clear()
    subclass = torch.randn(3).as_subclass(Traced)
    arguments[place] = [arguments["xs"][0], subclass] if place == "xs" else subclass
    scaled_sum_for_a_test(**arguments)
    assert NAME in Traced.names


def test_fake_tensors_take_its_shapes(arguments):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        product, total = scaled_sum_for_a_test(**arguments)
        assert product.shape == (3,) and total.shape == ()
        fake = {"xs": [mode.from_tensor(x) for x in arguments["xs"]], "weight": mode.from_tensor(arguments["weight"])}
    product, _ = scaled_sum_for_a_test(**fake, factor=2.0)  # outside of their mode
    assert type(product) is not torch.Tensor


def test_meta_tensors_take_its_shapes(dispatched):
    meta = torch.empty(3, device="meta")
    product, _ = scaled_sum_for_a_test(xs=[meta], weight=meta, factor=1.0)
    assert product.is_meta and dispatched == {"forward"}


def test_lazy_tensors_are_made_real(arguments):
    """Negations and zeros of PyTorch that stand in no memory: a kernel would read something else."""
    product, _ = scaled_sum_for_a_test(**arguments)
    upstream = torch.randn(3)
    leaves = [arguments["xs"][0], arguments["weight"]]
    expected = torch.autograd.grad(product, leaves, -upstream, retain_graph=True)
    # _neg_view gives what the gradient of an imaginary part may be: see torch.Tensor.is_neg.
    negated = torch.autograd.grad(product, leaves, torch._neg_view(upstream), retain_graph=True)
    zeros = torch.autograd.grad(product, leaves, torch._efficientzerotensor(3), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(negated, expected, strict=True))
    assert all(not grad.any() for grad in zeros)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_traces_the_operator(pre_dispatch):
    graph = make_fx(of_vector, pre_dispatch=pre_dispatch)(torch.randn(3)).graph
    assert OVERLOAD in [node.target for node in graph.nodes]


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_operator(strict):
    class OfVector(torch.nn.Module):
        def forward(self, x):
            return of_vector(x)

    x = torch.randn(3)
    program = torch.export.export(OfVector(), (x,), strict=strict)
    assert OVERLOAD in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(x), of_vector(x))


def test_a_trace_keeps_the_operator():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        trace = torch.jit.trace(of_vector, torch.randn(3))
    assert NAME in str(trace.graph)


def test_compiled_it_is_one_node_of_a_full_graph(arguments):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda **inputs: scaled_sum_for_a_test(**inputs)[0].sin(), backend=backend, fullgraph=True)
    assert torch.equal(compiled(**arguments), scaled_sum_for_a_test(**arguments)[0].sin())
    assert OVERLOAD in [node.target for node in graphs[0].graph.nodes]


def test_gradients_of_the_compiled_function(arguments):
    leaves = [arguments["xs"][0], arguments["weight"]]
    compiled = torch.compile(
        lambda **inputs: scaled_sum_for_a_test(**inputs)[0].sin().sum(), backend="aot_eager", fullgraph=True
    )
    grads = torch.autograd.grad(compiled(**arguments), leaves)
    plain = torch.autograd.grad(scaled_sum_for_a_test(**arguments)[0].sin().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


def test_compiled_autograd(arguments):
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    leaves = [arguments["xs"][0], arguments["weight"]]
    plain = torch.autograd.grad(scaled_sum_for_a_test(**arguments)[0].sin().sum(), leaves)
    total = scaled_sum_for_a_test(**arguments)[0].sin().sum()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        total.backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, plain, strict=True))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap], ids=["grad", "vmap"])
def test_transforms_get_pytorch_s_own_answer(dispatched, transform):
    """Which is an error: ortho_proj_loss and cayley take the reference under torch.func."""
    x = torch.randn(3) if transform is torch.func.grad else torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="setup_context|[Bb]atching rule"):
        transform(lambda x: of_vector(x).sum())(x)
    assert "forward" in dispatched


def test_batched_gradients(dispatched):
    """is_grads_batched calls the backward pass under vmap."""
    x = torch.randn(3, requires_grad=True)
    (jacobian,) = torch.autograd.grad(of_vector(x), x, torch.eye(3), is_grads_batched=True)
    expected = [torch.autograd.grad(of_vector(x), x, row)[0] for row in torch.eye(3)]
    assert torch.equal(jacobian, torch.stack(expected))
    assert "backward" in dispatched


def test_forward_mode_is_refused():
    """Also where gradients are off, and the tangent would be gone without a word."""
    inputs = {"weight": torch.ones(3), "factor": 0.5}
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(3), torch.randn(3))
        for call in (scaled_sum_for_a_test, OVERLOAD):
            for enabled in (True, False):
                with torch.set_grad_enabled(enabled):
                    with pytest.raises(NotImplementedError, match=f"{NAME} has no forward-mode .*jvp.*backend="):
                        call(xs=[dual], **inputs)
                    call(xs=[dual.detach()], **inputs)
