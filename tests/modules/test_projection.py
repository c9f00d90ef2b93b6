"""OrthogonalLinear and orthogonal(): invariants, assignment, parity with PyTorch's parametrisation, copies."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import vkd_kernels as vk

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


def test_initial_projections_are_spread_over_all_orthonormal_matrices():
    """Haar measure: every entry has mean 0 and variance 1/T; signs of the determinant come up equally."""
    draws = torch.stack([vk.OrthogonalLinear(2, 2).weight.detach() for _ in range(400)])
    assert draws.mean(0).abs().max() < 0.15
    assert (draws.square().mean(0) - 0.5).abs().max() < 0.1
    assert 140 < (torch.linalg.det(draws) > 0).sum() < 260


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
        (lambda: vk.orthogonal(nn.Linear(3, 5).half()), TypeError, "weight .*stay in float32"),
        (lambda: vk.OrthogonalLinear(3, 5, dtype=torch.bfloat16), TypeError, "float32, float64"),
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


def test_meta_device_then_materialised():
    with torch.device("meta"):
        layer = vk.OrthogonalLinear(4, 9, affine=True)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert orthogonality_error(layer.weight) < 1e-6 and bool((layer.gain == 1).all())
