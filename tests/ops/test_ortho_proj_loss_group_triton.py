"""Several losses at once, by the fused kernels (interpreted without a GPU): each as it is alone."""

import itertools
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

import vkd_kernels as vk
from tests.helpers.loss_cases import DTYPES, OPTIONS, Case, error, poison_new_tensors
from tests.helpers.loss_groups import ROWS, arguments, assert_equal, in_a_group_and_alone, masks_of
from vkd_kernels.functional import ortho_proj_losses
from vkd_kernels.ops.ortho_proj_loss import api, triton
from vkd_kernels.ops.ortho_proj_loss.spec import Execution, LossGroup, LossSpec
from vkd_kernels.ops.ortho_proj_loss.triton import entry, launch, tiles
from vkd_kernels.ops.ortho_proj_loss.triton.primitives import INTERPRETED as INTERPRETED_KERNELS

INTERPRETED = INTERPRETED_KERNELS.value
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # numpy, interpreting


@pytest.fixture
def poisoned(monkeypatch):
    poison_new_tensors(monkeypatch)


def cases(dtype, option, rows=ROWS, s=20, t=45, **options):
    """Cases that differ in rows and values."""
    return [Case((n, s, t), dtype, **OPTIONS[option], **options, seed=i, device=DEVICE) for i, n in enumerate(rows)]


def group_of(cases, students, weights, bias):
    """The cases' tensors as one group, with these leaves."""
    shift, scale = (
        None if getattr(cases[0], name) is None else torch.stack([getattr(case, name) for case in cases])
        for name in ("channel_shift", "channel_scale")
    )
    denominators = [case.denominator for case in cases]
    return LossGroup(
        students=tuple(students),
        teachers=tuple(case.teacher for case in cases),
        weights=weights,
        denominators=torch.stack(denominators) if isinstance(denominators[0], torch.Tensor) else tuple(denominators),
        row_weights=tuple(case.row_weight for case in cases),
        bias=bias,
        channel_shift=shift,
        channel_scale=scale,
    )


def run(cases, needed=(True, True, True), **kwargs):
    """(losses, {name: gradients of each}) of the kernels' group_loss over the cases' inputs."""
    students = [case.student.detach().requires_grad_(needed[0]) for case in cases]
    weights = torch.stack([case.weight for case in cases]).requires_grad_(needed[1])
    bias = None
    if cases[0].bias is not None:
        bias = torch.stack([case.bias for case in cases]).requires_grad_(needed[2])
    losses = triton.group_loss(cases[0].spec, group_of(cases, students, weights, bias), **kwargs)
    wanted = {"student": students if needed[0] else [], "weight": [weights] if needed[1] else []}
    wanted["bias"] = [bias] if needed[2] and bias is not None else []
    leaves = [leaf for leaves in wanted.values() for leaf in leaves]
    upstream = torch.stack([case.grad_output for case in cases])
    gradients = iter(torch.autograd.grad(losses, leaves, upstream))
    result = {name: [next(gradients) for _ in leaves] for name, leaves in wanted.items() if leaves}
    return losses, {name: got if name == "student" else list(got[0]) for name, got in result.items()}


def options_and_dtypes():
    """Two options in every dtype, the others in one each; the same kernels alone are tested in all."""
    cases = []
    for (index, option), dtype in itertools.product(enumerate(OPTIONS), DTYPES):
        runs = option in ("layer_norm", "everything") or dtype == DTYPES[index % len(DTYPES)]
        cases.append(pytest.param(option, dtype, marks=[] if runs else [pytest.mark.thorough]))
    return cases


