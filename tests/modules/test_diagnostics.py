"""Diagnostics against their definitions in float64, N x N and all; and as metrics of the loss and of FeatureDistiller.

On two ranks: ddp_diagnostics in test_integrations_ranks.py. On drawn shapes and dtypes: test_properties.py.
"""

import json

import pytest
import torch

import vkd_kernels as vk
from tests.helpers.distillers import CNN, IMAGES, SEVERAL, ViT, gradients, make, outputs_of
from vkd_kernels import diagnostics

SHAPES = {"many rows": (60, 5, 8), "few rows": (9, 14, 30), "four rows": (4, 3, 5)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def rank_of(x):
    """By the singular values of the centered matrix itself."""
    p = torch.linalg.svdvals(x.double() - x.double().mean(0))
    p = p / p.sum()
    return torch.exp(-torch.sum(p * torch.log(p.clamp_min(1e-300))))


def hsic_of(x, y, debiased):
    """By N x N matrices: Kornblith et al. with HKH; Song et al. with the diagonals left out."""
    n = len(x)
    k, l = (z.double() @ z.double().T for z in (x, y))
    if not debiased:
        h = torch.eye(n, dtype=torch.float64) - 1 / n
        return torch.trace(k @ h @ l @ h)
    one = torch.ones(n, dtype=torch.float64)
    k, l = k.fill_diagonal_(0), l.fill_diagonal_(0)
    cross = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return (torch.trace(k @ l) + cross) / (n * (n - 3))


def cka_of(x, y, debiased):
    return hsic_of(x, y, debiased) / (hsic_of(x, x, debiased) * hsic_of(y, y, debiased)).sqrt()


def features(shape, dtype=torch.float64):
    """Related features with offsets and channels of unequal size."""
    n, s, t = shape
    x = torch.randn(n, s, dtype=torch.float64) * (1 + torch.arange(s) % 3) + 5
    return x.to(dtype), (x @ torch.randn(s, t, dtype=torch.float64) + 3 * torch.randn(n, t) - 2).to(dtype)


# ------------------------------------------------------------------------------------------------------- the functions


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (3, 9, 4), (1, 1)])
def test_orthogonality_error(shape):
    q = vk.cayley(torch.randn(*shape, dtype=torch.float64))
    assert diagnostics.orthogonality_error(q) <= 1e-14
    for p in (q + 0.1 * torch.rand_like(q), (2 * q).float(), q.bfloat16()):
        tall = p.double() if shape[-2] >= shape[-1] else p.double().mT
        products = [m.T @ m - torch.eye(m.shape[1]) for m in tall.reshape(-1, *tall.shape[-2:])]
        value = diagnostics.orthogonality_error(p.requires_grad_())
        assert value.dtype == torch.float64 and value.shape == () and not value.requires_grad
        torch.testing.assert_close(value, torch.stack(products).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@shapes
def test_effective_rank(shape, dtype):
    for z in features(shape, dtype):
        value = diagnostics.effective_rank(z.requires_grad_())
        torch.testing.assert_close(value, rank_of(z.detach()), rtol=1e-6, atol=0)
        assert value.dtype == torch.float64 and value.shape == () and not value.requires_grad
        torch.testing.assert_close(diagnostics.effective_rank(z.detach() * 64 + 0), value, rtol=1e-6, atol=0)


def test_effective_rank_counts_directions():
    """k orthogonal directions of equal size make k; nothing else makes as much; equal rows make none."""
    for n, c, k in ((40, 12, 5), (8, 30, 3), (13, 12, 12)):
        x = torch.linalg.qr(torch.randn(n, k + 1, dtype=torch.float64)).Q
        x = torch.linalg.qr(x - x.mean(0)).Q[:, :k]
        x = x @ torch.linalg.qr(torch.randn(c, k, dtype=torch.float64)).Q.T * 1e3
        assert diagnostics.effective_rank(x + 7).item() == pytest.approx(k, rel=1e-6)
        assert diagnostics.effective_rank(x * torch.linspace(1, 2, c)) <= k
    assert diagnostics.effective_rank(torch.randn(50, 1) @ torch.randn(1, 9)).item() == pytest.approx(1, rel=1e-3)
    for equal in (torch.zeros(5, 3), torch.ones(5, 3) * 0.1, torch.randn(1, 3)):
        assert diagnostics.effective_rank(equal) == 0


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@shapes
def test_cka(shape, dtype, debiased):
    x, y = features(shape, dtype)
    value = diagnostics.cka(x.requires_grad_(), y, debiased=debiased)
    torch.testing.assert_close(value, cka_of(x.detach(), y, debiased), rtol=1e-9, atol=1e-11)
    assert value.dtype == torch.float64 and value.shape == () and not value.requires_grad


@pytest.mark.parametrize("debiased", [True, False])
@shapes
def test_cka_sees_neither_rotation_nor_scale_nor_offset(shape, debiased):
    x, y = features(shape)
    p = vk.cayley(torch.randn(x.shape[1] + 3, x.shape[1], dtype=torch.float64))
    same = -1e3 * x @ p.T + torch.randn(len(p))
    assert diagnostics.cka(x, same, debiased=debiased).item() == pytest.approx(1, rel=1e-9)
    ours, theirs = diagnostics.cka(same, y, debiased=debiased), diagnostics.cka(x, y, debiased=debiased)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(diagnostics.cka(y, x, debiased=debiased), theirs)


@pytest.mark.parametrize("scale", [1e-60, 1e-45, 1e40])
def test_cka_of_huge_and_tiny_features(scale):
    x = scale * torch.randn(50, 8, dtype=torch.float64)
    assert [diagnostics.cka(x, x, debiased=d).item() for d in (True, False)] == pytest.approx([1, 1], abs=1e-12)


def test_only_the_biased_estimate_rises_with_the_channels():
    pairs = [(torch.randn(32, 100), torch.randn(32, 300)) for _ in range(50)]
    means = [torch.stack([diagnostics.cka(*pair, debiased=d) for pair in pairs]).mean().item() for d in (True, False)]
    assert abs(means[0]) < 0.02 and means[1] > 0.6


@pytest.mark.parametrize("kind", ["bool", "weights"])
def test_masked_rows_count_nowhere_and_others_alike(kind):
    x, y = features((40, 5, 8))
    keep = torch.rand(40) > 0.4
    x[~keep], y[~keep] = torch.nan, torch.inf
    mask = (keep if kind == "bool" else keep * (0.1 + torch.rand(40))).reshape(8, 5)
    shaped = x.reshape(8, 5, 5), y.reshape(8, 5, 8)
    torch.testing.assert_close(diagnostics.effective_rank(shaped[0], mask=mask), rank_of(x[keep]))
    for debiased in (True, False):
        value = diagnostics.cka(*shaped, mask=mask, debiased=debiased)
        torch.testing.assert_close(value, cka_of(x[keep], y[keep], debiased))


def test_where_there_is_nothing_to_tell():
    x, y = features((40, 5, 8), torch.float32)
    three, none = torch.arange(40) < 3, torch.zeros(40, dtype=torch.bool)
    assert diagnostics.effective_rank(x, mask=none) == 0
    for spoilt in (x, y):
        spoilt = spoilt.clone()
        spoilt[3, 1] = torch.nan
        assert diagnostics.effective_rank(spoilt).isnan() and diagnostics.cka(spoilt, y).isnan()
    for debiased in (True, False):
        for value in (
            diagnostics.cka(x, y, mask=none, debiased=debiased),
            diagnostics.cka(x * 0 + 1, y, debiased=debiased),
            diagnostics.cka(x[:1], y[:1], debiased=debiased),
        ):
            assert value.isnan()
    assert diagnostics.cka(x, y, mask=three).isnan() and diagnostics.cka(x, y, mask=three, debiased=False) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.1, 1e8, 1e-8, 0.0])
