"""OrthogonalLinear and orthogonal(): invariants, assignment, parity with PyTorch's parametrization, copies."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import vkd_kernels as vk
from vkd_kernels.projection import make_projection, stacked_weights

MAPS = ["cayley", "matrix_exp", "householder"]
SHAPES = [(9, 4), (5, 5), (3, 8), (1, 1)]


def orthogonality_error(p):
    p = p.detach().double()
    p = p if p.shape[-2] >= p.shape[-1] else p.mT
    return (p.mT @ p - torch.eye(p.shape[-1])).abs().max().item()


def orthonormal(*shape, dtype=torch.float32):
    return nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_orthonormal_and_trains(shape, orthogonal_map):
    t, s = shape
    layer = vk.OrthogonalLinear(s, t, orthogonal_map=orthogonal_map)
    assert layer.weight.shape == (t, s) and orthogonality_error(layer.weight) <= 1e-5
    x = torch.randn(6, 2, s)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    layer(x).square().mean().backward()
    assert layer.unconstrained.grad is not None


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_assignment(shape, orthogonal_map):
    layer = vk.OrthogonalLinear(shape[1], shape[0], orthogonal_map=orthogonal_map)
    for target in (orthonormal(*shape), -torch.eye(*shape)):
        layer.weight = target
        torch.testing.assert_close(layer.weight, target, rtol=0, atol=2e-6)
    layer.weight = target * 3  # not orthonormal: its QR factor
    torch.testing.assert_close(layer.weight, target, rtol=0, atol=2e-6)


def test_assignment_refuses_what_has_no_factor():
    layer = vk.OrthogonalLinear(3, 5)
    with pytest.raises(ValueError, match=r"weight takes a tensor of shape \(5, 3\); got .*\(3, 5\)"):
        layer.weight = torch.randn(3, 5)
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.weight = torch.full((5, 3), torch.nan)


def test_affine():
    layer = vk.OrthogonalLinear(4, 9, affine=True)
    with torch.no_grad():
        layer.gain.uniform_()
        layer.bias.normal_()
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), x @ layer.weight.T * layer.gain + layer.bias)
    assert layer.no_weight_decay() == {"unconstrained", "gain", "bias"}


def test_initial_projections_are_spread_over_all_semi_orthogonal_matrices_up_to_signs_of_columns():
    """Haar measure of the spaces that columns span: P Pᵀ has mean (S / T) I, and every entry of P variance 1 / T."""
    draws = torch.stack([vk.OrthogonalLinear(2, 4).weight.detach() for _ in range(400)])
    assert ((draws @ draws.mT).mean(0) - torch.eye(4) / 2).abs().max() < 0.1
    assert (draws.square().mean(0) - 0.25).abs().max() < 0.06
    # A direction that the signs of columns can't choose: entries below the diagonal have mean 0.
    assert draws[:, 2:].mean(0).abs().max() < 0.1


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
def test_orthogonal_is_a_drop_in(shape, orthogonal_map):
    t, s = shape
    layer = nn.Linear(s, t, bias=False)
    initial = layer.weight.detach().clone()
    assert vk.orthogonal(layer, "weight", orthogonal_map) is layer
    theirs = nn.Linear(s, t, bias=False)
    with torch.no_grad():
        theirs.weight.copy_(initial)
    parametrizations.orthogonal(theirs, "weight", orthogonal_map="householder", use_trivialization=False)
    torch.testing.assert_close(layer.weight, theirs.weight, rtol=0, atol=1e-5)  # both start at the QR factor
    target = orthonormal(t, s)
    layer.weight = target
    torch.testing.assert_close(layer.weight, target, rtol=0, atol=2e-6)
    layer(torch.randn(3, s)).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_orthogonal_takes_batches():
    holder = nn.Module()
    holder.kernels = nn.Parameter(torch.randn(3, 2, 6, 4))
    vk.orthogonal(holder, "kernels")
    assert orthogonality_error(holder.kernels) < 1e-6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.orthogonal(nn.Linear(3, 5), "wieght"), ValueError, "no parameter 'wieght'.*'weight', 'bias'"),
        (lambda: vk.orthogonal(nn.Linear(3, 5), "bias"), ValueError, r"bias must have the shape .*got \(5,\)"),
        (lambda: vk.orthogonal(nn.Linear(3, 5), orthogonal_map="qr"), ValueError, "orthogonal_map must be .*'qr'"),
        (lambda: vk.orthogonal(nn.Linear(3, 5).to(torch.float8_e4m3fn)), TypeError, "weight .*float8_e4m3fn"),
        (lambda: vk.OrthogonalLinear(3, 5, dtype=torch.bfloat16), TypeError, "float32 or float64"),
        (lambda: vk.OrthogonalLinear(3.0, 5), TypeError, "in_features must be an int; got float"),
        (lambda: vk.OrthogonalLinear(3, 0), ValueError, "out_features must be at least 1; got 0"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_copies_pickles_and_state_dicts(orthogonal_map):
    layer = vk.OrthogonalLinear(4, 9, affine=True, orthogonal_map=orthogonal_map)
    layer.weight = orthonormal(9, 4)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = vk.OrthogonalLinear(4, 9, affine=True, orthogonal_map=orthogonal_map)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin.weight, layer.weight)
        twin.unconstrained.data.add_(1)
    assert orthogonality_error(layer.weight) < 1e-5


def test_meta_device_then_materialized():
    with torch.device("meta"):
        layer = vk.OrthogonalLinear(4, 9, affine=True)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert orthogonality_error(layer.weight) < 1e-6 and bool((layer.gain == 1).all())


# ------------------------------------------------------------------------------- projections to compare with


@pytest.mark.parametrize("normalization", ["layer_norm", "batch_norm", "whiten", "none"])
@pytest.mark.parametrize("loss", ["smooth_l1", "mse"])
@pytest.mark.parametrize("shape", [(9, 4), (5, 5), (3, 8)])
@pytest.mark.parametrize("projection", ["orthogonal", "linear", "identity"])
def test_a_loss_with_another_projection_is_the_loss_of_its_matrix(projection, shape, loss, normalization):
    t, s = shape
    module = vk.OrthoProjLoss(
        s,
        t,
        projection=projection,
        loss=loss,
        normalization=normalization,
        eps=1e-2,
        scale="match",
        dtype=torch.float64,
    )
    x, y = torch.randn(20, s, dtype=torch.float64, requires_grad=True), torch.randn(20, t, dtype=torch.float64) + 1
    weight = torch.eye(t, s, dtype=torch.float64) if projection == "identity" else module.projection.weight.detach()
    scale = max(t / s, 1.0) ** 0.5
    options = {"loss": loss, "normalization": normalization, "eps": 1e-2, "scale": scale, "backend": "torch"}
    expected = vk.functional.ortho_proj_loss(x, y, weight, **options)
    torch.testing.assert_close(module(x, y), expected)
    (grad,) = torch.autograd.grad(expected, x)
    module(x, y).backward()
    torch.testing.assert_close(x.grad, grad)
    assert all(p.grad is not None for p in module.parameters())
    assert (list(module.parameters()) == []) == (projection == "identity")


def test_identity_of_fewer_channels_adds_a_constant_to_the_comparison_of_the_first_ones():
    module = vk.OrthoProjLoss(4, 9, projection="identity", normalization="none", loss="mse")
    x, y = torch.randn(6, 4, requires_grad=True), torch.randn(6, 9)
    first = F.mse_loss(x, y[:, :4], reduction="sum")
    torch.testing.assert_close(module(x, y), (first + y[:, 4:].square().sum()) / (6 * 9))
    (expected,) = torch.autograd.grad(first / (6 * 9), x)
    module(x, y).backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(9, 4), (5, 5), (3, 8)])
@pytest.mark.parametrize("projection", ["orthogonal", "linear", "identity"])
def test_every_projection_folds_into_a_linear_layer(projection, shape, affine):
    t, s = shape
    module = make_projection(projection, s, t, affine=affine)
    for parameter in (module.gain, module.bias):
        if parameter is not None:
            nn.init.normal_(parameter)
    random_state = torch.get_rng_state()
    linear = module.to_linear()
    assert torch.equal(torch.get_rng_state(), random_state)  # a run that exports on the way goes on as without
    assert type(linear) is nn.Linear and (linear.bias is not None) == affine
    x = torch.randn(5, 2, s)
    torch.testing.assert_close(linear(x), module(x))
    scaled = module.to_linear(scale=torch.tensor([1.5]))
    torch.testing.assert_close(scaled.weight, 1.5 * linear.weight)
    assert not affine or torch.equal(scaled.bias, linear.bias)
    nn.init.zeros_(linear.weight)  # its values are its own
    assert module.weight.norm() > 0


def test_weight_decay_reaches_a_linear_projection_and_no_orthogonal_one():
    assert vk.OrthoProjLoss(4, 9, projection="linear", affine=True).no_weight_decay() == {"projection.bias"}
    assert vk.OrthoProjLoss(4, 9, projection="identity", scale="learned").no_weight_decay() == {"scale"}
    assert vk.OrthoProjLoss(4, 9).no_weight_decay() == {"projection.unconstrained"}


@pytest.mark.parametrize("projection", ["orthogonal", "linear", "identity"])
def test_losses_with_any_projection_save_load_and_start_on_the_meta_device(projection):
    with torch.device("meta"):
        module = vk.OrthoProjLoss(4, 9, projection=projection, affine=True, scale="learned")
    module.to_empty(device="cpu")
    module.reset_parameters()
    other = vk.OrthoProjLoss(4, 9, projection=projection, affine=True, scale="learned")
    other.load_state_dict(module.state_dict())
    x, y = torch.randn(6, 4), torch.randn(6, 9)
    assert torch.equal(other(x, y), module(x, y)) and module(x, y).isfinite()
    assert torch.equal(copy.deepcopy(module)(x, y), module(x, y))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), module(x, y))


@pytest.mark.parametrize("projection", ["orthogonal", "linear", "identity"])
@pytest.mark.parametrize("count", [1, 3])
def test_weights_of_several_projections_are_those_of_each_one(projection, count):
    projections = [make_projection(projection, 4, 9) for _ in range(count)]
    weights = stacked_weights(projections)
    torch.testing.assert_close(weights, torch.stack([p.weight for p in projections]))


def test_16_bit_default_dtypes_give_a_projection_in_float32():
    torch.set_default_dtype(torch.bfloat16)
    try:
        modules = [vk.OrthoProjLoss(4, 9, projection=p, affine=True, scale="learned") for p in ("orthogonal", "linear")]
        modules.append(vk.OrthogonalLinear(4, 9))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "orthonormal"}, "projection must be one of 'orthogonal', 'linear', 'identity'; got"),
        ({"projection": "linear", "orthogonal_map": "matrix_exp"}, "orthogonal_map belongs to projection='orthogonal'"),
        ({"projection": "identity", "orthogonal_map": "householder"}, "orthogonal_map belongs to projection"),
    ],
)
def test_projections_refuse_options_of_another(options, message):
    with pytest.raises(ValueError, match=message):
        vk.OrthoProjLoss(4, 9, **options)