@pytest.mark.parametrize("option, dtype", options_and_dtypes())
def test_accuracy(option, dtype, poisoned):
    """Three sides: the error of each loss against float64 is within the table, or 1.5 times the composition's."""
    group = cases(dtype, option)
    losses, gradients = run(group)
    assert losses.shape == (len(group),) and losses.dtype == torch.float32

    for i, case in enumerate(group):
        if i == 1:  # a single row: too few values for a relative error of averages
            alone, expected = case.run(triton.loss)
            assert error(losses[i], alone.double()) <= 1e-6
            assert all(torch.equal(gradients[name][i], gradient) for name, gradient in expected.items())
            continue

        def entry(spec, inputs, i=i):
            given = [gradients[name][i] for name in gradients]
            return _Given.apply(losses[i], given, inputs.student, inputs.weight, inputs.bias)

        case.check(entry, 2.0 if INTERPRETED and dtype == torch.bfloat16 else 1.0)


class _Given(torch.autograd.Function):
    """A loss and gradients in student, weight and bias that were computed before."""

    @staticmethod
    def forward(ctx, loss, gradients, student, weight, bias):
        ctx.gradients = gradients
        return loss.detach().clone()

    @staticmethod
    def backward(ctx, _):
        return None, None, *ctx.gradients, *[None] * (3 - len(ctx.gradients))


@pytest.mark.parametrize("option", ["layer_norm", "everything"])
def test_the_bits_of_each_alone(option, poisoned):
    """Gradients are made by the same tiles in the same order, and the loss differs in the order of its last sum."""
    group = cases(torch.bfloat16, option)
    losses, gradients = run(group)
    again = run(group)
    assert torch.equal(losses, again[0])
    for i, case in enumerate(group):
        alone, expected = case.run(triton.loss)
        assert error(losses[i], alone.double()) <= 1e-6
        for name, gradient in expected.items():
            assert torch.equal(gradients[name][i], gradient) and torch.equal(again[1][name][i], gradient)


def test_losses_of_many_rows_go_by_themselves(monkeypatch, poisoned):
    monkeypatch.setattr(tiles, "POOLED_ROWS", 40)
    called, losses_of_one_launch = [], entry._pooled_group
    monkeypatch.setattr(
        entry,
        "_pooled_group",
        lambda spec, group: called.append([len(x) for x in group.students]) or losses_of_one_launch(spec, group),
    )
    group = cases(torch.float32, "everything", rows=[10, 70, 5, 33, 80])
    losses, gradients = run(group)
    assert called == [[5, 33]]
    for i, case in enumerate(group):
        alone, expected = case.run(triton.loss)
        assert error(losses[i], alone.double()) <= 1e-6
        assert all(torch.equal(gradients[name][i], gradient) for name, gradient in expected.items())


def test_no_loss_reads_another(poisoned):
    """NaN everywhere in one loss leaves the bits of the others."""
    group = cases(torch.float32, "everything")
    expected = run(group)
    for tensor in (group[2].student, group[2].teacher, group[2].weight, group[2].bias, group[2].channel_shift):
        tensor.fill_(torch.nan)
    losses, gradients = run(group)
    for i in (0, 1, 3):
        assert torch.equal(losses[i], expected[0][i])
        assert all(torch.equal(gradients[name][i], expected[1][name][i]) for name in gradients)
    assert losses[2].isnan() and gradients["weight"][2].isnan().any()


def test_only_needed_gradients(poisoned):
    group = cases(torch.float32, "everything")
    losses, everything = run(group)
    for needed in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        some_losses, some = run(group, needed)
        assert torch.equal(some_losses, losses) and len(some) == sum(needed)
        for name, gradients in some.items():
            assert all(torch.equal(a, b) for a, b in zip(gradients, everything[name], strict=True))


def test_backward_twice_and_an_expanded_gradient(poisoned):
    group = cases(torch.bfloat16, "layer_norm")
    students = [case.student.requires_grad_() for case in group]
    weight = torch.stack([case.weight for case in group]).requires_grad_()
    losses = triton.group_loss(group[0].spec, group_of(group, students, weight, None))
    leaves = [*students, weight]
    first = torch.autograd.grad(losses.sum(), leaves, retain_graph=True)  # an incoming gradient of stride 0
    second = torch.autograd.grad(losses, leaves, torch.ones_like(losses))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype, option", [(torch.float32, "bias"), (torch.float16, "weights")])