def test_equal_rows_have_no_rank_and_are_like_nothing(value, dtype):
    equal = torch.full((50, 6), value, dtype=dtype) * torch.arange(1, 7).to(dtype)
    assert diagnostics.effective_rank(equal) == 0
    for debiased in (True, False):
        assert diagnostics.cka(equal, equal, debiased=debiased).isnan()
        assert diagnostics.cka(equal, torch.randn(50, 3), debiased=debiased).isnan()


def test_a_small_variance_beside_a_large_mean_counts():
    x = torch.randn(50, 6, dtype=torch.float64)
    torch.testing.assert_close(diagnostics.effective_rank(1e6 + 1e-3 * x), rank_of(x), rtol=1e-3, atol=0)


def test_debiased_cka_of_features_alike_to_nothing_is_nan():
    """Rows all equally far apart have a debiased HSIC of 0, up to rounding; a few rows of many channels a negative."""
    far_apart = torch.eye(4), torch.eye(6, dtype=torch.float64), 7 * torch.eye(5)
    for x in (*far_apart, *(torch.randn(4, 1000, generator=torch.Generator().manual_seed(i)) for i in range(10))):
        own = hsic_of(x, x, debiased=True)
        value = diagnostics.cka(x, x)
        assert value.isnan() if own <= 1e-9 else value.item() == pytest.approx(1)
        assert diagnostics.cka(x, torch.randn(len(x), 3)).isinf().logical_not()
        assert diagnostics.cka(x, x, debiased=False).item() == pytest.approx(1)


