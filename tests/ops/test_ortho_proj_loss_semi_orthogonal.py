"""Losses with a semi-orthogonal weight: the form without Z, chunked in PyTorch and fused, against the plain form.

Loss and gradients are the plain ones, but for the part of dP that is normal to PᵀP = I.
"""

import itertools

import pytest
import torch

import vkd_kernels as vk
from tests.helpers.loss_cases import error
from vkd_kernels.ops.ortho_proj_loss import chunked, dispatch, reference, without_z
from vkd_kernels.ops.ortho_proj_loss.spec import LossInputs, LossSpec, acc_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 1), (37, 20, 45), (150, 40, 200), (70, 64, 64), (33, 130, 300), (2, 290, 300)]
# Relative errors: loss, dX and dscale, tangent dP. 16 bit: P is rounded, so PᵀP is off the identity by its eps.
LIMITS = {
    torch.float64: (1e-13, 1e-13, 1e-12),
    torch.float32: (2e-6, 4e-6, 4e-6),
    torch.bfloat16: (4e-3, 1.2e-2, 1.2e-2),
    torch.float16: (4e-4, 1e-3, 1e-3),
}


def one_row_chunks(spec, inputs):
    return chunked.semi_orthogonal_loss(spec, inputs, workspace_bytes=1)


def fused(spec, inputs):
    """Not pooled, in chunks of one tile's rows."""
    triton = pytest.importorskip("vkd_kernels.ops.ortho_proj_loss.triton", reason="needs Triton")
    return triton.semi_orthogonal_loss(spec, inputs, workspace_bytes=1)


pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # numpy, interpreting
FORMS = [one_row_chunks, chunked.semi_orthogonal_loss, fused]


def skip_where_z_is_formed(form, loss="mse"):
    if DEVICE == "cuda" and form is not fused and loss != "cosine":
        pytest.skip("on a GPU the chunked squared error is the plain form")


def tangent(gradient, weight):
    """The part of dP that an orthogonal parametrization lets through: dP - P sym(Pᵀ dP)."""
    inner = weight.mT @ gradient
    return gradient - weight @ (inner + inner.mT) / 2


class Arguments:
    def __init__(self, shape, dtype, weights=False, scale=1.0, normalization="layer_norm", loss="mse"):
        n, s, t = shape
        acc = acc_dtype(dtype)
        self.student = torch.randn(n, s, device=DEVICE).to(dtype)
        self.teacher = (2 * torch.randn(n, t, device=DEVICE) + 3).to(dtype)
        self.orthonormal = torch.linalg.qr(torch.randn(t, s, dtype=torch.float64, device=DEVICE))[0]
        # Rounded to the product's dtype beforehand, which the interpreter's cast would truncate to.
        self.weight = self.orthonormal.to(dtype).to(acc)
        self.row_weight = torch.rand(n, device=DEVICE, dtype=acc) if weights else None
        if weights:
            self.row_weight[1::3] = 0
        self.scale = torch.tensor(scale, device=DEVICE, dtype=acc)
        self.denominator = float(n * t)
        self.spec = LossSpec(normalization=normalization, loss=LossSpec.shares(loss))
        self.grad_output = torch.tensor(3.0, device=DEVICE, dtype=acc)

    def inputs(self, student, weight, scale):
        return LossInputs(
            student=student,
            teacher=self.teacher,
            weight=weight,
            denominator=self.denominator,
            row_weight=self.row_weight,
            scale=scale,
        )

    def run(self, form):
        leaves = [x.detach().requires_grad_() for x in (self.student, self.weight, self.scale)]
        loss = form(self.spec, self.inputs(*leaves))
        return loss, *torch.autograd.grad(loss, leaves, self.grad_output)

    def truth(self):
        student, teacher, row_weight, grad_output = (
            None if x is None else x.double() for x in (self.student, self.teacher, self.row_weight, self.grad_output)
        )
        leaves = [x.detach().double().requires_grad_() for x in (student, self.orthonormal, self.scale)]
        inputs = LossInputs(leaves[0], teacher, leaves[1] * leaves[2], self.denominator, row_weight=row_weight)
        loss = reference.loss(self.spec, inputs)
        return loss, *torch.autograd.grad(loss, leaves, grad_output)

    def check(self, form, slack=1.0):
        dtype = self.student.dtype
        loss, dx, dp, dc = self.run(form)
        true_loss, true_dx, true_dp, true_dc = self.truth()
        assert loss.dtype == dp.dtype == torch.promote_types(dtype, torch.float32) and dx.dtype == dtype
        limits = [slack * limit for limit in LIMITS[dtype]]
        assert error(loss, true_loss) <= limits[0]
        assert error(dx, true_dx) <= limits[1]
        assert error(dc, true_dc) <= limits[1] * max(1.0, (true_loss / true_dc.abs()).item())  # it may cancel to 0
        at = self.orthonormal
        assert error(tangent(dp.double(), at), tangent(true_dp, at)) <= limits[2] or at.shape[0] == 1


