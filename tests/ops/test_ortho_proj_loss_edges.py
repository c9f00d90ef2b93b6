"""Arguments at the edges of what the loss takes: eps of 0, extreme weights and betas, dtypes that differ."""

import math

import numpy as np
import pytest
import torch

import vkd_kernels as vk
from tests.helpers.loss_cases import error
from vkd_kernels.functional import ortho_proj_loss, ortho_proj_losses, standardize, whiten
from vkd_kernels.ops import checks
from vkd_kernels.ops.ortho_proj_loss import api, chunks, dispatch


@pytest.fixture(params=["reference", "chunked"])
def path(request, monkeypatch):
    """Both ways PyTorch takes: the definition, and (chosen by itself for large problems) chunks of rows."""
    monkeypatch.setattr(dispatch, "CHUNKED_FROM", -1 if request.param == "chunked" else math.inf)
    return request.param


def tensors(n=6, s=3, t=4):
    return torch.randn(n, s), torch.randn(n, t), torch.randn(t, s)


@pytest.mark.parametrize("loss", api.LOSSES)
@pytest.mark.parametrize("normalization", api.NORMALIZATIONS)
def test_eps_of_0_with_a_masked_row(path, normalization, loss):
    """A masked row is a row of zeros, which eps = 0 makes NaN: it must not reach the loss or a gradient."""
    student, teacher, weight = tensors(n=30)
    mask = torch.arange(30) % 5 > 0
    leaves = [student.requires_grad_(), weight.requires_grad_()]
    options = {"normalization": normalization, "loss": loss, "eps": 0.0}
    value = ortho_proj_loss(student, teacher, weight, mask=mask, **options)
    expected = ortho_proj_loss(student[mask], teacher[mask], weight, **options)
    torch.testing.assert_close(value, expected)
    for got, want in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1e-50, 1e-300, 1.0, 1e50])
@pytest.mark.parametrize("normalization", api.NORMALIZATIONS)
def test_float64_mask_weights_of_any_size(path, normalization, size):
    """A weighted mean does not depend on the weights' size, and float32 has no 1e-50."""
    student, teacher, weight = tensors()
    relative = torch.linspace(0, 1, 6, dtype=torch.float64)
    options = {"normalization": normalization, "eps": 0.1}
    value = ortho_proj_loss(student, teacher, weight, mask=size * relative, **options)
    torch.testing.assert_close(value, ortho_proj_loss(student, teacher, weight, mask=relative.float(), **options))
    masks = [size * relative, None]
    values = ortho_proj_losses([student] * 2, [teacher] * 2, torch.stack([weight] * 2), masks=masks, **options)
    torch.testing.assert_close(values[0], value)


@pytest.mark.parametrize("weights", [[1.0, -1e-3, 2.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [1e38, 3e38, 1.0]])
def test_weights_that_are_none_are_refused(path, weights):
    """Negative, NaN, infinite, or of a sum that float32 has no number for: a mistake of the caller's in every case."""
    student, teacher, weight = tensors(n=3)
    mask = torch.tensor(weights)
    with pytest.raises(ValueError, match=r"^mask must hold bools, or finite weights .* shape \(3,\)"):
        ortho_proj_loss(student, teacher, weight, mask=mask)
    with pytest.raises(ValueError, match=r"^masks\[1\] must hold bools"):
        ortho_proj_losses([student] * 2, [teacher] * 2, torch.stack([weight] * 2), masks=[None, mask])
    for function in (standardize, whiten):
        with pytest.raises(ValueError, match="^mask must hold bools"):
            function(teacher, mask=mask)


@pytest.mark.parametrize("reduction", api.REDUCTIONS)
@pytest.mark.parametrize("normalization", api.NORMALIZATIONS)
@pytest.mark.parametrize("backend", [None, "triton"])
def test_where_nobody_looks_a_negative_weight_is_0_and_nan_shows(path, monkeypatch, backend, normalization, reduction):
    """On a GPU looking would stall: there, too, every implementation takes the weights for the same."""
    monkeypatch.setattr(checks, "is_free_to_read", lambda tensor: False)
    student, teacher, weight = tensors(n=30)
    leaves = [student.requires_grad_(), weight.requires_grad_()]
    options = {"normalization": normalization, "reduction": reduction, "eps": 0.1, "backend": backend}
    mask = torch.rand(30) + 0.5
    mask[4] = 0
    negative = mask.clone()
    negative[4] = -1
    value, expected = (ortho_proj_loss(student, teacher, weight, mask=w, **options) for w in (negative, mask))
    assert torch.equal(value, expected)
    for got, want in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.equal(got, want)
    negative[5] = math.nan
    assert ortho_proj_loss(student, teacher, weight, mask=negative, **options).isnan()


def test_a_compiled_loss_takes_a_negative_weight_for_0():
    student, teacher, weight = tensors()
    loss = torch.compile(ortho_proj_loss, backend="aot_eager", fullgraph=True)
    value = loss(student, teacher, weight, mask=torch.tensor([1.0, 2.0, -1.0, 1.0, 0.5, 3.0]))
    mask = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 3.0])
    torch.testing.assert_close(value, ortho_proj_loss(student, teacher, weight, mask=mask))


