"""The kernels' terms (smooth L1, squared error, cosine, mixtures) and row normalizations, against literal formulas."""

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tests.helpers.loss_cases import DTYPES, Case, error, poison_new_tensors
from vkd_kernels.functional import ortho_proj_loss
from vkd_kernels.ops.ortho_proj_loss import reference, triton
from vkd_kernels.ops.ortho_proj_loss.spec import LossInputs, LossSpec
from vkd_kernels.ops.ortho_proj_loss.triton import launch, loss_tiles, tiles
from vkd_kernels.ops.ortho_proj_loss.triton.primitives import INTERPRETED

DEVICE = "cpu" if INTERPRETED.value else "cuda"
MIXTURES = {
    "smooth_l1": "smooth_l1",
    "mse": "mse",
    "cosine": "cosine",
    "RADIO's": {"cosine": 0.9, "smooth_l1": 0.1},
    "squares": {"mse": 0.3, "cosine": 0.7},
    "all": {"mse": 0.2, "cosine": 0.5, "smooth_l1": 0.3},
}
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")  # numpy's


def pooled(spec, inputs):
    return triton.loss(spec, inputs)


def many_rows(spec, inputs):
    """Chunks of one tile's rows."""
    return triton.loss(spec, inputs, workspace_bytes=1)


FORMS = [pooled, many_rows]
NORMALIZATIONS = ["layer_norm", "l2", "none"]


def literal(spec, inputs):
    """The formula of spec.py, word by word."""
    z = inputs.student @ inputs.weight.T
    if inputs.bias is not None:
        z = z + inputs.bias
    t = inputs.teacher
    if spec.normalization == "layer_norm":
        t = (t - t.mean(1, keepdim=True)) / torch.sqrt(t.var(1, unbiased=False, keepdim=True) + spec.eps)
    elif spec.normalization == "l2":
        t = t / t.square().sum(1, keepdim=True).sqrt().clamp_min(spec.eps)
    if inputs.channel_shift is not None:
        t = (t - inputs.channel_shift) * inputs.channel_scale
    d = (z - t).abs()
    huber = torch.where(d < spec.beta, d * d / (2 * spec.beta), d - spec.beta / 2).sum(1)
    norms = z.square().sum(1).sqrt().clamp_min(1e-8) * t.square().sum(1).sqrt().clamp_min(1e-8)
    cosine = 1 - (z * t).sum(1) / norms
    per_row = t.shape[1] if spec.reduction == "mean" else 1
    rows = (
        spec.share("mse") * (d * d).sum(1) + spec.share("smooth_l1") * huber + spec.share("cosine") * per_row * cosine
    )
    w = torch.ones_like(rows) if inputs.row_weight is None else inputs.row_weight
    return (w * rows).sum() / inputs.denominator


def combinations():
    """Every loss with every normalization in both forms, and every loss in both forms with every dtype."""
    cases = []
    axes = [list(enumerate(axis)) for axis in (MIXTURES, NORMALIZATIONS, FORMS, DTYPES)]
    for (i, loss), (j, normalization), (k, form), (number, dtype) in itertools.product(*axes):
        marks = [] if number == (i + j + k) % len(DTYPES) else [pytest.mark.thorough]
        cases.append(pytest.param(loss, normalization, form, dtype, marks=marks))
    return cases


