"""The fused loss: on a GPU where there is one, else by Triton's interpreter (conftest.py sets TRITON_INTERPRET=1).

Every torch.empty of the op is filled with NaN first, so that nothing unwritten can pass.
"""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from tests.helpers.loss_cases import (  # noqa: E402
    DTYPES,
    OPTIONS,
    SHAPES,
    Case,
    error,
    poison_new_tensors,
)
from vkd_kernels.ops.ortho_proj_loss import api, reference  # noqa: E402
from vkd_kernels.ops.ortho_proj_loss import triton as fused_kernels  # noqa: E402
from vkd_kernels.ops.ortho_proj_loss.triton import launch, loss_tiles, primitives, tiles  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
OPS = torch.ops.vkd_kernels


def pooled(spec, inputs, **options):
    return fused_kernels.loss(spec, inputs, **options)


def fused(spec, inputs):
    """The chunked form, with chunks of one tile's rows."""
    return fused_kernels.loss(spec, inputs, workspace_bytes=1)


FORMS = [pooled, fused]
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # numpy, interpreting


def slack(dtype):
    """The interpreter's cast to bfloat16 truncates: twice the rounding error."""
    return 2.0 if INTERPRETED and dtype == torch.bfloat16 else 1.0


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_new_tensors(monkeypatch)


def test_kernels_are_interpreted_without_a_gpu():
    assert INTERPRETED == primitives.INTERPRETED.value
    assert INTERPRETED or torch.cuda.is_available()


# ------------------------------------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, form, dtype):
    Case((37, 20, 45), dtype, **OPTIONS[option], device=DEVICE).check(form, slack(dtype))


def all_shapes():
    """The one of many channels takes the interpreter seconds: two of its cases stand for all."""
    cases = []
    for shape, form, dtype in itertools.product(SHAPES, FORMS, DTYPES):
        stands_for_all = (form, dtype) in ((pooled, torch.float16), (fused, torch.float32))
        marks = [] if shape[2] < 1000 or stands_for_all else [pytest.mark.thorough]
        cases.append(pytest.param(shape, form, dtype, marks=marks, id=f"{shape}-{form.__name__}-{dtype}"))
    return cases


