"""The projected feature loss on the PyTorch reference and its chunked twin, through the public interface."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import vkd_kernels as vk
from vkd_kernels.functional import ortho_proj_loss
from vkd_kernels.ops.ortho_proj_loss import api, chunked, dispatch

NORMALIZATIONS = api.NORMALIZATIONS
BOTH_LOSSES = [("smooth_l1", 1.0), ("smooth_l1", 0.1), ("mse", 1.0)]


@pytest.fixture(params=["reference", "chunked"])
def path(request, monkeypatch):
    """Both ways PyTorch takes: the definition, and (chosen by itself for large problems) chunks of rows."""
    monkeypatch.setattr(dispatch, "CHUNKED_FROM", -1 if request.param == "chunked" else math.inf)
    return request.param


def inputs(n=13, s=5, t=9, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, s, generator=generator, dtype=torch.float64)
    teacher = torch.randn(n, t, generator=generator, dtype=torch.float64) * 2 + 0.7
    weight = vk.cayley(torch.randn(t, s, generator=generator, dtype=torch.float64))
    return [x.to(dtype) for x in (student, teacher, weight)]


def literal(student, teacher, weight, *, normalization, loss, beta, eps, scale=None, bias=None, mask=None):
    """DESIGN's formulas word for word on the rows that the mask keeps, by loops where there is a choice."""
    keep = torch.ones(len(student), dtype=torch.bool) if mask is None else mask > 0
    w = torch.ones(len(student), dtype=student.dtype) if mask is None else mask.to(student.dtype)
    student, teacher, w = student[keep], teacher[keep], w[keep]
    z = student @ weight.T * (1 if scale is None else scale) + (0 if bias is None else bias)

    def mean_of(x):
        return (x * w[:, None]).sum(0) / w.sum()

    if normalization == "layer_norm":
        mu, var = teacher.mean(1, keepdim=True), teacher.var(1, unbiased=False, keepdim=True)
        target = (teacher - mu) / (var + eps).sqrt()
    elif normalization == "batch_norm":
        target = (teacher - mean_of(teacher)) / (mean_of((teacher - mean_of(teacher)) ** 2) + eps).sqrt()
        z = (z - mean_of(z)) / (mean_of((z - mean_of(z)) ** 2) + eps).sqrt()
    elif normalization == "whiten":
        centered = teacher - mean_of(teacher)
        sigma = (centered * w[:, None]).T @ centered / (w.sum() - (w * w).sum() / w.sum())
        t = sigma.shape[0]
        sigma = (1 - eps) * sigma + eps * sigma.trace() / t * torch.eye(t, dtype=sigma.dtype)
        values, vectors = torch.linalg.eigh(sigma)
        target = centered @ vectors @ torch.diag(values**-0.5) @ vectors.T
    elif normalization == "l2":
        target = torch.stack([row / max(row.norm(), eps) for row in teacher])
    else:
        target = teacher
    d = (z - target).abs()
    rho = d * d if loss == "mse" else torch.where(d < beta, 0.5 * d * d / beta, d - beta / 2)
    return (rho * w[:, None]).sum() / (w.sum() * teacher.shape[1])