def test_losses_without_rows(dtype, option, poisoned):
    """A rank may have none of one loss."""
    group = cases(dtype, option, rows=[20, 0, 7])
    for case in group:
        case.denominator = 1.0  # as for reduction="sum"
    losses, gradients = run(group)
    assert losses[1] == 0 and gradients["student"][1].shape == (0, 20)
    assert all(torch.count_nonzero(of_parameters[1]) == 0 for of_parameters in gradients.values())
    for i in (0, 2):
        alone, expected = group[i].run(triton.loss)
        assert error(losses[i], alone.double()) <= 1e-6 and torch.equal(gradients["weight"][i], expected["weight"])


def test_float16_row_weights_do_not_underflow(poisoned):
    group = cases(torch.float16, "weights", rows=[40, 30])
    for case in group:
        case.row_weight *= 1e-7
        case.denominator = case.row_weight.sum() * 45
    _, gradients = run(group)
    for i, case in enumerate(group):
        _, expected = case.run(triton.loss)
        assert error(gradients["weight"][i], case.truth()[1]["weight"]) <= 6e-4
        assert all(torch.equal(gradients[name][i], gradient) for name, gradient in expected.items())


def test_opcheck():
    group = cases(torch.float32, "everything", rows=[6, 3], s=5, t=7)
    stacked = {name: [getattr(case, name) for case in group] for name in vars(group[0])}
    weight, bias, shift, scale, denominator = (
        torch.stack(stacked[name]) for name in ("weight", "bias", "channel_shift", "channel_scale", "denominator")
    )
    student, teacher, row_weight = (torch.cat(stacked[name]) for name in ("student", "teacher", "row_weight"))
    need = {"need_student": True, "need_weight": True, "need_bias": True}
    arguments = {
        "student": student.requires_grad_(),
        "teacher": teacher,
        "weight": weight.requires_grad_(),
        "bias": bias.requires_grad_(),
        "row_weight": row_weight,
        "channel_shift": shift,
        "channel_scale": scale,
        "denominator": denominator,
        "factors": [1.0, 1.0],
        "group": [6, 3],
        "normalization": "layer_norm",
        "eps": 1e-5,
        "mse": 0.0,
        "smooth_l1": 1.0,
        "cosine": 0.5,
        "beta": 0.5,
        **need,
    }
    torch.library.opcheck(torch.ops.vkd_kernels.pooled_loss.default, (), arguments)
    with torch.no_grad():
        loss, gradient, sums = torch.ops.vkd_kernels.pooled_loss.default(**arguments)
    backward = {
        "grad_output": loss,
        "gradient": gradient,
        "column_sums": sums,
        "student": student.detach(),
        "weight": weight.detach(),
        "row_weight": row_weight,
        "denominator": denominator,
        "factors": [1.0, 2.0],
        "group": [6, 3],
        **need,
    }
    torch.library.opcheck(torch.ops.vkd_kernels.pooled_loss_backward.default, (), backward)


@pytest.mark.parametrize("normalization, dynamic", [("layer_norm", True), ("batch_norm", False)])
def test_compiles_without_a_break(normalization, dynamic, monkeypatch):
    torch._dynamo.reset()
    options = {"normalization": normalization, "eps": 1e-2, "backend": "triton"}
    compiled = torch.compile(
        lambda *args: ortho_proj_losses(*args, **options), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for rows in ([20, 7], [23, 9]):
        students, teachers, weights, *_ = arguments(rows, dtype=torch.float32, device=DEVICE)
        results = []
        for f in (compiled, lambda *args: ortho_proj_losses(*args, **options)):
            losses = f(students, teachers, weights)
            results.append((losses.detach(), torch.autograd.grad(losses.sum(), [*students, weights])))
        assert_equal(results)


def served_losses():
    """Every normalization with either loss, and with either kind of rows."""
    losses, kinds = [("smooth_l1", "some"), ("mse", "no masks")], [ROWS, [70, 1, 90, 64]]
    cases = []
    for (i, normalization), (j, loss), (k, rows) in itertools.product(
        *map(enumerate, (api.NORMALIZATIONS, losses, kinds))
    ):
        marks = [] if (i + j + k) % 2 == 0 else [pytest.mark.thorough]
        cases.append(pytest.param(normalization, *loss, rows, marks=marks))
    return cases


@pytest.mark.parametrize("normalization, loss, masks, rows", served_losses())
def test_interface(normalization, loss, masks, rows, monkeypatch):
    monkeypatch.setattr(tiles, "POOLED_ROWS", 80)
    options = {"normalization": normalization, "loss": loss, "eps": 0.1 if normalization == "whiten" else 1e-5}
    options["backend"] = "triton"
    results = in_a_group_and_alone(
        *arguments(rows, 20, 45, torch.float32, DEVICE), masks_of(masks, rows, DEVICE), **options
    )
    assert_equal(results, rtol=1e-4, atol=1e-6)


def strided(x):
    """The values of x in every other place of memory, NaN between them."""
    wide = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 0] = x.detach()
    return wide[..., 0].requires_grad_(x.requires_grad)


