"""OrthoProjLoss: options, tasks, copies; and every defect of the released research code as a regression test.

The defects are those listed in README's "What the released code gets wrong": each test trains or computes the way that
broke it there and asserts what must hold here.
"""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vkd_kernels as vk
from tests.helpers.distillers import FEATURES, LAYERS, layers
from vkd_kernels.ops.ortho_proj_loss import chunked, dispatch


def orthogonality_error(p):
    p = p.detach().double()
    p = p if p.shape[0] >= p.shape[1] else p.T
    return (p.T @ p - torch.eye(p.shape[1])).abs().max().item()


def test_the_published_signatures():
    parameters = inspect.signature(vk.OrthoProjLoss).parameters
    keywords = {name: p.default for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert [*parameters][:2] == ["student_dim", "teacher_dim"]
    assert keywords == {
        "normalization": "layer_norm",
        "loss": "smooth_l1",
        "beta": 1.0,
        "reduction": "mean",
        "scale": 1.0,
        "affine": False,
        "eps": 1e-5,
        "orthogonal_map": "cayley",
        "projection": "orthogonal",
        "process_group": None,
        "backend": None,
        "device": None,
        "dtype": None,
    }
    assert [*inspect.signature(vk.OrthoProjLoss.forward).parameters] == ["self", "student", "teacher", "mask"]
    functional = list(inspect.signature(vk.functional.ortho_proj_loss).parameters)
    assert functional == (
        "student teacher weight scale bias mask normalization loss beta eps reduction process_group backend".split()
    )


@pytest.mark.parametrize(("s", "t"), [(5, 9), (9, 5), (4, 4)])
def test_equals_the_composition(s, t):
    module = vk.OrthoProjLoss(s, t)
    x, y = torch.randn(6, 3, s), torch.randn(6, 3, t)
    expected = F.smooth_l1_loss(x @ module.projection.weight.T, F.layer_norm(y, (t,)))
    torch.testing.assert_close(module(x, y), expected)


@pytest.mark.parametrize(("s", "t"), [(64, 256), (256, 256), (256, 64)])
def test_match_makes_lengths_equal_whichever_side_is_wider(s, t):
    module = vk.OrthoProjLoss(s, t, scale="match")
    x, y = torch.randn(200, s), torch.randn(200, t)
    z = module.scale * module.projection(x)
    lengths = z.norm(dim=1).mean(), F.layer_norm(y, (t,)).norm(dim=1).mean()
    torch.testing.assert_close(*lengths, rtol=0.05, atol=0)


@pytest.mark.parametrize(("s", "t"), [(4, 9), (9, 4)])
def test_a_learned_scale_is_reset_to_where_it_starts(s, t):
    module = vk.OrthoProjLoss(s, t, scale="learned")
    start = module.scale.item()
    nn.init.constant_(module.scale, 7.0)
    module.reset_parameters()
    assert module.scale.item() == start == vk.OrthoProjLoss(s, t, scale="match").scale


@pytest.mark.parametrize(("scale", "value"), [(1.0, 1.0), (0.3, 0.3), ("match", 2.0), ("learned", 2.0)])
@pytest.mark.parametrize("affine", [False, True])
def test_scale(scale, value, affine):
    module = vk.OrthoProjLoss(4, 16, scale=scale, affine=affine, loss="mse")
    if affine:
        nn.init.uniform_(module.projection.gain)
        nn.init.normal_(module.projection.bias)
    x, y = torch.randn(6, 4), torch.randn(6, 16)
    gain = module.projection.gain if affine else 1
    z = value * (x @ module.projection.weight.T) * gain + (module.projection.bias if affine else 0)
    torch.testing.assert_close(module(x, y), F.mse_loss(z, F.layer_norm(y, (16,))))
    module(x, y).backward()
    assert all(p.grad is not None for p in module.parameters())
    names = {"projection.unconstrained"} | ({"scale"} if scale == "learned" else set())
    names |= {"projection.gain", "projection.bias"} if affine else set()
    assert module.no_weight_decay() == names


@pytest.mark.parametrize("scale", [1.0, 0.3, "learned"])
@pytest.mark.parametrize("normalization", ["layer_norm", "batch_norm", "whiten", "none"])
@pytest.mark.parametrize(("s", "t"), [(5, 9), (4, 4), (9, 5)])
def test_squared_error_without_z_is_the_same_training(monkeypatch, s, t, normalization, scale):
    """Large problems with an orthonormal projection skip Z: loss and the gradients of every parameter are the same."""
    module = vk.OrthoProjLoss(s, t, loss="mse", normalization=normalization, eps=1e-2, scale=scale, dtype=torch.float64)
    x, y = torch.randn(20, s, dtype=torch.float64, requires_grad=True), torch.randn(20, t, dtype=torch.float64) + 1
    mask = torch.arange(20) % 4 > 0
    without_z, called = chunked.semi_orthogonal_loss, []
    monkeypatch.setattr(chunked, "semi_orthogonal_loss", lambda *a: called.append(1) or without_z(*a))
    results = []
    for limit in (float("inf"), -1):
        monkeypatch.setattr(dispatch, "CHUNKED_FROM", limit)
        value = module(x, y, mask)
        results.append([value.detach(), *torch.autograd.grad(value, [x, *module.parameters()])])
    assert len(called) == (t >= s and normalization != "batch_norm")
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, rtol=1e-9, atol=1e-12)


