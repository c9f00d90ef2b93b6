"""Cosine, mixtures of losses, and targets by a module: against literal float64 formulas, on every path of PyTorch."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import vkd_kernels as vk
from tests.helpers import processes
from tests.helpers.loss_cases import DTYPES, Case, error
from tests.ops.test_ortho_proj_loss import inputs, literal
from vkd_kernels.functional import ortho_proj_loss, ortho_proj_losses
from vkd_kernels.ops.ortho_proj_loss import api, chunked, dispatch, reference, without_z
from vkd_kernels.ops.ortho_proj_loss.spec import LossSpec

MIXTURES = [
    "cosine",
    {"cosine": 0.9, "smooth_l1": 0.1},
    {"cosine": 0.5, "mse": 2.0},
    {"mse": 1.0, "smooth_l1": 1.0, "cosine": 3.0},
]
ALL_DTYPES = [*DTYPES, torch.float64]


@pytest.fixture(params=["reference", "chunked"])
def path(request, monkeypatch):
    monkeypatch.setattr(dispatch, "CHUNKED_FROM", -1 if request.param == "chunked" else math.inf)
    return request.param


def literal_mixture(student, teacher, weight, *, loss, **options):
    """DESIGN's formula of the cosine, row by row, and the tests' own of the other losses."""
    shares = {loss: 1.0} if isinstance(loss, str) else loss
    total = torch.zeros((), dtype=student.dtype)
    for name, share in shares.items():
        if name != "cosine":
            total = total + share * literal(student, teacher, weight, loss=name, **options)
            continue
        z, t, w = projected_and_target(student, teacher, weight, **options)
        for z_row, t_row, w_row in zip(z, t, w, strict=True):
            cos = z_row @ t_row / (max(z_row.norm(), 1e-8) * max(t_row.norm(), 1e-8))
            total = total + share * w_row * (1 - cos) / w.sum()
    return total


def projected_and_target(student, teacher, weight, *, normalization, eps, beta, scale=None, bias=None, mask=None):
    """(Z, T, weights) of the rows that the mask keeps."""
    keep = torch.ones(len(student), dtype=torch.bool) if mask is None else mask > 0
    w = torch.ones(len(student), dtype=student.dtype) if mask is None else mask.to(student.dtype)
    student, teacher, w = student[keep], teacher[keep], w[keep]
    z = student @ weight.T * (1 if scale is None else scale) + (0 if bias is None else bias)
    if normalization == "layer_norm":
        mean, variance = teacher.mean(1, keepdim=True), teacher.var(1, unbiased=False, keepdim=True)
        return z, (teacher - mean) / (variance + eps).sqrt(), w
    if normalization == "batch_norm":
        return (*(vk.functional.standardize(x, mask=w, eps=eps) for x in (z, teacher)), w)
    if normalization == "l2":
        return z, torch.stack([row / max(row.norm(), eps) for row in teacher]), w
    if normalization == "whiten":
        return z, vk.functional.whiten(teacher, mask=w, eps=eps), w
    return z, teacher, w


# ---------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("masked", ["no mask", "bool", "weights"])
@pytest.mark.parametrize("loss", MIXTURES, ids=str)
@pytest.mark.parametrize("normalization", api.NORMALIZATIONS)
def test_equals_the_literal_formula_with_gradients(path, normalization, loss, masked):
    student, teacher, weight = inputs()
    mask = {"no mask": None, "bool": torch.arange(13) % 3 != 0, "weights": torch.arange(13.0).double() % 4 / 3}[masked]
    scale, bias = torch.rand(9, dtype=torch.float64) + 0.5, torch.randn(9, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (student, weight, scale, bias)]
    results = []
    for function in (ortho_proj_loss, literal_mixture):
        x, p, a, b = leaves
        value = function(
            x, teacher, p, scale=a, bias=b, mask=mask, normalization=normalization, loss=loss, beta=0.7, eps=1e-2
        )
        results.append([value.detach(), *torch.autograd.grad(value, leaves, torch.tensor(0.7, dtype=torch.float64))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(13, 5, 9), (13, 9, 9), (13, 9, 5)], ids=str)
def test_cosine_of_any_weight(path, shape):
    """Without bias or scale ‖z‖ comes from x (PᵀP) xᵀ where S <= T; P is no semi-orthogonal matrix here."""
    n, s, t = shape
    student, teacher, weight = (torch.randn(*size, dtype=torch.float64) for size in ((n, s), (n, t), (t, s)))
    mask = torch.arange(n) % 4 / 3
    leaves = [student.requires_grad_(), weight.requires_grad_()]
    options = {"normalization": "layer_norm", "loss": "cosine", "eps": 1e-5, "mask": mask}
    value, expected = (
        ortho_proj_loss(student, teacher, weight, **options),
        literal_mixture(student, teacher, weight, beta=1.0, **options),
    )
    torch.testing.assert_close(value, expected)
    for got, want in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_is_torchs_own_cosine_similarity():
    student, teacher, weight = inputs()
    expected = (1 - nn.functional.cosine_similarity(student @ weight.T, teacher)).mean()
    torch.testing.assert_close(ortho_proj_loss(student, teacher, weight, normalization="none", loss="cosine"), expected)


@pytest.mark.parametrize("loss", MIXTURES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck(path, loss, biased):
    student, teacher, weight = inputs(n=6, s=3, t=4)
    mask = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    leaves = [student.requires_grad_(), weight.requires_grad_()]
    leaves += [torch.randn(4, dtype=torch.float64, requires_grad=True)] if biased else []

    def function(x, p, bias=None):
        return ortho_proj_loss(x, teacher, p, bias=bias, mask=mask, loss=loss, beta=0.3)

    assert torch.autograd.gradcheck(function, leaves)
    if path == "reference" and "smooth_l1" not in str(loss):
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("reduction, factor", [("mean", 1.0), ("sum", 9.0)])
def test_reduction_of_a_mixture(path, reduction, factor):
    """The sum is over rows and, but for the cosine, channels."""
    student, teacher, weight = inputs()
    options = {"normalization": "layer_norm", "reduction": reduction}
    cosine, mse = (ortho_proj_loss(student, teacher, weight, loss=loss, **options) for loss in ("cosine", "mse"))
    mean = [ortho_proj_loss(student, teacher, weight, loss=loss) for loss in ("cosine", "mse")]
    rows = 13 if reduction == "sum" else 1
    torch.testing.assert_close(cosine, mean[0] * rows)
    torch.testing.assert_close(mse, mean[1] * rows * factor)
    mixture = ortho_proj_loss(student, teacher, weight, loss={"cosine": 0.9, "mse": 0.1}, **options)
    torch.testing.assert_close(mixture, 0.9 * cosine + 0.1 * mse)


# -------------------------------------------------------------------------------------------------- accuracy by dtype


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("loss", MIXTURES, ids=str)
@pytest.mark.parametrize("option", [{}, {"bias": True, "weights": True}, {"normalization": "none", "channels": True}])
def test_errors_are_within_those_of_the_composition(option, loss, dtype):
    for shape in ((37, 20, 45), (130, 40, 200), (9, 70, 33)):
        case = Case(shape, dtype, loss=loss, **option)
        case.check(chunked.loss)
        case.check(lambda spec, inputs: chunked.loss(spec, inputs, workspace_bytes=1))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3, "learned"])
@pytest.mark.parametrize("loss", ["cosine", {"cosine": 0.9, "mse": 0.1}], ids=str)
@pytest.mark.parametrize("normalization", ["layer_norm", "l2", "none"])
@pytest.mark.parametrize("s, t", [(20, 45), (24, 24)])
def test_a_semi_orthogonal_projection_needs_no_z(s, t, normalization, loss, scale, dtype, monkeypatch):
    """Loss and gradients are as exact as those of the composition, through the parametrization."""
    if loss == "cosine":
        scale = 1.0
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    module = vk.OrthoProjLoss(s, t, loss=loss, normalization=normalization, scale=scale, dtype=acc)
    exact = vk.OrthoProjLoss(s, t, loss=loss, normalization=normalization, scale=scale, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x, y = torch.randn(150, s).to(dtype), (2 * torch.randn(150, t) + 1).to(dtype)
    mask = torch.rand(150) * (torch.arange(150) % 4 > 0)

    def run(module, x, y):
        leaf = x.clone().requires_grad_()
        value = module(leaf, y, mask)
        return [value.detach(), *torch.autograd.grad(value, [leaf, *module.parameters()])]

    truth, composed = run(exact, x.double(), y.double()), run(module, x, y)
    called, without_z = [], chunked.semi_orthogonal_loss
    monkeypatch.setattr(dispatch, "CHUNKED_FROM", -1)
    monkeypatch.setattr(chunked, "semi_orthogonal_loss", lambda *a: called.append(1) or without_z(*a))
    got = run(module, x, y)
    assert called
    least = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    for value, of_composition, expected in zip(got, composed, truth, strict=True):
        assert error(value, expected) <= max(1.5 * error(of_composition, expected), least)


@pytest.mark.parametrize("noise", [1.0, 0.1, 0.02])
def test_cosine_without_z_of_a_weight_of_16_bit(noise, monkeypatch):
    """With 16-bit operands, as on a GPU: near 1 it is a small difference, of one and the same rounded weight."""
    monkeypatch.setattr(without_z, "operand_dtype", lambda x: x.dtype)
    case = Case((512, 32, 96), torch.bfloat16, loss="cosine", normalization="none")
    case.weight = torch.randn(96, 32) / 32**0.5
    case.teacher = (case.student.float() @ case.weight.T + noise * torch.randn(512, 96)).bfloat16()
    case.check(chunked.loss)


def test_smooth_l1_in_a_mixture_needs_z(monkeypatch):
    monkeypatch.setattr(dispatch, "CHUNKED_FROM", -1)
    monkeypatch.setattr(chunked, "semi_orthogonal_loss", None)  # calling it fails
    vk.OrthoProjLoss(5, 9, loss={"cosine": 0.9, "smooth_l1": 0.1})(torch.randn(4, 5), torch.randn(4, 9))


# ------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("normalization", ["layer_norm", "none"])
def test_a_row_of_zeros_has_the_loss_1(path, normalization, module):
    student, teacher, _ = inputs(dtype=torch.float32)
    projection = vk.OrthoProjLoss(5, 9, loss="cosine", normalization=normalization)
    student[0], teacher[1] = 0, 0
    value = (
        projection(student[:2], teacher[:2])
        if module
        else ortho_proj_loss(student[:2], teacher[:2], torch.randn(9, 5), loss="cosine", normalization=normalization)
    )
    torch.testing.assert_close(value, torch.tensor(1.0))
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(projection(leaf, teacher), leaf)
    assert gradient[1:].isfinite().all()


def test_what_masked_rows_hold_counts_nowhere(path):
    student, teacher, weight = inputs()
    mask = torch.arange(13) > 3
    for loss in MIXTURES:
        clean = ortho_proj_loss(student, teacher, weight, mask=mask, loss=loss)
        dirty = [student.clone(), teacher.clone()]
        dirty[0][:2], dirty[1][1:4] = math.nan, math.inf
        leaf = dirty[0].requires_grad_()
        value = ortho_proj_loss(leaf, dirty[1], weight, mask=mask, loss=loss)
        torch.testing.assert_close(value, clean)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert gradient.isfinite().all() and torch.count_nonzero(gradient[:4]) == 0
        nothing = ortho_proj_loss(leaf, teacher, weight, mask=torch.zeros(13), loss=loss)
        assert nothing == 0 and torch.count_nonzero(torch.autograd.grad(nothing, leaf)[0]) == 0


@pytest.mark.parametrize("where", ["student", "teacher", "weight"])
def test_nan_goes_through(path, where):
    tensors = dict(zip(("student", "teacher", "weight"), inputs(dtype=torch.float32), strict=True))
    tensors[where][3, 2] = math.nan
    leaf = tensors["student"].requires_grad_()
    value = ortho_proj_loss(**tensors, loss="cosine")
    assert value.isnan()
    (gradient,) = torch.autograd.grad(value, leaf)
    assert gradient[3].isnan().any() and (where == "weight" or gradient[:3].isfinite().all())


@pytest.mark.parametrize("scale", [2.0, torch.tensor(1.0)])
def test_a_scale_beside_the_cosine_alone_is_refused(scale):
    """It cancels; in a mixture it acts on the other losses, and a gain of each channel changes angles."""
    student, teacher, weight = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="scale has no effect on the loss 'cosine' alone, which compares angles"):
        ortho_proj_loss(student, teacher, weight, loss="cosine", scale=scale)
    with pytest.raises(ValueError, match="scale has no effect"):
        ortho_proj_losses([student], [teacher], weight[None], loss={"cosine": 2.0, "mse": 0.0}, scale=scale)
    ortho_proj_loss(student, teacher, weight, loss={"cosine": 1.0, "mse": 1.0}, scale=scale)
    ortho_proj_loss(student, teacher, weight, loss="cosine", scale=torch.rand(9))


@pytest.mark.parametrize("scale", [0.5, "match", "learned"])
def test_a_module_of_the_cosine_alone_takes_no_scale(scale):
    with pytest.raises(ValueError, match="scale has no effect on the loss 'cosine' alone"):
        vk.OrthoProjLoss(5, 9, loss="cosine", scale=scale)
    vk.OrthoProjLoss(5, 9, loss="cosine", affine=True)(torch.randn(4, 5), torch.randn(4, 9))
    vk.OrthoProjLoss(5, 9, loss={"cosine": 0.5, "mse": 0.5}, scale=scale)


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        ({"cosine": 0.5, "l1": 0.5}, ValueError, "a key of loss must be one of 'smooth_l1', 'mse', 'cosine'; got 'l1'"),
        ({"cosine": "1"}, TypeError, r"loss\['cosine'\] must be a number; got str"),
        ({"cosine": -1.0}, ValueError, r"loss\['cosine'\] must be a finite number >= 0; got -1.0"),
        ({"cosine": 0.0}, ValueError, "loss must have a share above 0; got"),
        ({}, ValueError, "loss must have a share above 0; got {}"),
    ],
)
def test_bad_mixtures(loss, kind, message):
    student, teacher, weight = inputs(dtype=torch.float32)
    with pytest.raises(kind, match=message):
        ortho_proj_loss(student, teacher, weight, loss=loss)
    with pytest.raises(kind, match=message):
        vk.OrthoProjLoss(5, 9, loss=loss)


# ----------------------------------------------------------------------------- groups, ranks, autocast, compile, resume


@pytest.mark.parametrize("loss", MIXTURES, ids=str)
@pytest.mark.parametrize("normalization", api.NORMALIZATIONS)
def test_a_group_is_each_alone(path, normalization, loss):
    rows = [7, 1, 20]
    students, teachers = ([torch.randn(n, c, dtype=torch.float64) for n in rows] for c in (5, 9))
    weights = vk.cayley(torch.randn(3, 9, 5, dtype=torch.float64)).requires_grad_()
    masks = [None, None, torch.arange(20) % 3 > 0]
    options = {"normalization": normalization, "loss": loss, "eps": 0.1}
    grouped = ortho_proj_losses(students, teachers, weights, masks=masks, **options)
    alone = [
        ortho_proj_loss(x, y, p, mask=mask, **options)
        for x, y, p, mask in zip(students, teachers, weights, masks, strict=True)
    ]
    torch.testing.assert_close(grouped, torch.stack(alone))
    torch.testing.assert_close(*(torch.autograd.grad(v, weights)[0] for v in (grouped.sum(), sum(alone))))


def test_autocast(path):
    student, teacher, weight = inputs(n=64, s=20, t=40, dtype=torch.float32)
    for loss in MIXTURES:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = ortho_proj_loss(student, teacher, weight, loss=loss)
        expected = ortho_proj_loss(student.bfloat16(), teacher, weight, loss=loss)
        assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_compiles_to_one_graph(path):
    torch._dynamo.reset()
    module = vk.OrthoProjLoss(5, 9, loss=MIXTURES[1], normalization=Doubled())
    student, teacher, _ = inputs(dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for function in (module, compiled):
        x = student.clone().requires_grad_()
        value = function(x, teacher, torch.arange(13) > 2)
        results.append([value.detach(), *torch.autograd.grad(value, [x, *module.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def rank(number):
    whole = inputs()
    mask = torch.arange(13) % 3 > 0
    mine = slice(0, 4) if number == 0 else slice(4, None)
    for loss in MIXTURES:
        for normalization in api.NORMALIZATIONS:
            torch.manual_seed(0)
            options = {"loss": loss, "normalization": normalization, "eps": 0.1, "dtype": torch.float64}
            alone = vk.OrthoProjLoss(5, 9, **options)
            ours = vk.OrthoProjLoss(5, 9, process_group=dist.group.WORLD, **options)
            ours.load_state_dict(alone.state_dict())
            expected = alone(whole[0], whole[1], mask)
            value = ours(whole[0][mine], whole[1][mine], mask[mine])
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
            expected.backward()
            value.backward()
            for parameter, other in zip(ours.parameters(), alone.parameters(), strict=True):
                dist.all_reduce(parameter.grad)
                torch.testing.assert_close(parameter.grad / 2, other.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_ranks_equal_one(tmp_path):
    processes.run_ranks(rank, tmp_path)


# -------------------------------------------------------------------------------------------------- targets by a module


class Doubled(nn.Module):
    """Twice the features, without the masked rows' part in a count that the module keeps."""

    counted: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("counted", torch.zeros(()))

    def forward(self, features, mask):
        self.counted += features[..., 0].numel() if mask is None else mask.sum()
        return 2 * features