@pytest.mark.parametrize("loss, normalization, form, dtype", combinations())
def test_equals_the_literal_formula(loss, normalization, form, dtype, monkeypatch):
    """Loss and gradients, with row weights, a bias and statistics of channels; nothing unwritten is read."""
    poison_new_tensors(monkeypatch)
    everything = {"bias": True, "weights": True, "channels": True, "tensor_denominator": True}
    options = {} if loss in ("squares", "all") else everything
    case = Case(
        (70, 20, 45), dtype, loss=MIXTURES[loss], normalization=normalization, beta=0.7, device=DEVICE, **options
    )
    true_loss, truth = case.truth(literal)
    loss_value = case.check(form, 2.0 if INTERPRETED.value and dtype == torch.bfloat16 else 1.0)
    assert error(loss_value, true_loss) <= 2e-6 and truth


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction(reduction, form):
    case = Case((37, 20, 45), torch.float32, loss=MIXTURES["all"], device=DEVICE)
    case.spec = replace(case.spec, reduction=reduction)
    assert error(case.run(form)[0], case.truth(literal)[0]) <= 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_have_the_cosine_0(form):
    case = Case((37, 20, 45), torch.float32, loss="cosine", normalization="l2", device=DEVICE)
    case.student[3], case.teacher[5] = 0, 0
    loss, gradients = case.run(form)
    true_loss, truth = case.truth(reference.loss)
    assert error(loss, true_loss) <= 1e-6
    assert all(error(gradients[name], truth[name]) <= 1e-5 for name in gradients)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beta", [1e-45, 1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_extreme_beta(beta, form):
    """Smaller than any difference: the absolute value. Larger: squared error over 2 beta, which must not underflow."""
    for dtype in (torch.float32, torch.float16):
        case = Case((20, 8, 33), dtype, beta=beta, normalization="none", device=DEVICE)
        case.grad_output = torch.tensor(max(beta, 1.0), device=DEVICE)
        loss, gradients = case.run(form)
        true_loss, truth = case.truth(reference.loss)
        assert error(loss, true_loss) <= 1e-5
        assert all(error(gradients[name], truth[name]) <= 2e-3 for name in gradients), (dtype, gradients)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["mse", "squares"])
def test_float16_holds_the_gradient_of_a_raw_teacher_of_any_size(loss, form):
    case = Case((64, 8, 16), torch.float16, loss=MIXTURES[loss], normalization="none", weights=True, device=DEVICE)
    case.teacher = case.teacher.float()
    case.teacher[5, 2], case.teacher[3] = 1e5, torch.nan  # row 3 is masked
    case.grad_output = torch.ones((), device=DEVICE)
    loss_value, gradients = case.run(form)
    case.teacher[3] = 0
    true_loss, truth = case.truth(reference.loss)
    assert error(loss_value, true_loss) <= 1e-5
    assert all(error(gradients[name], truth[name]) <= 1e-3 for name in gradients)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("loss", ["smooth_l1", "mse"])
@pytest.mark.parametrize(
    "where, normalization",
    [(where, "none") for where in ("student", "teacher", "weight", "bias")]
    + [("teacher", n) for n in ("l2", "layer_norm")],
)
def test_nan_and_inf_go_through(where, normalization, value, form, loss):
    case = Case((37, 20, 45), torch.float32, bias=True, loss=loss, normalization=normalization, device=DEVICE)
    getattr(case, where).view(-1)[7] = value
    loss_value, got = case.run(form)
    true_loss, truth = case.truth()
    assert not loss_value.isfinite() and loss_value.isnan() == true_loss.isnan()
    for name, gradient in got.items():
        assert torch.equal(gradient.isfinite(), truth[name].isfinite()), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["cosine", "all"])
def test_float16_holds_the_cosine_of_nearly_dead_rows(loss, form):
    """Its gradient goes with 1 / ‖z‖, which no loss scale makes smaller."""
    case = Case((70, 20, 45), torch.float16, loss=MIXTURES[loss], weights=True, device=DEVICE)
    for row, size in enumerate((0.0, 1e-6, 1e-4, 1e-3, 1e-2), 1):
        case.student[row] *= size
    case.student[6], case.row_weight[6] = torch.nan, 0
    case.grad_output = torch.tensor(2.0**-10, device=DEVICE)
    _, gradients = case.run(form)
    case.student[6] = 0
    _, truth = case.truth(reference.loss)
    assert error(gradients["weight"], truth["weight"]) <= 1e-3
    wrong = (gradients["student"].double() - truth["student"]).norm(dim=1)
    assert (wrong <= 2e-3 * truth["student"].norm(dim=1) + 1e-6).all(), wrong  # 1e-6: what float16 rounds the others by