def layouts(students, teachers, weights, scale, bias, masks):
    """The same values laid out otherwise: strided, and what has a row for each loss transposed."""
    transposed = [x.detach().T.contiguous().T.requires_grad_() for x in (scale, bias)]
    yield students, teachers, weights, *transposed, [strided(w) for w in masks]
    yield [strided(x) for x in students], [strided(y) for y in teachers], *map(strided, (weights, scale, bias)), masks


@pytest.mark.parametrize("normalization", ["layer_norm", "batch_norm"])
@pytest.mark.parametrize("rows", [ROWS, [70, 1, 90, 64]], ids=["few", "few and many"])
def test_strided_inputs(normalization, rows, monkeypatch):
    monkeypatch.setattr(tiles, "POOLED_ROWS", 80)
    options = {"normalization": normalization, "backend": "triton"}
    given = *arguments(rows, 20, 45, torch.float32, DEVICE), masks_of("weights", rows, DEVICE)
    expected, _ = in_a_group_and_alone(*given, **options)
    for laid_out in layouts(*given):
        for results in in_a_group_and_alone(*laid_out, **options):
            assert_equal((results, expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [ROWS, [90, 90, 20, 9]], ids=["few", "few and many"])
@pytest.mark.parametrize("normalization", ["none", "batch_norm"])
def test_teachers_of_one_channel(normalization, rows, monkeypatch):
    """As vkd_kernels.cayley makes their projections, which are transposed."""
    monkeypatch.setattr(tiles, "POOLED_ROWS", 80)
    students, teachers, _, scale, bias = arguments(rows, 20, 1, torch.float32, DEVICE)
    weights = vk.cayley(torch.randn(len(rows), 1, 20, device=DEVICE)).detach().requires_grad_()
    given = students, teachers, weights, scale, bias, None
    results = in_a_group_and_alone(*given, normalization=normalization, backend="triton")
    assert_equal(results, rtol=1e-4, atol=1e-6)


ONCE = {"column_sums_kernel": 3, "scatter_tiles": 1, "scatter_gradients": 1}  # batch_norm's statistics, of all losses
FEW, MANY = {"loss_tile": 1, "gradient_tiles": 1}, {"loss_tile": 1, "sum_shares": 1, "scale_gradients": 1}


@pytest.mark.parametrize(
    "normalization, rows, expected",
    [
        ("layer_norm", [30] * 6, [FEW, {"row_statistics": 1}]),
        ("layer_norm", [90] * 6, [MANY] * 6 + [{"row_statistics": 6}]),
        ("layer_norm", [90, 90, 20, 9, 5, 3], [FEW, MANY, MANY, {"row_statistics": 3}]),
        ("batch_norm", [30] * 6, [ONCE, FEW]),
        ("batch_norm", [60, 30, 20, 9, 5, 3], [ONCE, FEW]),
        ("batch_norm", [90] * 6, [ONCE] + [MANY] * 6),
        ("batch_norm", [90, 90, 20, 9, 5, 3], [ONCE, FEW, MANY, MANY]),
    ],
)
def test_launches(normalization, rows, expected, monkeypatch):
    """Of the kernels, forward and backward, for six losses of few (up to 80) and many rows: docs/kernels.md's count."""
    monkeypatch.setattr(tiles, "POOLED_ROWS", 80)
    launched = Counter()
    monkeypatch.setattr(launch, "recorder", lambda kernel, arguments, options: launched.update([kernel.__name__]))
    students, teachers, weights, *_ = arguments(rows, 20, 45, torch.float32, DEVICE)
    ortho_proj_losses(students, teachers, weights, normalization=normalization, backend="triton").sum().backward()
    assert launched == sum(map(Counter, expected), Counter())


@pytest.mark.parametrize("rows", [[30, 20], [30, 90]], ids=["few", "few and many"])
@pytest.mark.parametrize("scale", [None, 0.7, (2,)], ids=str)
def test_squared_error_with_orthonormal_weights(scale, rows, monkeypatch):
    """As FeatureDistiller calls it: losses, gradients of students, and of weights through the Cayley transform."""
    monkeypatch.setattr(tiles, "POOLED_ROWS", 80)
    students, teachers, *_ = arguments(rows, 20, 45, torch.float32, DEVICE)
    w = torch.randn(2, 45, 20, device=DEVICE, requires_grad=True)
    if isinstance(scale, tuple):
        scale = torch.rand(scale, device=DEVICE).requires_grad_()
    leaves = [*students, w] + ([scale] if isinstance(scale, torch.Tensor) else [])
    results = []
    for semi_orthogonal in (True, False):
        losses = api.projected_losses(
            students,
            teachers,
            vk.cayley(w),
            scale=scale,
            spec=LossSpec(loss=(("mse", 1.0),)),
            execution=Execution(backend="triton", semi_orthogonal=semi_orthogonal),
        )
        results.append((losses.detach(), torch.autograd.grad(losses.sum(), leaves)))
    assert_equal(results, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics(weighted, monkeypatch, poisoned):
    """More losses than a launch takes; each is as it is alone."""
    monkeypatch.setattr(tiles, "GROUP", 2)
    rows = [37, 1, 150, 64, 5]
    xs = [torch.randn(n, 33, device=DEVICE) + 3 for n in rows]
    ws = [torch.rand(n, device=DEVICE) if weighted and i != 1 else None for i, n in enumerate(rows)]
    means, c = torch.randn(5, 33, device=DEVICE), torch.randn(5, 33, 33, device=DEVICE)

    def statistics(xs, ws, means, c):
        leaves = [x.detach().requires_grad_() for x in xs]
        sums = triton.column_sums(xs, ws)
        scatters = triton.student_scatters(leaves, ws, sums, means)
        gradients = torch.autograd.grad(scatters, leaves, (means, c))
        return [sums, triton.column_square_sums(xs, ws, means), *scatters, gradients]

    grouped = statistics(xs, ws, means, c)
    for i, (x, w) in enumerate(zip(xs, ws, strict=True)):
        alone = statistics([x], [w], means[i : i + 1], c[i : i + 1])
        for ours, expected in zip(grouped, alone, strict=True):
            torch.testing.assert_close(ours[i], expected[0], rtol=1e-5, atol=1e-5)  # rows are split otherwise
    for ours, again in zip(grouped, statistics(xs, ws, means, c), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(dtype):
    workspace = 128 << 20
    groups = lambda rows, t=256, bytes=workspace: tiles.groups(rows, t, dtype, bytes)  # noqa: E731
    assert groups([512] * 6) == [6]
    assert groups([100] * 20) == [8, 8, 4]
    assert groups([34000] * 6) == [1] * 6  # detection's: each fills the GPU
    assert groups([34000, 900, 200, 50, 34000, 7]) == [1, 3, 1, 1]
    assert groups([0, 0, 5]) == [3]
    size = dtype.itemsize * 1024 * 4096
    assert groups([1024] * 5, 4096, 2 * size) == [2, 2, 1]  # their G together fits the workspace