@pytest.mark.parametrize("masked", [False, True])
def test_metrics_of_large_batches_look_at_evenly_spaced_rows(masked):
    x, y = torch.randn(9, 1001, 4), torch.randn(9, 1001, 6)
    weight, mask = vk.cayley(torch.randn(6, 4)), torch.rand(9, 1001) > 0.5 if masked else None
    measured = diagnostics.metrics(x, y, weight, mask=mask)
    x, y = x.flatten(0, 1)[::3], y.flatten(0, 1)[::3]  # 9009 rows of which 4096 are allowed
    mask = None if mask is None else mask.flatten()[::3]
    assert measured == {
        "orthogonality_error": diagnostics.orthogonality_error(weight),
        "effective_rank_student": diagnostics.effective_rank(x, mask=mask),
        "effective_rank_teacher": diagnostics.effective_rank(y, mask=mask),
        "cka": diagnostics.cka(x, y, mask=mask),
    }


def test_metrics_are_one_graph_that_never_waits_for_a_value():
    torch._dynamo.reset()
    compiled = torch.compile(diagnostics.metrics, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = vk.cayley(torch.randn(6, 4))
    for n in (20, 33, 5000):
        x, y = torch.randn(n, 4), torch.randn(n, 6)
        torch.testing.assert_close(compiled(x, y, weight), diagnostics.metrics(x, y, weight))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y, w: diagnostics.orthogonality_error(w[0]), ValueError, r"weight must have .*got \(4,\)"),
        (lambda x, y, w: diagnostics.orthogonality_error(w.int()), TypeError, "weight must have one of the dtypes"),
        (lambda x, y, w: diagnostics.effective_rank(x[0, 0]), ValueError, r"features must have the shape.*\(4,\)"),
        (lambda x, y, w: diagnostics.effective_rank(x[:0]), ValueError, r"features has no rows.*\(0, 5, 4\)"),
        (lambda x, y, w: diagnostics.effective_rank(x, mask=x[..., :3] > 0), ValueError, "mask must have the shape"),
        (lambda x, y, w: diagnostics.effective_rank(x, process_group="w"), TypeError, "process_group must be None or"),
        (lambda x, y, w: diagnostics.cka(x, y[:1]), ValueError, r"same rows; got student of shape \(2, 5, 4\) and tea"),
        (lambda x, y, w: diagnostics.cka(x, y, debiased=1), TypeError, "debiased must be True or False; got int 1"),
        (lambda x, y, w: diagnostics.metrics(x, y, w.T), ValueError, r"weight must have .* \(6, 4\); got \(4, 6\)"),
        (lambda x, y, w: diagnostics.metrics(x, y.long(), w), TypeError, "teacher must have one of the dtypes"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 5, 4), torch.randn(2, 5, 6), torch.randn(6, 4))