def test_float64_mask_weights_of_nothing(path):
    student, teacher, weight = tensors()
    assert ortho_proj_loss(student, teacher, weight, mask=torch.zeros(6, dtype=torch.float64)) == 0


@pytest.mark.parametrize("normalization", api.NORMALIZATIONS)
def test_a_float64_bias_or_scale_leaves_the_loss_in_float32(path, normalization):
    student, teacher, weight = tensors(n=30)
    bias, scale = torch.randn(4), torch.rand(4) + 0.5
    options = {"normalization": normalization, "eps": 0.1}
    leaves = [bias.double().requires_grad_(), scale.double().requires_grad_()]
    value = ortho_proj_loss(student, teacher, weight, bias=leaves[0], scale=leaves[1], **options)
    expected = ortho_proj_loss(student, teacher, weight, bias=bias, scale=scale, **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    assert all(gradient.dtype == torch.float64 for gradient in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [1e-320, 1e-200, 1e-45, 1e-30, 1e30, 1e38, 1e39, 1e300])
def test_extreme_beta(path, beta, dtype):
    """d = 0 has gradient 0 and no NaN, also where the loss's dtype has no number for beta."""
    student, teacher, weight = (x.to(dtype) for x in tensors())
    student[0] = teacher[0] = 0
    leaf = student.clone().requires_grad_()
    value = ortho_proj_loss(leaf, teacher, weight, normalization="none", beta=beta)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.isfinite() and gradient.isfinite().all() and torch.count_nonzero(gradient[0]) == 0
    d = (student.double() @ weight.double().T - teacher.double()).abs()
    truth = torch.where(d < beta, d * (0.5 * d / beta), d - beta / 2).mean()
    assert abs(value - truth) <= (1e-2 if dtype == torch.bfloat16 else 1e-6) * truth + 1e-38


@pytest.mark.parametrize("grouped", [False, True])
def test_a_mask_that_requires_a_gradient_is_refused(grouped):
    """It is a constant: no gradient reaches it."""
    student, teacher, weight = tensors()
    mask = torch.rand(6, requires_grad=True)
    with pytest.raises(ValueError, match=r"masks?(\[0\])? is a constant, but .* requires a gradient: pass its detach"):
        if grouped:
            ortho_proj_losses([student], [teacher], weight[None], masks=[mask])
        else:
            ortho_proj_loss(student, teacher, weight, mask=mask)
    with torch.no_grad():
        ortho_proj_loss(student, teacher, weight, mask=mask)


@pytest.mark.parametrize("loss", api.LOSSES)
@pytest.mark.parametrize("normalization", api.NORMALIZATIONS)
def test_a_teacher_that_ran_in_inference_mode(path, normalization, loss):
    student, _, weight = tensors()
    with torch.inference_mode():
        teacher = torch.randn(6, 4)
    leaves = [student.requires_grad_(), weight.requires_grad_()]
    value = ortho_proj_loss(student, teacher, weight, normalization=normalization, loss=loss, eps=0.1)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("normalization", api.NORMALIZATIONS)
@pytest.mark.parametrize("name", ["student", "weight", "scale", "bias"])
def test_forward_mode_derivatives(path, name, normalization, enabled):
    """By the reference where nothing was asked for: the other implementations would lose the tangent."""
    student, teacher, weight = (x.double() for x in tensors(n=30))
    arguments = {"student": student, "weight": weight, "scale": torch.rand(()).double() + 1, "bias": torch.randn(4)}
    tangent = torch.randn_like(arguments[name])
    options = {"normalization": normalization, "eps": 0.1}

    def losses(value):
        given = arguments | {name: value}
        one = ortho_proj_loss(teacher=teacher, **given, **options)
        students, weights, bias = [given["student"]], given["weight"][None], given["bias"][None]
        several = ortho_proj_losses(students, [teacher], weights, scale=given["scale"], bias=bias, **options)
        return torch.stack([one, several[0]])

    _, expected = torch.func.jvp(losses, (arguments[name],), (tangent,))
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(enabled):
        dual = torch.autograd.forward_ad.make_dual(arguments[name], tangent)
        got = torch.autograd.forward_ad.unpack_dual(losses(dual)).tangent
    torch.testing.assert_close(got, expected)
    assert expected[0].abs() > 1e-8 or normalization == "batch_norm"


@pytest.mark.parametrize("operands", ["float32", "of 16 bit"])
@pytest.mark.parametrize(
    "dtype, of_student, of_weight", [(torch.bfloat16, 1.6e-2, 3e-3), (torch.float16, 2e-3, 4e-4)], ids=str
)
def test_batch_norm_of_16_bit_students(dtype, of_student, of_weight, operands, monkeypatch):
    """The gradient along Z cancels in the weight's, and 1 / (N T) is below float16's range: 37 % were lost there.

    The student's cancels likewise, after it was rounded: see docs/kernels.md.
    """
    monkeypatch.setattr(dispatch, "CHUNKED_FROM", -1)
    if operands == "of 16 bit":  # as on a GPU
        monkeypatch.setattr(chunks, "operand_dtype", lambda x: x.dtype)
    student = (0.1 + 0.01 * torch.randn(4096, 32)).to(dtype)
    teacher, weight = torch.randn(4096, 1152).to(dtype), vk.cayley(torch.randn(1152, 32))

    def gradients(student, teacher, weight, **options):
        leaves = [student.detach().requires_grad_(), weight.detach().requires_grad_()]
        value = ortho_proj_loss(leaves[0], teacher, leaves[1], normalization="batch_norm", **options)
        return torch.autograd.grad(value, leaves, torch.full_like(value, 2.0**14))

    exact = gradients(student.double(), teacher.double(), weight.double(), backend="torch")
    got = gradients(student, teacher, weight)
    assert error(got[0], exact[0]) <= of_student
    assert error(got[1], exact[1]) <= of_weight


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_numbers_of_numpy_are_numbers(backend):
    """numpy.float64 is a float; Triton took it for none, and later a 1.0 for it."""
    student, teacher, weight = tensors()
    for beta, eps in ((np.float64(1.0), np.float64(1e-5)), (np.float64(2.0), np.float64(1e-5)), (1.0, 1e-5), (1, 1e-5)):
        options = {"beta": beta, "eps": eps, "backend": backend}
        value = ortho_proj_loss(student, teacher, weight, **options)
        module = vk.OrthoProjLoss(3, 4, projection="linear", **options)
        module.projection.weight.data = weight
        torch.testing.assert_close(value, module(student, teacher))
        assert torch.equal(value, ortho_proj_loss(student, teacher, weight, **options))