@pytest.mark.parametrize("shape, form, dtype", all_shapes())
def test_shapes(shape, form, dtype):
    option = list(OPTIONS.values())[(SHAPES.index(shape) * 3 + DTYPES.index(dtype)) % len(OPTIONS)]
    Case(shape, dtype, **option, device=DEVICE).check(form, slack(dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("option", ["layer_norm", "everything"])
# Ragged against every block; the interpreter of Triton 3.4 wants 16 elements between rows, where a GPU wants 16 bytes.
@pytest.mark.parametrize("shape", [(64, 64, 64), (150, 48, 208)], ids=str)
def test_descriptors(shape, option, dtype, monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(tiles, "chip", lambda device: tiles.Chip("cuda", 90))
    elif torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"tensor memory access needs sm_90; this is {tiles.chip(torch.device(DEVICE))}")
    used = []
    monkeypatch.setattr(loss_tiles, "descriptor", lambda *args: used.append(args) or launch.descriptor(*args))
    Case(shape, dtype, **OPTIONS[option], device=DEVICE).check(fused, slack(dtype))
    assert used


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "student, teacher, weight",
    [
        ("bfloat16", "float32", "float32"),
        ("float16", "bfloat16", "float16"),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", "float16", "float32"),
        ("bfloat16", "float16", "bfloat16"),
    ],
)
def test_mixed_dtypes(student, teacher, weight, form):
    dtype, teacher, weight = (getattr(torch, name) for name in (student, teacher, weight))
    case = Case((37, 20, 45), dtype, teacher_dtype=teacher, weight_dtype=weight, bias=True, device=DEVICE)
    if dtype == torch.float32 and weight != dtype:  # the result is rounded to the weight's dtype
        _, truth = case.truth()
        _, got = case.run(form)
        assert error(got["student"], truth["student"]) <= 2e-6
        assert got["weight"].dtype == weight and error(got["weight"], truth["weight"]) <= 8e-3
    else:
        case.check(form, slack(dtype))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(1, 80),
    st.integers(1, 150),
    st.sampled_from(DTYPES),
    st.sampled_from(list(OPTIONS)),
    st.sampled_from(FORMS),
    st.integers(0, 99),
)
def test_any_shape(n, s, t, dtype, option, form, seed):
    assume(n * t >= 50)  # a relative error means little where a handful of differences may all be near 0
    Case((n, s, t), dtype, **OPTIONS[option], seed=seed, device=DEVICE).check(form, slack(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_near_convergence_beats_the_composition(form):
    """Where |Z - T| ~ 1e-2 the composition has lost the gradient to its rounding of Z; the fused loss has not."""
    case = Case((60, 32, 48), torch.bfloat16, normalization="none", device=DEVICE)
    case.teacher = (case.student.float() @ case.weight.T + 1e-2 * torch.randn(60, 48, device=DEVICE)).float()
    _, truth = case.truth()
    _, got = case.run(form)
    _, composed = case.run(reference.loss)
    assert error(got["weight"], truth["weight"]) <= 6e-3 * (2 if INTERPRETED else 1)
    assert error(composed["weight"], truth["weight"]) >= 2e-2


@pytest.mark.parametrize("form", FORMS)
def test_kink(form):
    """Exactly on, below and above |d| = beta, and d = 0."""
    beta = 0.5
    case = Case((6, 1, 4), torch.float32, normalization="none", beta=beta, device=DEVICE)
    case.weight = torch.ones(4, 1, device=DEVICE)
    case.student = torch.zeros(6, 1, device=DEVICE)
    up, down = (torch.nextafter(torch.tensor(beta), torch.tensor(x)).item() for x in (1.0, 0.0))
    case.teacher = torch.tensor([beta, -beta, up, -up, down, 0.0], device=DEVICE)[:, None].repeat(1, 4)
    case.check(form)


@pytest.mark.parametrize("form", FORMS)
def test_constant_teacher_rows(form):
    case = Case((20, 8, 33), torch.float32, device=DEVICE)
    case.teacher[3] = 5.0
    case.teacher[7] = 0.0
    case.check(form)


@pytest.mark.parametrize("form", FORMS)
def test_large_teacher_mean(form):
    """|mean| >> std: a sum of squares would lose the variance."""
    case = Case((20, 8, 300), torch.float32, device=DEVICE)
    case.teacher = case.teacher + 1000.0
    case.check(form)


def test_float16_does_not_underflow():
    """1 / (N T) and tiny row weights are far below float16's range, and so would G times them be."""
    case = Case((40, 16, 64), torch.float16, weights=True, device=DEVICE)
    case.row_weight *= 1e-7
    case.denominator = case.row_weight.sum() * 64
    case.grad_output = torch.tensor(65536.0, device=DEVICE)
    for form in FORMS:
        case.check(form)


# ------------------------------------------------------------------------------------------------------------ contract


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("option", ["layer_norm", "everything"])
def test_only_needed_gradients(option, form):
    case = Case((37, 20, 45), torch.float32, **OPTIONS[option], device=DEVICE)
    loss, everything = case.run(form)
    for index in range(8):
        needed = [bool(index & bit) for bit in (1, 2, 4)]
        some_loss, some = case.run(form, needed)
        assert torch.equal(some_loss, loss)
        assert some_loss.requires_grad == bool(some)
        for name, gradient in some.items():
            assert torch.equal(gradient, everything[name])


def test_no_gradient_is_computed_under_no_grad(monkeypatch):
    case = Case((37, 20, 45), torch.float32, bias=True, device=DEVICE)
    launched = []
    monkeypatch.setattr(launch, "recorder", lambda kernel, arguments, options: launched.append((kernel, arguments)))
    for form in FORMS:
        case.student.requires_grad_(), case.weight.requires_grad_(), case.bias.requires_grad_()
        with torch.no_grad():
            loss = form(case.spec, case.inputs)
        assert not loss.requires_grad
    losses = [arguments for kernel, arguments in launched if kernel is loss_tiles.loss_tile]
    assert losses and all(arguments["gradient"] is arguments["column_sums"] is None for arguments in losses)


@pytest.mark.parametrize("form", FORMS)
def test_backward_twice_gives_the_same_bits_and_inputs_stay(form):
    case = Case((70, 20, 45), torch.bfloat16, **OPTIONS["everything"], device=DEVICE)
    before = [x.clone() for x in case.tensors]
    leaves = [case.student.requires_grad_(), case.weight.requires_grad_(), case.bias.requires_grad_()]
    loss = form(case.spec, case.inputs)
    first = torch.autograd.grad(loss, leaves, case.grad_output, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, leaves, case.grad_output, retain_graph=True)
    doubled = torch.autograd.grad(loss, leaves, 2 * case.grad_output)
    for a, b, c, d in zip(first, second, kept, doubled, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and a.data_ptr() != b.data_ptr()
        assert torch.equal(2 * a, d)
    again = form(case.spec, case.inputs)
    assert torch.equal(loss, again)
    for x, y in zip(before, case.tensors, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("form", FORMS)
def test_masked_rows_may_hold_anything(form):
    case = Case((37, 20, 45), torch.float32, weights=True, bias=True, device=DEVICE)
    clean = case.run(form)
    case.student[3] = torch.nan
    case.teacher[6] = torch.inf
    loss, got = case.run(form)
    assert torch.equal(loss, clean[0])
    for name, gradient in got.items():
        assert torch.equal(gradient, clean[1][name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_rows_masked(form, dtype):
    case = Case((37, 20, 45), dtype, **OPTIONS["everything"], device=DEVICE)
    case.row_weight.zero_()
    loss, got = case.run(form)
    assert loss == 0
    assert len(got) == 3 and all(torch.count_nonzero(gradient) == 0 for gradient in got.values())


@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form):
    case = Case((1, 20, 45), torch.float32, bias=True, device=DEVICE)
    case.student, case.teacher = case.student[:0], case.teacher[:0]
    loss, got = case.run(form)
    assert loss == 0 and got["student"].shape == (0, 20)
    assert all(torch.count_nonzero(gradient) == 0 for gradient in got.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_strided_inputs(layout, form):
    case = Case((37, 20, 45), torch.float32, bias=True, device=DEVICE)
    bias = case.bias[:, None].expand(45, 2).contiguous()[:, 0] if layout == "strided" else case.bias[:1].expand(45)
    case.bias = bias.contiguous()
    expected = case.run(form)
    case.bias = bias
    wide = torch.full((37, 3, 70), torch.nan, device=DEVICE)
    wide[:, 1, 5:25] = case.student
    wide[:, 2, 7:52] = case.teacher
    case.student, case.teacher = wide[:, 1, 5:25], wide[:, 2, 7:52]
    case.weight = case.weight.T.contiguous().T
    loss, got = case.run(form)
    assert torch.equal(loss, expected[0])
    for name, gradient in got.items():
        assert error(gradient, expected[1][name].double()) <= 1e-6


def test_chunks_equal_one_chunk():
    case = Case((1300, 16, 40), torch.float32, **OPTIONS["everything"], device=DEVICE)
    whole, parts = case.run(pooled, workspace_bytes=1 << 27), case.run(fused)
    assert torch.equal(whole[0], parts[0])
    for name, gradient in parts[1].items():
        assert error(gradient, whole[1][name].double()) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_second_order_is_refused(form):
    case = Case((5, 4, 6), torch.float32, bias=True, device=DEVICE)
    leaves = [case.student.requires_grad_(), case.weight.requires_grad_(), case.bias.requires_grad_()]
    loss = form(case.spec, case.inputs)
    for gradient in torch.autograd.grad(loss, leaves, create_graph=True):
        with pytest.raises(RuntimeError, match='backend="torch"'):
            gradient.square().sum().backward(retain_graph=True)


# -------------------------------------------------------------------------------------------------------- torch.library


@pytest.mark.parametrize("name", ["pooled_loss", "fused_loss"])
@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False)])
def test_opcheck(name, needed, monkeypatch):
    monkeypatch.undo()
    case = Case((6, 5, 7), torch.float32, **OPTIONS["everything"], device=DEVICE)
    arguments = {
        "student": case.student.requires_grad_(needed[0]),
        "teacher": case.teacher,
        "weight": case.weight.requires_grad_(needed[1]),
        "bias": case.bias.requires_grad_(needed[2]),
        "row_weight": case.row_weight,
        "channel_shift": case.channel_shift,
        "channel_scale": case.channel_scale,
        "denominator": case.denominator,
        "normalization": "layer_norm",
        "eps": 1e-5,
        "mse": 0.3,
        "smooth_l1": 0.7,
        "cosine": 2.0,
        "beta": 0.5,
        **dict(zip(("need_student", "need_weight", "need_bias"), needed, strict=True)),
    }
    few = {"factors": [1.0], "group": [case.student.shape[0]]}
    many = {"factor": 1.0, "workspace_bytes": 1 << 20}
    torch.library.opcheck(getattr(OPS, name).default, (), arguments | (few if name == "pooled_loss" else many))


def test_opcheck_backward(monkeypatch):
    monkeypatch.undo()
    case = Case((6, 5, 7), torch.float16, device=DEVICE)
    go = torch.ones((), device=DEVICE)
    unscaled = [torch.randn(*size, device=DEVICE) for size in ((6, 5), (7, 5), (7,))]
    torch.library.opcheck(OPS.scaled_gradients.default, (go, *unscaled, None, 0.5, torch.float16, torch.float32))
    arguments = {
        "grad_output": go,
        "student": case.student,
        "weight": case.weight,
        "factors": [0.5],
        "group": [6],
        "denominator": go.clone(),
        "gradient": torch.randn(6, 7, device=DEVICE).half(),
        "column_sums": torch.randn(1, 7, device=DEVICE),
        **dict.fromkeys(("need_student", "need_weight", "need_bias"), True),
    }
    for scale in ({}, {"gradient_scale": torch.tensor(0.25, device=DEVICE), "row_unit": torch.ones(6, device=DEVICE)}):
        torch.library.opcheck(OPS.pooled_loss_backward.default, (), arguments | scale)
    of_bias = {"need_student": False, "need_weight": False, "gradient": None}
    torch.library.opcheck(OPS.pooled_loss_backward.default, (), arguments | of_bias)


def test_opcheck_statistics(monkeypatch):
    monkeypatch.undo()
    xs, ws = ([torch.rand(n, *size, device=DEVICE) for n in (6, 3)] for size in ((4,), ()))
    sums, means, c = (torch.randn(2, *size, device=DEVICE) for size in ((4,), (4,), (4, 4)))
    torch.library.opcheck(OPS.fused_column_sums.default, (xs, ws, means))
    torch.library.opcheck(OPS.fused_scatters_backward.default, (sums, c, xs, ws, means))
    torch.library.opcheck(OPS.fused_scatters.default, ([x.requires_grad_() for x in xs], ws, sums, means))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(form, dynamic, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (37, 41):
        case = Case((n, 20, 45), torch.float32, **OPTIONS["everything"], device=DEVICE)
        expected, got = case.run(form), case.run(compiled)
        assert torch.equal(expected[0], got[0])
        for name, gradient in got[1].items():
            assert torch.equal(gradient, expected[1][name])


# ------------------------------------------------------------------------------------------------------- the interface


@pytest.mark.parametrize("normalization", api.NORMALIZATIONS)
@pytest.mark.parametrize("loss", api.LOSSES)
@pytest.mark.parametrize("rows", [(37,), (9, 10)], ids=["pooled", "chunked"])
def test_interface(rows, loss, normalization, monkeypatch):
    """ortho_proj_loss with these kernels against itself with the reference."""
    monkeypatch.setattr(tiles, "POOLED_ROWS", 80)
    student = torch.randn(*rows, 20, device=DEVICE, requires_grad=True)
    teacher = torch.randn(*rows, 45, device=DEVICE) + 1
    weight = torch.randn(45, 20, device=DEVICE, requires_grad=True)
    scale, bias = (torch.rand(45, device=DEVICE).requires_grad_() for _ in range(2))
    leaves = [student, weight, scale, bias]
    options = dict(scale=scale, mask=torch.rand(rows, device=DEVICE) > 0.3, normalization=normalization, loss=loss)
    options["eps"] = 0.1 if normalization == "whiten" else 1e-5

    def run(backend):
        value = api.ortho_proj_loss(student, teacher, weight, bias=bias, **options, backend=backend)
        return value, *torch.autograd.grad(value, leaves)

    for a, b in zip(run("triton"), run("torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("shape", [(1, 1), (37, 45), (100, 130), (300, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_over_rows(weighted, dtype, shape, monkeypatch):
    """Where |mean| is 20 times the deviation, and masked rows hold NaN; by a few programs of several steps."""
    monkeypatch.setattr(tiles, "COLUMN_PARTIALS", 2)
    monkeypatch.setattr(tiles, "SCATTER_PROGRAMS", 18)
    x = (torch.randn(shape, device=DEVICE) + 20).to(dtype)
    row_weight = torch.rand(shape[0], device=DEVICE) if weighted else None
    garbage = x.clone()
    if weighted and shape[0] > 2:
        row_weight[1::3] = 0
        garbage[1::3] = torch.nan
    w = torch.ones(shape[0], 1, device=DEVICE).double() if row_weight is None else row_weight.double()[:, None]
    true_sum = (w * x.double()).sum(0)
    mean = (true_sum / w.sum()).float()
    centered = x.double() - mean.double()
    leaf = garbage.requires_grad_()

    total = fused_kernels.column_sums([leaf], [row_weight])
    assert total.dtype == torch.float32 and error(total[0], true_sum) <= 1e-6
    squares = fused_kernels.column_square_sums([leaf], [row_weight], mean[None])
    assert error(squares[0], (w * centered.square()).sum(0)) <= 1e-6
    sums_and_scatters = fused_kernels.student_scatters([leaf], [row_weight], total, mean[None])
    assert torch.equal(sums_and_scatters[0], total)
    scatter = (w * centered).T @ centered
    halves = 2**-15 if INTERPRETED else 2**-17  # of 8 bits each, truncated or rounded
    assert error(sums_and_scatters[1][0], scatter) <= (2e-6 if dtype == torch.float32 else halves)

    s, c = 16 * torch.randn(1, shape[1], device=DEVICE), 16 * torch.randn(1, shape[1], shape[1], device=DEVICE)
    (gradient,) = torch.autograd.grad(sums_and_scatters, leaf, (s, c))
    truth = w * (centered @ (c[0] + c[0].T).double() + s.double())
    limit = {torch.float32: 1e-6, torch.bfloat16: 6e-3 * (2 if INTERPRETED else 1), torch.float16: 1e-3}[dtype]
    assert error(gradient, truth) <= limit


# ------------------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize("n", [1, 512, 1024, 1025, 34000, 100352, 10_000_000])
@pytest.mark.parametrize("s, t", [(192, 3024), (768, 1024), (1, 1), (256, 200_000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks(n, s, t, dtype):
    workspace = 128 << 20
    assert not tiles.is_pooled(n, t, dtype, workspace) or n <= tiles.POOLED_ROWS
    chunk = tiles.loss_chunk(n, s, t, dtype, workspace_bytes=workspace, block_n=128, processors=132)
    assert chunk % 128 == 0
    assert chunk == 128 or chunk * t * dtype.itemsize <= workspace
    chunks = -(-n // chunk)
    assert chunk * chunks - n < 128 * chunks  # even: no chunk is much smaller than the others


@pytest.mark.parametrize("s, chunk", [(192, 16768), (384, 16768), (768, 16768)])
def test_chunks_of_the_paper(s, chunk):
    """131 blocks of 128 rows for 132 processors: a product of the chunk takes one wave."""
    assert tiles.is_pooled(512, 3024, torch.bfloat16, 128 << 20)
    sizes = {"workspace_bytes": 128 << 20, "block_n": 128, "processors": 132}
    assert tiles.loss_chunk(100352, s, 3024, torch.bfloat16, **sizes) == chunk


def test_tiles():
    for dtype in DTYPES:
        for capability in (80, 86, 89, 90, 100, 120):
            for aligned in (False, True):
                tile = tiles.loss_tile(dtype, 192, tiles.Chip("cuda", capability), aligned=aligned)
                assert tile.descriptors == (aligned and capability >= 90 and dtype != torch.float32)
        for capability in (942, 950):  # not read as capabilities of NVIDIA
            assert not tiles.loss_tile(dtype, 192, tiles.Chip("hip", capability), aligned=True).descriptors


def test_tf32_follows_the_setting_of_torch(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        for precision, expected in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(precision)
            assert launch.precision(torch.float32, tiles.INTERPRETER) == expected
            assert launch.precision(torch.bfloat16, tiles.INTERPRETER) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