def test_the_module_gets_features_and_mask_as_they_came(path):
    student, teacher, weight = inputs(n=12, dtype=torch.float32)
    mask = (torch.arange(12) % 5 > 0).view(3, 4)
    seen = []

    class Seen(nn.Module):
        def forward(self, features, mask):
            seen.append((features.shape, mask, torch.is_grad_enabled(), features.requires_grad))
            return features.flip(-1)

    teacher.requires_grad_()
    value = ortho_proj_loss(student.view(3, 4, 5), teacher.view(3, 4, 9), weight, mask=mask, normalization=Seen())
    assert seen == [((3, 4, 9), mask, False, False)]
    expected = ortho_proj_loss(student, teacher.flip(-1), weight, mask=mask.view(-1), normalization="none")
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("loss", ["smooth_l1", "mse", "cosine"])
def test_a_module_as_normalization(path, loss):
    """It trains nothing, moves, is saved and copied with the loss, and follows its mode."""
    module = vk.OrthoProjLoss(5, 9, loss=loss, normalization=Doubled())
    student, teacher, _ = inputs(dtype=torch.float32)
    value = module(student, teacher, torch.arange(13) > 2)
    expected = vk.functional.ortho_proj_loss(
        student, 2 * teacher, module.projection.weight, mask=torch.arange(13) > 2, normalization="none", loss=loss
    )
    torch.testing.assert_close(value, expected)
    assert module.state_dict()["normalization.counted"] == 10
    fresh = vk.OrthoProjLoss(5, 9, loss=loss, normalization=Doubled())
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(student, teacher, torch.arange(13) > 2), value)
    assert not module.eval().normalization.training and "Doubled" in repr(module)
    grouped = ortho_proj_losses([student], [teacher], torch.randn(1, 9, 5), normalization=Doubled(), loss=loss)
    assert grouped.isfinite().all()