@pytest.mark.parametrize("masked", ["no mask", "bool", "weights"])
@pytest.mark.parametrize(("loss", "beta"), BOTH_LOSSES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_equals_the_literal_formula_with_gradients(path, normalization, loss, beta, masked):
    student, teacher, weight = inputs()
    mask = {
        "no mask": None,
        "bool": torch.arange(13) % 3 != 0,
        "weights": torch.arange(13, dtype=torch.float64) % 4 / 3,
    }[masked]
    scale, bias = torch.rand(9, dtype=torch.float64) + 0.5, torch.randn(9, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (student, weight, scale, bias)]
    options = {"normalization": normalization, "loss": loss, "beta": beta, "eps": 1e-2}
    results = []
    for f in (ortho_proj_loss, literal):
        x, p, a, b = leaves
        value = f(x, teacher, p, scale=a, bias=b, mask=mask, **options)
        results.append([value.detach(), *torch.autograd.grad(value, leaves, torch.tensor(0.7, dtype=torch.float64))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("loss", "beta"), [("smooth_l1", 0.5), ("mse", 1.0)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradcheck(path, normalization, loss, beta):
    student, teacher, weight = inputs(n=6, s=3, t=4)
    mask = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (student, weight, torch.tensor(1.3, dtype=torch.float64))]

    def f(x, p, scale):
        return ortho_proj_loss(
            x, teacher, p, scale=scale, mask=mask, normalization=normalization, loss=loss, beta=beta, eps=1e-2
        )

    assert torch.autograd.gradcheck(f, leaves)
    if path == "reference" and loss == "mse":
        assert torch.autograd.gradgradcheck(f, leaves)


def test_torch_parity_for_the_papers_classification():
    student, teacher, weight = inputs(dtype=torch.float32)
    expected = F.smooth_l1_loss(F.linear(student, weight), F.layer_norm(teacher, (9,)))
    torch.testing.assert_close(ortho_proj_loss(student, teacher, weight), expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_sum_is_mean_times_the_number_of_elements(path, normalization):
    student, teacher, weight = inputs()
    mask = torch.arange(13) < 8
    mean, total = (
        ortho_proj_loss(student, teacher, weight, normalization=normalization, mask=mask, reduction=r)
        for r in ("mean", "sum")
    )
    torch.testing.assert_close(total, mean * 8 * 9)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_rows_of_any_shape(path, normalization):
    student, teacher, weight = inputs(n=12)
    mask = torch.arange(12) % 5 > 0
    flat = ortho_proj_loss(student, teacher, weight, mask=mask, normalization=normalization)
    shaped = ortho_proj_loss(
        student.view(2, 3, 2, 5), teacher.view(2, 3, 2, 9), weight, mask=mask.view(2, 3, 2), normalization=normalization
    )
    spatial = ortho_proj_loss(  # channels last in memory, no unit channel stride
        student.T.contiguous().T,
        teacher.T.contiguous().T,
        weight.T.contiguous().T,
        mask=mask,
        normalization=normalization,
    )
    torch.testing.assert_close(shaped, flat)
    torch.testing.assert_close(spatial, flat)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_what_masked_rows_hold_counts_nowhere(path, normalization, poison):
    student, teacher, weight = inputs()
    mask = torch.arange(13) > 3
    clean = [student.clone().requires_grad_(), weight.clone().requires_grad_()]
    dirty = [student.clone(), weight.clone().requires_grad_()]
    dirty[0][:2] = poison
    dirty[0].requires_grad_()
    spoilt_teacher = teacher.clone()
    spoilt_teacher[1:4] = poison
    options = {"mask": mask, "normalization": normalization, "eps": 1e-2}
    expected = ortho_proj_loss(clean[0], teacher, clean[1], **options)
    value = ortho_proj_loss(dirty[0], spoilt_teacher, dirty[1], **options)
    torch.testing.assert_close(value, expected)
    for got, want in zip(torch.autograd.grad(value, dirty), torch.autograd.grad(expected, clean), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mask", [torch.zeros(13, dtype=torch.bool), torch.zeros(13)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_all_rows_masked_gives_zero_loss_and_zero_gradients(path, normalization, reduction, mask):
    student, teacher, weight = inputs(dtype=torch.float32)
    leaves = [student.requires_grad_(), weight.requires_grad_()]
    value = ortho_proj_loss(student, teacher, weight, mask=mask, normalization=normalization, reduction=reduction)
    assert value.item() == 0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("where", ["student", "teacher", "weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("loss", ["smooth_l1", "mse"])
def test_nan_and_inf_reach_the_loss(path, loss, normalization, value, where):
    tensors = dict(zip(("student", "teacher", "weight"), inputs(dtype=torch.float32), strict=True))
    tensors[where][3, 2] = value
    tensors["student"].requires_grad_()
    result = ortho_proj_loss(**tensors, normalization=normalization, loss=loss)
    assert not math.isfinite(result.item())
    (grad,) = torch.autograd.grad(result, tensors["student"])
    if math.isnan(value):
        assert grad.isnan().any()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_constant_teacher_and_a_single_row(path, normalization):
    student, _, weight = inputs(n=1, dtype=torch.float32)
    value = ortho_proj_loss(student.requires_grad_(), torch.full((1, 9), 3.0), weight, normalization=normalization)
    assert math.isfinite(value.item())
    assert torch.autograd.grad(value, student)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_16_bit_student_keeps_a_float32_loss(path, normalization, dtype):
    student, teacher, weight = inputs(n=200, s=20, t=40)
    half = student.to(dtype)
    truth = ortho_proj_loss(half.double(), teacher, weight, normalization=normalization)
    value = ortho_proj_loss(half, teacher.float(), weight.float(), normalization=normalization)
    assert value.dtype == torch.float32
    assert abs(value.item() / truth.item() - 1) < 2e-3


def test_autocast_takes_the_product_in_16_bit_and_the_rest_in_float32():
    student, teacher, weight = inputs(n=64, s=20, t=40, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ortho_proj_loss(student, teacher, weight)
    expected = ortho_proj_loss(student.bfloat16(), teacher, weight)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_float64_gives_float64():
    assert ortho_proj_loss(*inputs()).dtype == torch.float64


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_every_combination_of_gradients(path, needs):
    student, teacher, weight = inputs(dtype=torch.float32)
    leaves = [student, weight, torch.randn(9)]
    before = [x.clone() for x in (*leaves, teacher)]
    for x, need in zip(leaves, needs, strict=True):
        x.requires_grad_(need)
    value = ortho_proj_loss(leaves[0], teacher.requires_grad_(), leaves[1], bias=leaves[2])
    assert value.requires_grad == any(needs)
    if any(needs):
        value.backward(retain_graph=True)
        first = [x.grad.clone() for x in leaves if x.requires_grad]
        value.backward()
        for x, g in zip([x for x in leaves if x.requires_grad], first, strict=True):
            assert torch.equal(x.grad, 2 * g)
    assert [x.grad is not None for x in leaves] == list(needs)
    assert teacher.grad is None
    assert all(torch.equal(a, b) for a, b in zip((*leaves, teacher), before, strict=True))


def test_large_problems_go_by_chunks_unless_the_reference_is_asked_for(monkeypatch):
    called = []
    monkeypatch.setattr(chunked, "loss", lambda *a, **k: called.append(1) or torch.zeros(()))
    monkeypatch.setattr(dispatch, "CHUNKED_FROM", 100)
    tensors = inputs(dtype=torch.float32)
    ortho_proj_loss(*tensors, backend="torch")
    monkeypatch.setenv("VKD_KERNELS_BACKEND", "torch")
    ortho_proj_loss(*tensors)
    assert not called
    monkeypatch.delenv("VKD_KERNELS_BACKEND")
    ortho_proj_loss(*tensors)
    assert called


def test_compiles_to_one_graph(path):
    module = vk.OrthoProjLoss(5, 9, affine=True, scale="learned", normalization="batch_norm")
    student, teacher, _ = inputs(dtype=torch.float32)
    mask = torch.arange(13) > 2
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for f in (module, compiled):
        x = student.clone().requires_grad_()
        value = f(x, teacher, mask)
        results.append([value.detach(), *torch.autograd.grad(value, [x, *module.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


GOOD = dict(zip(("student", "teacher", "weight"), inputs(dtype=torch.float32), strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": [1.0]}, TypeError, "student must be a tensor; got list"),
        ({"student": torch.ones(13, 5, dtype=torch.long)}, TypeError, "student .*float32.*got a int64 tensor"),
        ({"student": torch.randn(13, 6)}, ValueError, r"student .* S = 5.*\(9, 5\).*got \(13, 6\)"),
        ({"teacher": torch.randn(13, 8)}, ValueError, r"teacher .* T = 9.*got \(13, 8\)"),
        ({"teacher": torch.randn(12, 9)}, ValueError, r"same rows.*\(13, 5\).*\(12, 9\)"),
        ({"student": torch.randn(5), "teacher": torch.randn(9)}, ValueError, "student must have the shape"),
        ({"student": torch.randn(0, 5), "teacher": torch.randn(0, 9)}, ValueError, r"student is empty.*\(0, 5\)"),
        ({"weight": torch.randn(9)}, ValueError, r"weight must have the shape \(T, S\); got \(9,\)"),
        ({"student": torch.randn(13, 5).double()}, TypeError, "all be float64 or none; got student torch.float64"),
        ({"teacher": torch.randn(13, 9, device="meta")}, ValueError, "teacher must be on student's device; got .*meta"),
        ({"normalization": "layernorm"}, ValueError, "normalization must be one of 'layer_norm'.*got 'layernorm'"),
        ({"loss": "l2"}, ValueError, "loss must be one of 'smooth_l1', 'mse', 'cosine'; got 'l2'"),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum'; got 'none'"),
        ({"beta": 0}, ValueError, "beta must be a finite number > 0; got 0"),
        ({"beta": "1"}, TypeError, "beta must be a number; got str"),
        ({"eps": -1e-5}, ValueError, "eps must be a finite number >= 0; got -1e-05"),
        ({"eps": 2.0, "normalization": "whiten"}, ValueError, "eps must be .* <= 1; got 2.0"),
        ({"eps": math.nan}, ValueError, "eps must be a finite number"),
        ({"scale": torch.randn(5)}, ValueError, r"scale must be .* \(T,\) = \(9,\); got \(5,\)"),
        ({"scale": "match"}, TypeError, "scale must be a number; got str"),
        ({"bias": torch.randn(5)}, ValueError, r"bias must have the shape \(T,\) = \(9,\); got \(5,\)"),
        ({"mask": torch.ones(13, dtype=torch.long)}, TypeError, r"mask .*got a int64.*mask.bool\(\)"),
        ({"mask": torch.ones(13, 1)}, ValueError, r"mask must have the shape of the rows \(13,\); got \(13, 1\)"),
        ({"process_group": 3}, TypeError, "process_group must be None or .*ProcessGroup; got int"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of .*; got 'cuda'"),
        (
            {
                "backend": "triton",
                "student": torch.randn(13, 5).double(),
                "teacher": torch.randn(13, 9).double(),
                "weight": torch.randn(9, 5).double(),
            },
            RuntimeError,
            "backend='triton' was requested for ortho_proj_loss, but ",
        ),
        ({"backend": "extension"}, RuntimeError, "'extension' was requested .* no 'extension' backend"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        ortho_proj_loss(**{**GOOD, **changes})