# --------------------------------------------------------------------------------------------------- metrics of modules

NAMES = ("orthogonality_error", "effective_rank_student", "effective_rank_teacher", "cka")


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_metrics_of_the_loss(shape):
    module = vk.OrthoProjLoss(*shape, affine=True, scale="match")
    x, y, mask = torch.randn(3, 9, shape[0], requires_grad=True), torch.randn(3, 9, shape[1]), torch.rand(3, 9) > 0.3
    measured = module.metrics(x, y, mask)
    assert measured == diagnostics.metrics(x, y, module.projection.weight, mask=mask)
    assert measured["orthogonality_error"] <= 1e-6


def test_metrics_of_a_distiller_are_a_flat_dictionary_beside_the_same_losses():
    distiller = make(SEVERAL, logit_weight=1.0)
    keep = torch.tensor([True, True, False, True, True])
    output, losses = distiller(IMAGES, masks={"a": keep})
    before = gradients(distiller, losses["total"])
    watched, same, metrics = distiller(IMAGES, masks={"a": keep}, metrics=True)
    torch.testing.assert_close((watched, same), (output, losses), rtol=0, atol=0)
    after = gradients(distiller, same["total"])
    assert all(torch.equal(after[name], value) for name, value in before.items())

    pairs = ["a", "b", "c", "wide"]
    assert set(metrics) == {
        "loss",
        *(f"loss/{name}" for name in [*pairs, "logits"]),
        *(f"diagnostics/{pair}/{name}" for pair in pairs for name in NAMES),
    }
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert metrics["loss"] == losses["total"] and metrics["loss/a"] == losses["a"]
    json.dumps({name: value.item() for name, value in metrics.items()})
    x = outputs_of(distiller.student, ["norm"], IMAGES)["norm"][:, 1:].mean(1)
    y = outputs_of(distiller.teacher, ["relu"], IMAGES)["relu"].mean((2, 3))
    expected = diagnostics.metrics(x, y, distiller.projection("a"), mask=keep)
    for name, value in expected.items():
        torch.testing.assert_close(metrics[f"diagnostics/a/{name}"], value, rtol=1e-4, atol=1e-7)
    with pytest.raises(TypeError, match="metrics must be True or False; got int 1"):
        distiller(IMAGES, metrics=1)


def test_metrics_of_a_distiller_compile_and_stand_autocast():
    torch._dynamo.reset()
    pair = {"student": "norm", "teacher": "norm", "student_pool": "tokens", "teacher_pool": "tokens", "name": "x"}
    distiller = make([pair], ViT(6), ViT(9))
    expected = distiller(IMAGES, metrics=True)[2]
    with distiller:
        compiled = torch.compile(distiller, fullgraph=True, backend="aot_eager")
        assert len(compiled(IMAGES)) == 2
        torch.testing.assert_close(compiled(IMAGES, metrics=True)[2], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = distiller(IMAGES, metrics=True)[2]
    assert measured["diagnostics/x/orthogonality_error"] <= 1e-5
    for name in NAMES[1:]:
        torch.testing.assert_close(
            measured[f"diagnostics/x/{name}"], expected[f"diagnostics/x/{name}"], rtol=0.05, atol=0
        )


def test_metrics_tell_a_collapse():
    """What they are for: a student whose features all become one direction."""
    pair = {"student": "relu", "teacher": "relu", "student_pool": "spatial", "teacher_pool": "spatial", "name": "x"}
    distiller = make([pair], CNN(6), CNN(10)).eval()
    healthy = distiller(IMAGES, metrics=True)[2]
    with torch.no_grad():
        distiller.student.conv.weight[1:] = distiller.student.conv.weight[:1]
        distiller.student.conv.bias[1:] = distiller.student.conv.bias[:1]
    collapsed = distiller(IMAGES, metrics=True)[2]
    name = "diagnostics/x/effective_rank_student"
    assert healthy[name] > 3 and collapsed[name].item() == pytest.approx(1, rel=1e-3)
    assert collapsed["diagnostics/x/effective_rank_teacher"] == healthy["diagnostics/x/effective_rank_teacher"]