@pytest.mark.parametrize("target", [None, torch.ones(13, 8), torch.ones(13, 9, dtype=torch.long)])
def test_a_module_that_returns_something_else(target):
    class Wrong(nn.Module):
        def forward(self, features, mask):
            return target

    student, teacher, weight = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"normalization must return floating targets .* \(13, 9\); Wrong returned"):
        ortho_proj_loss(student, teacher, weight, normalization=Wrong())


def test_the_reference_takes_any_spec():
    """As the other implementations: reference.loss(spec, inputs) is what they are held to."""
    case = Case((7, 3, 5), torch.float64, loss={"cosine": 0.3, "mse": 0.7}, bias=True)
    value, _ = case.run(reference.loss)
    assert LossSpec.shares({"mse": 0.7, "cosine": 0.3, "smooth_l1": 0.0}) == case.spec.loss
    torch.testing.assert_close(value, case.run(chunked.loss)[0])


@pytest.mark.parametrize("normalization", ["layer_norm", "batch_norm"])
def test_a_group_compiles_to_one_graph(path, normalization):
    torch._dynamo.reset()
    students, teachers = ([torch.randn(n, c) for n in (7, 20)] for c in (5, 9))
    weights = torch.randn(2, 9, 5, requires_grad=True)

    def function(weights):
        return ortho_proj_losses(students, teachers, weights, normalization=normalization, loss={"cosine": 1, "mse": 1})

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        losses = run(weights)
        results.append([losses.detach(), *torch.autograd.grad(losses.sum(), weights)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