@pytest.mark.parametrize("form", FORMS)
def test_the_standardized_targets_of_a_large_teacher_in_float16(form):
    """The squared error of these needs no scale of the raw teacher's."""
    case = Case((37, 20, 45), torch.float16, loss="mse", normalization="none", channels=True, device=DEVICE)
    case.teacher = case.teacher.float() * 1e10
    case.channel_shift *= 1e10
    case.channel_scale /= 1e10
    _, gradients = case.run(form)
    _, truth = case.truth(reference.loss)
    assert all(error(gradients[name], truth[name]) <= 1e-3 for name in gradients)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_other_channels_of_a_teacher_with_nan_or_inf(value, form):
    """Squared error in float16 scales its gradient by the largest of the teacher: by the largest finite one."""
    case = Case((37, 20, 45), torch.float16, loss="mse", normalization="none", device=DEVICE)
    case.teacher *= 8000
    _, expected = case.run(form)
    case.teacher[0, 7] = value
    _, got = case.run(form)
    others = torch.arange(45, device=DEVICE) != 7
    assert error(got["weight"][others], expected["weight"][others].double()) <= 1e-3
    assert error(got["student"][1:], expected["student"][1:].double()) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_have_the_bits_of_one_chunk(dtype, monkeypatch):
    """Partial sums are indexed by tile, whatever launch it was in."""
    monkeypatch.setattr(tiles, "POOLED_ROWS", 64)
    case = Case((300, 16, 140), dtype, bias=True, weights=True, device=DEVICE)
    assert torch.equal(case.run(triton.loss)[0], case.run(many_rows)[0])


def test_rows_far_apart_are_copied():
    """Further than the 32-bit offsets in a tile reach."""
    apart = launch.FARTHEST_ROWS + 1
    far = torch.empty(2 * apart + 5, device="meta").as_strided((3, 5), (apart, 1))
    assert launch.unit_stride(far).stride(0) == 5
    assert launch.unit_stride(far[:, :4]).stride(0) == 4
    near = torch.empty(2 * apart, device="meta").as_strided((3, 5), (apart - 1, 1))
    assert launch.unit_stride(near) is near