def all_shapes():
    """The fused kernels have no float64. With many channels the interpreter takes seconds: one dtype stands for all."""
    cases = []
    for (index, shape), form, dtype in itertools.product(enumerate(SHAPES), FORMS, LIMITS):
        if form is fused and dtype == torch.float64:
            continue
        runs = form is not fused or shape[2] < 300 or dtype == (torch.float32, torch.bfloat16)[index % 2]
        marks = [] if runs else [pytest.mark.thorough]
        cases.append(pytest.param(shape, form, dtype, marks=marks, id=f"{shape}-{form.__name__}-{dtype}"))
    return cases


@pytest.mark.parametrize("shape, form, dtype", all_shapes())
def test_shapes(shape, form, dtype):
    options = [{}, {"weights": True, "scale": 1.7}, {"normalization": "none", "scale": 0.4}]
    Arguments(shape, dtype, **options[SHAPES.index(shape) % 3]).check(form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("normalization", ["layer_norm", "none"])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_options(scale, normalization, weights, form):
    Arguments((37, 20, 45), torch.float32, weights, scale, normalization).check(form)


@pytest.mark.parametrize("form", FORMS)
def test_the_left_out_part_vanishes_through_the_parametrization(form):
    """dP differs from the plain form's, dW through the Cayley transform does not."""
    skip_where_z_is_formed(form)
    arguments = Arguments((37, 20, 45), torch.float32)
    w = torch.randn(45, 20, device=DEVICE, requires_grad=True)
    arguments.orthonormal = vk.cayley(w).detach().double()
    arguments.weight = arguments.orthonormal.float()
    *_, dp, _ = arguments.run(form)
    *_, true_dp, _ = arguments.truth()
    assert error(dp, true_dp) >= 1e-2
    (dw,) = torch.autograd.grad(vk.cayley(w), w, dp, retain_graph=True)
    (true_dw,) = torch.autograd.grad(vk.cayley(w), w, true_dp.float())
    assert error(dw, true_dw.double()) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_large_teacher_mean(form):
    arguments = Arguments((37, 20, 45), torch.float32)
    arguments.teacher += 100
    arguments.check(form, slack=20)  # the mean, 50 deviations away, is rounded to float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channel", [0, 7])
def test_an_outlier_among_the_teachers_channels(channel, form):
    arguments = Arguments((20, 16, 1024), torch.float32)
    arguments.teacher[:, channel] += 100
    arguments.check(form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_float16_holds_the_gradient_of_faint_targets(loss, form):
    """x over the length of the target, or over its deviation, is more than float16 has."""
    skip_where_z_is_formed(form, loss)
    for normalization in ("none", "l2") if loss == "cosine" else ("layer_norm",):
        arguments = Arguments((37, 20, 45), torch.float16, normalization=normalization, loss=loss)
        arguments.teacher[5] = 0
        arguments.teacher[5, 7] = 1e-4 if loss == "cosine" else 0.003
        arguments.student[5, 3] = 300
        arguments.check(form, slack=3.0)


@pytest.mark.parametrize("normalization", ["layer_norm", "none"])
def test_tf32_with_layer_norm_takes_the_plain_form(normalization, monkeypatch):
    """There the error of a product of raw targets goes with their mean."""
    triton = pytest.importorskip("vkd_kernels.ops.ortho_proj_loss.triton", reason="needs Triton")
    monkeypatch.setattr(triton.entry, "tf32_allowed", lambda: True)
    monkeypatch.setattr(triton.entry, "fused_semi_orthogonal_loss", lambda **arguments: ["without Z"])
    arguments = Arguments((37, 20, 45), torch.float32, normalization=normalization)
    inputs = arguments.inputs(arguments.student, arguments.weight, arguments.scale)
    with_z = fused(arguments.spec, inputs) != "without Z"
    assert with_z == (normalization == "layer_norm")


@pytest.mark.parametrize("form", FORMS)
def test_masked_rows_may_hold_anything(form):
    arguments = Arguments((37, 20, 45), torch.float32, weights=True)
    clean = arguments.run(form)
    arguments.student[1], arguments.teacher[4] = torch.nan, torch.inf
    assert all(torch.equal(a, b) for a, b in zip(clean, arguments.run(form), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_goes_through(where, form):
    arguments = Arguments((37, 20, 45), torch.float32)
    getattr(arguments, where)[5, 3] = torch.nan
    loss, dx, dp, dc = arguments.run(form)
    assert loss.isnan() and dc.isnan() and dx[5].isnan().any() and dx[:5].isfinite().all() and dp.isnan().any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("normalization", ["none", "l2", "layer_norm"])
@pytest.mark.parametrize("loss", ["cosine", "mse", {"mse": 1.0, "cosine": 1.0}], ids=str)
def test_one_target_of_zeros_adds_nothing_to_the_gradients(loss, normalization, dtype, form):
    """Its factor, 1e8 or more, is none of float16's numbers; and of a constant row rounding alone is left."""
    skip_where_z_is_formed(form, loss)
    arguments = Arguments((37, 20, 45), dtype, normalization=normalization, loss=loss)
    arguments.teacher[5] = 1 if normalization == "layer_norm" else 0
    arguments.student[5, 3] = 300
    arguments.check(form, slack=3.0)


@pytest.mark.parametrize("form", FORMS)
def test_all_rows_masked(form):
    arguments = Arguments((37, 20, 45), torch.float32, weights=True)
    arguments.row_weight.zero_()
    arguments.denominator = torch.ones((), device=DEVICE)
    assert all(torch.count_nonzero(x) == 0 for x in arguments.run(form))


@pytest.mark.parametrize("form", FORMS)
def test_only_needed_gradients_and_backward_twice(form):
    arguments = Arguments((150, 20, 45), torch.bfloat16, weights=True)
    everything = arguments.run(form)[1:]
    for index in range(8):
        leaves = [x.detach() for x in (arguments.student, arguments.weight, arguments.scale)]
        wanted = [i for i in range(3) if index >> i & 1]
        for i in wanted:
            leaves[i].requires_grad_()
        loss = form(arguments.spec, arguments.inputs(*leaves))
        assert loss.requires_grad == bool(wanted)
        for _ in range(2 if wanted else 0):
            got = torch.autograd.grad(loss, [leaves[i] for i in wanted], arguments.grad_output, retain_graph=True)
            assert all(torch.equal(a, everything[i]) for i, a in zip(wanted, got, strict=True))


def test_opcheck():
    a = Arguments((6, 4, 5), torch.float32, weights=True)
    leaves = [x.requires_grad_() for x in (a.student, a.weight, a.scale)]
    options = "layer_norm", 1e-5, 0.3, 0.7, True, 1 << 20
    torch.library.opcheck(
        chunked.chunked_loss_without_z.overload,
        (leaves[0], a.teacher, leaves[1], leaves[2], a.row_weight, None, 0.5, *options, True, True, True),
    )


def test_fused_opcheck():
    pytest.importorskip("vkd_kernels.ops.ortho_proj_loss.triton.launch", reason="needs Triton")
    a = Arguments((6, 4, 5), torch.float32, weights=True)
    leaves = [x.requires_grad_() for x in (a.student, a.weight, a.scale)]
    torch.library.opcheck(
        torch.ops.vkd_kernels.fused_semi_orthogonal_loss.default,
        (
            leaves[0],
            a.teacher,
            leaves[1],
            leaves[2],
            a.row_weight,
            None,
            0.5,
            "l2",
            1e-5,
            0.3,
            0.7,
            1 << 20,
            *[True] * 3,
        ),
    )


# ------------------------------------------------------------------------ students that have nearly reached the teacher


@pytest.mark.parametrize("s, t", [(24, 24), (24, 60)])
@pytest.mark.parametrize(
    "dtype, offset, noise",
    [
        (torch.float32, 100.0, 1e-4),
        (torch.float32, 100.0, 1e-2),
        (torch.float32, 0.0, 1e-6),
        (torch.bfloat16, 100.0, 0.1),
        (torch.bfloat16, 0.0, 1e-4),
    ],
)
def test_a_student_that_is_close_to_a_teacher_of_large_mean(dtype, offset, noise, s, t, monkeypatch):
    """‖X‖² - 2 ⟨X, T P⟩ + ‖T‖² was -5.5e-5 for 1e-8 in float32, and -0.69 for 0.039 in bfloat16."""
    module = vk.OrthoProjLoss(s, t, normalization="none", loss="mse")
    x = (torch.randn(4000, s) + offset).to(dtype)
    with torch.no_grad():
        p = module.projection.weight
        y = (x.float() @ p.T + noise * torch.randn(4000, t)).to(dtype)
        truth = (x.double() @ p.double().T - y.double()).square().mean()
        by_reference = module(x, y)
        monkeypatch.setattr(dispatch, "CHUNKED_FROM", -1)
        value = module(x, y)
    assert value >= 0
    assert error(value, truth) <= max(1.5 * error(by_reference, truth), 1e-6)


@pytest.mark.parametrize("t", [64, 200])
def test_a_mixture_whose_squares_cancel(t):
    """The squared error is computed anew, in a unit that is not the cosine's."""
    arguments = Arguments((40, 20, t), torch.float32, normalization="none", loss={"cosine": 0.9, "mse": 0.1})
    arguments.teacher = arguments.student @ arguments.weight.T + 0.03 * torch.randn(40, t, device=DEVICE)
    for form in FORMS:
        assert error(arguments.run(form)[0], arguments.truth()[0]) <= 2e-5  # 1 - cos cancels, too


@pytest.mark.parametrize("form", FORMS)
def test_squares_cancel_where_all_rows_that_count_do(form):
    """A row of nearly no weight is far from the teacher."""
    arguments = Arguments((40, 20, 64), torch.float32, weights=True, normalization="none")
    arguments.teacher = arguments.student @ arguments.weight.T + 1e-4 * torch.randn(40, 64, device=DEVICE)
    arguments.teacher[0] += 1
    arguments.row_weight[0] = 1e-12
    assert error(arguments.run(form)[0], arguments.truth()[0]) <= 1e-3


def test_z_is_formed_only_where_the_squares_cancel(monkeypatch):
    skip_where_z_is_formed(chunked.semi_orthogonal_loss)
    formed = []
    multiply = without_z.product
    monkeypatch.setattr(without_z, "product", lambda *args: formed.append(args[0].shape[1]) or multiply(*args))
    far, near = Arguments((50, 8, 20), torch.float32), Arguments((50, 8, 20), torch.float32, normalization="none")
    near.teacher = near.student @ near.weight.T
    far.run(chunked.semi_orthogonal_loss)
    assert formed == [20]  # Y P alone
    near.run(chunked.semi_orthogonal_loss)
    assert formed == [20, 20, 8]