def test_for_task():
    assert vk.OrthoProjLoss.for_task("classification", 4, 8).normalization == "layer_norm"
    assert vk.OrthoProjLoss.for_task("detection", 4, 8).normalization == "batch_norm"
    generation = vk.OrthoProjLoss.for_task("generation", 4, 8, scale="match")
    assert (generation.normalization, generation.eps, generation.scale) == ("whiten", 1e-3, 2**0.5)
    with pytest.raises(ValueError, match="task must be one of 'classification'.*got 'segmentation'"):
        vk.OrthoProjLoss.for_task("segmentation", 4, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"normalization": "bn"}, ValueError, "normalization must be one of"),
        ({"loss": "l1"}, ValueError, "loss must be one of"),
        ({"scale": "auto"}, ValueError, "scale must be one of 'match', 'learned'; got 'auto'"),
        ({"scale": None}, TypeError, "scale must be a number; got NoneType"),
        ({"orthogonal_map": "svd"}, ValueError, "orthogonal_map must be one of"),
        ({"process_group": "world"}, TypeError, "process_group must be None or .*got str"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of"),
        ({"dtype": torch.float16}, TypeError, "float32 or float64"),
        ({"normalisation": "whiten"}, TypeError, "normalisation"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        vk.OrthoProjLoss(4, 8, **options)


def test_copies_pickles_and_state_dicts():
    module = vk.OrthoProjLoss(4, 9, scale="learned", affine=True)
    x, y = torch.randn(5, 4), torch.randn(5, 9)
    other = vk.OrthoProjLoss(4, 9, scale="learned", affine=True)
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(twin(x, y), module(x, y))


# ------------------------------------------------------------------------- the released code's defects, one by one


@pytest.mark.parametrize("orthogonal_map", ["cayley", "matrix_exp", "householder"])
def test_defect_1_weight_decay_does_not_switch_the_projection_off(orthogonal_map):
    """There: Householder's integer diagonal becomes 0 in AdamW's first step, and the projection with it, for good."""
    module = vk.OrthoProjLoss(6, 20, orthogonal_map=orthogonal_map)
    student = nn.Linear(10, 6)
    x, y = torch.randn(64, 10), torch.randn(64, 10) @ torch.randn(10, 20)
    parameters = [*student.parameters(), *module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.5)  # the projection decays too
    losses = []
    for _ in range(150):
        loss = module(student(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert orthogonality_error(module.projection.weight) <= 1e-5
    assert losses[-1] < 0.9 * losses[0]
    gradient = torch.autograd.grad(module(student(x), y), student.weight)[0]
    assert gradient.norm() > 1e-4  # it still teaches


def test_defect_1_is_real_in_pytorchs_own_map():
    """The guard is needed: without it the same training makes the weight exactly zero."""
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(6, 20, bias=False))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.5)
    layer(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    assert not layer.weight.any()


# Defect 2, gradients never reduced across ranks: tests/distributed/test_distributed.py.


@pytest.mark.parametrize("orthogonal_map", ["cayley", "matrix_exp", "householder"])
def test_defect_3_autocast_leaves_the_projection_orthonormal(orthogonal_map):
    module = vk.OrthoProjLoss(48, 192, orthogonal_map=orthogonal_map)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = module.projection.weight
        loss = module(torch.randn(8, 48), torch.randn(8, 192))
    assert p.dtype == torch.float32 and orthogonality_error(p) <= 1e-5
    assert loss.dtype == torch.float32


def test_defect_4_batch_statistics_have_an_eps_and_leave_padding_out():
    module = vk.OrthoProjLoss.for_task("detection", 4, 6)
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    y[..., 0] = 3.0  # a constant channel: zero deviation
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    padded = module(x.masked_fill(~mask[..., None], 1e4), y.masked_fill(~mask[..., None], 1e4), mask)
    assert padded.isfinite()
    torch.testing.assert_close(padded, module(x[mask], y[mask]))


@pytest.mark.parametrize(("weight", "logit_weight"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_defect_5_a_loss_weight_of_zero_is_a_loss_weight(weight, logit_weight):
    distiller = vk.FeatureDistiller(layers(8), layers(32), [{**LAYERS, "weight": weight}], logit_weight=logit_weight)
    losses = distiller(FEATURES)[1]
    losses["total"].backward()
    torch.testing.assert_close(losses["total"], weight * losses["x"] + logit_weight * losses["logits"])
    trained = dict(distiller.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert trained["student.2.weight"].grad.any() == (logit_weight > 0)
    assert trained["pair_losses.[x].projection.unconstrained"].grad.any() == (weight > 0)


def test_defect_6_the_transform_is_of_a_skew_symmetric_matrix():
    weight = torch.randn(40, 12, dtype=torch.float64)
    assert orthogonality_error(vk.cayley(weight)) < 1e-13  # exponentiating the wrong matrix gave 0.77


# --------------------------------------------------------------------------------------------- long training


@pytest.fixture
def one_thread():
    """Tiny layers are faster on one thread, and much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("steps", [2000, pytest.param(10_000, marks=pytest.mark.thorough)])
def test_orthonormal_through_thousands_of_steps_of_adamw_under_autocast(one_thread, steps):
    module, student = vk.OrthoProjLoss(8, 24, scale="learned"), nn.Linear(8, 8)
    optimizer = torch.optim.AdamW([*student.parameters(), *module.parameters()], lr=1e-2, weight_decay=0.05)
    x, y = torch.randn(16, 8), torch.randn(16, 24)
    worst = 0.0
    for step in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(student(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            worst = max(worst, orthogonality_error(module.projection.weight))
    assert worst <= 1e-5
    assert loss.isfinite()