@pytest.mark.parametrize("loss", ["smooth_l1", "mse"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("normalization, weighted", [("layer_norm", False), ("l2", True)])
def test_row_stationary_kernel(normalization, weighted, dtype, loss, monkeypatch):
    """Off by default; the same loss and gradients, dX without a product."""
    if INTERPRETED.value:
        monkeypatch.setattr(tiles, "chip", lambda device: tiles.Chip("cuda", 90))
    monkeypatch.setattr(tiles, "ROW_STATIONARY_UP_TO", 192)
    launched = []
    run = launch.BoundLaunch.__call__
    monkeypatch.setattr(
        launch.BoundLaunch,
        "__call__",
        lambda self, *args, **kwargs: launched.append(self.launch.kernel.__name__) or run(self, *args, **kwargs),
    )
    # Widths of 16 elements, because the descriptors of Triton 3.4's interpreter want them; ragged against every block.
    case = Case((150, 80, 112), dtype, loss=loss, normalization=normalization, weights=weighted, device=DEVICE)
    case.check(many_rows, 3.0 if INTERPRETED.value and dtype == torch.bfloat16 else 1.0)  # truncated three times
    assert "row_stationary" in launched and "loss_tile" not in launched


def test_wide_tiles_are_a_switch(monkeypatch):
    chip = tiles.Chip("cuda", 90)
    assert tiles.loss_tile(torch.bfloat16, 768, chip, aligned=True).block_t == 128
    monkeypatch.setattr(tiles, "WIDE_FROM", 384)
    assert [tiles.loss_tile(torch.bfloat16, s, chip, aligned=True).block_t for s in (192, 384)] == [128, 256]


# ----------------------------------------------------------------------------------------------------- semi-orthogonal


def close_pair(dtype, offset, noise, shape=(150, 12, 40), normalization="none"):
    """Student and teacher features that nearly agree, about a mean far from 0; the projection is semi-orthogonal."""
    n, s, t = shape
    weight = torch.linalg.qr(torch.randn(t, s, dtype=torch.float64, device=DEVICE))[0].to(dtype)
    student = (torch.randn(n, s, device=DEVICE) + offset).to(dtype)
    teacher = (student.double() @ weight.double().T + noise * torch.randn(n, t, device=DEVICE)).to(dtype)
    inputs = LossInputs(student=student, teacher=teacher, weight=weight.float(), denominator=float(n * t))
    return LossSpec(normalization=normalization, loss=(("mse", 1.0),)), inputs


@pytest.mark.parametrize("s", [12, 40])
@pytest.mark.parametrize("offset, noise", [(100.0, 1e-4), (100.0, 1e-2), (0.0, 1e-4), (0.0, 3.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_error_is_no_worse_than_the_reference_where_it_cancels(dtype, offset, noise, s):
    spec, inputs = close_pair(dtype, offset, noise, (150, s, 40))
    doubled = replace(
        inputs, student=inputs.student.double(), teacher=inputs.teacher.double(), weight=inputs.weight.double()
    )
    exact = literal(spec, doubled)
    ours = triton.semi_orthogonal_loss(spec, inputs, workspace_bytes=1)
    assert ours >= 0
    assert error(ours, exact) <= max(
        3 * error(reference.loss(spec, inputs), exact), 5e-5
    )  # what rounding z leaves, averaged


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalization", ["layer_norm", "l2", "none"])
@pytest.mark.parametrize("loss", ["mse", "cosine", "squares"])
def test_semi_orthogonal_writes_nothing_of_teacher_size(loss, normalization, weighted, monkeypatch):
    """Neither a copy of the teacher nor Z nor G: but for masked rows, which are taken out of a product."""
    n, s, t = 300, 8, 100
    sizes = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **kwargs: sizes.append((x := new_empty(*args, **kwargs)).numel()) or x
    )
    case = Case((n, s, t), torch.bfloat16, weights=weighted, device=DEVICE)
    inputs = replace(case.inputs, student=case.student.requires_grad_(), weight=case.weight.requires_grad_())
    spec = LossSpec(normalization=normalization, loss=LossSpec.shares(MIXTURES[loss]))
    monkeypatch.setattr(launch, "recorder", lambda kernel, arguments, options: None)
    triton.semi_orthogonal_loss(spec, inputs, workspace_bytes=1 << 14)
    assert max(sizes) <= n * s < n * t


def test_terms_have_a_largest_coefficient_of_1():
    for coefficients in ((1, 0, 0), (0, 1, 0), (0, 0, 3024.0), (0.1, 0.9, 2000.0)):
        for beta in (1e-30, 1.0, 1e30):
            mse, smooth_l1, cosine = coefficients
            terms = loss_tiles.Terms.of(mse=mse, smooth_l1=smooth_l1, cosine=cosine, beta=beta)
            assert max(terms.smooth_l1, terms.mse, terms.cosine / loss_tiles.COSINE_UNIT) == 1.0


@pytest.mark.parametrize("chip", [("cuda", 80), ("cuda", 90), ("hip", 942), ("hip", 950)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_chip_has_its_tiles(dtype, chip):
    """AMD's chips are not read as NVIDIA's of a large capability."""
    chip = tiles.Chip(*chip)
    for aligned in (False, True):
        for several in (False, True):
            tile = tiles.loss_tile(dtype, 192, chip, aligned=aligned, several=several)
            assert tile.descriptors == (chip == tiles.Chip("cuda", 90) and aligned and dtype != torch.float32)
    if chip.kind == "hip":
        kernels = {kernel for kernel, bits in tiles.TILES if bits == 8 * dtype.itemsize}
        assert all(getattr(tiles.tile(kernel, dtype, chip), "stages", 2) <= 3 for kernel in kernels)


def test_the_interface_takes_a_mixture():
    student, teacher = torch.randn(37, 8, device=DEVICE), torch.randn(37, 12, device=DEVICE)
    weight = torch.randn(12, 8, device=DEVICE)
    options = {"loss": MIXTURES["RADIO's"], "normalization": "l2"}
    ours, expected = (ortho_proj_loss(student, teacher, weight, **options, backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["smooth_l1", {"mse": 0.5, "cosine": 0.5}])
def test_another_number_of_rows_prepares_no_launch(loss, form):
    """Batches of images with masks or boxes differ in their rows at every step."""
    misses = []
    for rows in (40, 41, 57, 100):
        Case((rows, 20, 45), torch.float32, bias=True, loss=loss, device=DEVICE).run(form)
        misses.append(launch.prepared.cache_info().misses)
    assert misses == misses[:1] * 4


class Subclass(torch.Tensor):
    """As medical images come: a tensor with methods of its own."""


@pytest.mark.parametrize("normalization", ["layer_norm", "batch_norm"])
def test_subclasses_of_tensors(normalization):
    case = Case((37, 20, 45), torch.float32, device=DEVICE)
    options = {"normalization": normalization, "backend": "triton"}
    expected = ortho_proj_loss(case.student, case.teacher, case.weight, **options)
    student, teacher = (x.as_subclass(Subclass) for x in (case.student.clone().requires_grad_(), case.teacher))
    loss = ortho_proj_loss(student, teacher, case.weight, **options)
    assert torch.equal(loss.as_subclass(torch.Tensor), expected)
    loss.backward()
