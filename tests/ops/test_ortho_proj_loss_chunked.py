"""The chunked loss and the statistics over rows, in plain PyTorch: against float64 and the reference, and in memory."""

import sys
from dataclasses import replace

import pytest
import torch

from tests.helpers import processes
from tests.helpers.loss_cases import DTYPES, OPTIONS, SHAPES, Case, error
from vkd_kernels.ops.ortho_proj_loss import chunked, chunks, statistics

ALL_DTYPES = [*DTYPES, torch.float64]
OPS = torch.ops.vkd_kernels


def one_row_chunks(spec, inputs):
    return chunked.loss(spec, inputs, workspace_bytes=1)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("form", [chunked.loss, one_row_chunks])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, form, dtype):
    Case((37, 20, 45), dtype, **OPTIONS[option]).check(form)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    # dX is rounded twice, when saved and when scaled; the table's averages hold for more than one element.
    Case(shape, dtype, **OPTIONS["everything"]).check(chunked.loss, slack=2.0 if shape == (1, 1, 1) else 1.0)


def test_gradcheck():
    case = Case((7, 5, 6), torch.float64, **OPTIONS["everything"])
    for loss in ("smooth_l1", "mse"):
        spec = replace(case.spec, loss=((loss, 1.0),))

        def function(student, weight, bias, spec=spec):
            return chunked.loss(spec, replace(case.inputs, student=student, weight=weight, bias=bias))

        assert torch.autograd.gradcheck(function, case.leaves())


def test_only_needed_gradients():
    case = Case((37, 20, 45), torch.float32, **OPTIONS["everything"])
    loss, everything = case.run(chunked.loss)
    for index in range(8):
        some_loss, some = case.run(chunked.loss, [bool(index & bit) for bit in (1, 2, 4)])
        assert torch.equal(some_loss, loss) and some_loss.requires_grad == bool(some)
        assert all(torch.equal(gradient, everything[name]) for name, gradient in some.items())


def test_backward_twice_and_inputs_stay():
    case = Case((70, 20, 45), torch.bfloat16, **OPTIONS["everything"])
    before = [x.clone() for x in case.tensors]
    leaves = case.leaves()
    loss = chunked.loss(case.spec, case.inputs)
    first = torch.autograd.grad(loss, leaves, case.grad_output, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, case.grad_output)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(before, case.tensors, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["student", "teacher", "weight", "bias"])
@pytest.mark.parametrize("loss", ["smooth_l1", "mse"])
def test_nan_and_inf_go_through(where, value, loss):
    case = Case((37, 20, 45), torch.float32, bias=True, loss=loss, normalization="none")
    getattr(case, where).view(-1)[7] = value
    loss_value, got = case.run(chunked.loss)
    _, truth = case.truth()
    assert not loss_value.isfinite()
    for name, gradient in got.items():
        assert torch.equal(gradient.isfinite(), truth[name].isfinite()), name


def test_masked_rows_may_hold_anything():
    case = Case((37, 20, 45), torch.float32, weights=True, bias=True)
    clean_loss, clean = case.run(chunked.loss)
    case.student[3], case.teacher[6] = torch.nan, torch.inf
    loss, got = case.run(chunked.loss)
    assert torch.equal(loss, clean_loss) and all(torch.equal(got[name], clean[name]) for name in clean)


def test_all_rows_masked():
    case = Case((37, 20, 45), torch.float32, **OPTIONS["everything"])
    case.row_weight.zero_()
    loss, got = case.run(chunked.loss)
    assert loss == 0 and all(torch.count_nonzero(gradient) == 0 for gradient in got.values())


def test_no_rows():
    case = Case((1, 20, 45), torch.float32, bias=True)
    case.student, case.teacher = case.student[:0], case.teacher[:0]
    loss, got = case.run(chunked.loss)
    assert loss == 0 and all(torch.count_nonzero(gradient) == 0 for gradient in got.values())


def test_second_order_is_refused():
    case = Case((5, 4, 6), torch.float32)
    case.student.requires_grad_()
    loss = chunked.loss(case.spec, case.inputs)
    (gradient,) = torch.autograd.grad(loss, case.student, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="torch"'):
        gradient.square().sum().backward()


def test_compiles_without_a_break():
    torch._dynamo.reset()
    compiled = torch.compile(chunked.loss, fullgraph=True, backend="aot_eager")
    case = Case((37, 20, 45), torch.float32, **OPTIONS["everything"])
    expected, got = case.run(chunked.loss), case.run(compiled)
    assert torch.equal(expected[0], got[0])
    assert all(torch.equal(got[1][name], expected[1][name]) for name in expected[1])


MEMORY = """
import resource, sys, torch
from vkd_kernels.ops.ortho_proj_loss import chunked
from vkd_kernels.ops.ortho_proj_loss.spec import LossInputs, LossSpec
torch.set_num_threads(1)
n, s, t = 16384, 32, 1024
student, teacher = torch.randn(n, s, requires_grad=True), torch.randn(n, t)
weight = torch.randn(t, s, requires_grad=True)
def step(n):
    chunked.loss(LossSpec(), LossInputs(student[:n], teacher[:n], weight, denominator=1.0)).backward()
step(64)
student.grad = torch.zeros_like(student)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux reports it, in KiB")
def test_memory_does_not_grow_with_rows():
    """One N x T float32 tensor would be 64 MiB here, and the composition makes five."""
    run = processes.run_python("-c", MEMORY, seconds=300)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 40


@pytest.mark.parametrize(
    "rows, most, multiple", [(1, 100, 1), (1000, 300, 1), (100352, 22192, 128), (5, 1, 64), (0, 9, 4)]
)
def test_even_chunks(rows, most, multiple):
    chunk = chunks.even_chunk(rows, most, multiple)
    assert chunk % multiple == 0 and 0 < chunk <= max(most, multiple)
    count = -(-rows // chunk)
    assert count <= -(-rows // (max(most // multiple, 1) * multiple))
    assert chunk * count - rows < multiple * max(count, 1)


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 1000)


def mean_and_covariance(student, row_weight):
    """Of the rows, as batch_norm takes them."""
    total = student.shape[0] if row_weight is None else row_weight.sum()
    sums = statistics.column_sums([student], [row_weight])
    sums, scatters = statistics.student_scatters([student], [row_weight], sums, sums / total)
    return sums[0] / total, scatters[0] / total


@pytest.mark.parametrize("weighted", [False, True])
def test_scatter_gradcheck(weighted, small_chunks):
    """Also in the mean, whose part in the covariance's gradient is 0."""
    student = torch.randn(23, 5, dtype=torch.float64, requires_grad=True)
    row_weight = torch.rand(23, dtype=torch.float64) if weighted else None
    assert torch.autograd.gradcheck(lambda x: mean_and_covariance(x, row_weight), student)
    assert torch.autograd.gradcheck(lambda x: mean_and_covariance(x, row_weight)[1], student)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_mean_and_covariance_are_those_of_the_projected_rows(dtype, small_chunks):
    """mean(Z) = P mean(X) and var(Z)_j = p_j Cov(X) p_jᵀ, where |mean| is 50 times the deviation."""
    student = (torch.randn(300, 8, dtype=torch.float64) + 50).to(dtype)
    row_weight = torch.rand(300, dtype=torch.promote_types(dtype, torch.float32))
    row_weight[::5] = 0
    student_with_garbage = student.clone()
    student_with_garbage[::5] = torch.nan
    weight = torch.randn(12, 8, dtype=torch.float64)
    mean, covariance = mean_and_covariance(student_with_garbage, row_weight)
    exact = torch.promote_types(dtype, torch.float32)
    assert mean.dtype == covariance.dtype == exact
    w = row_weight.double()[:, None] / row_weight.double().sum()
    z = student.double() @ weight.T
    true_mean = (w * z).sum(0)
    true_variance = (w * (z - true_mean).square()).sum(0)
    limit = 1e-13 if dtype == torch.float64 else 1e-5
    assert error(weight @ mean.double(), true_mean) <= limit
    assert error(torch.einsum("ts,su,tu->t", weight, covariance.double(), weight), true_variance) <= limit


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bit_products_of_the_scatter(dtype, weighted, monkeypatch):
    """With 16-bit operands, as on a GPU: the covariance is float32's, its gradient as good as the student's dtype."""
    monkeypatch.setattr(chunks, "operand_dtype", lambda x: x.dtype)
    student = (torch.randn(4000, 8) + 50).to(dtype)
    row_weight = torch.rand(4000) if weighted else None
    leaf = student.clone().requires_grad_()
    _, covariance = mean_and_covariance(leaf, row_weight)
    exact_leaf = student.double().requires_grad_()
    _, exact = mean_and_covariance(exact_leaf, row_weight.double() if weighted else None)
    assert covariance.dtype == torch.float32 and error(covariance, exact) <= 1e-5
    upstream = 16 * torch.randn(8, 8)  # a scaled loss: float16 gradients would underflow
    (gradient,) = torch.autograd.grad(covariance, leaf, upstream)
    (truth,) = torch.autograd.grad(exact, exact_leaf, upstream.double())
    assert error(gradient, truth) <= {torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bit_products_as_on_a_gpu(dtype, monkeypatch):
    monkeypatch.setattr(chunked, "operand_dtype", lambda x: x.dtype)
    for option in OPTIONS.values():
        Case((130, 40, 200), dtype, **option).check(one_row_chunks, slack=1.5)


@pytest.mark.parametrize(
    "options", [{"loss": {"smooth_l1": 1e5}}, {"loss": {"smooth_l1": 1e-6}}, {"beta": 1e9}], ids=str
)
def test_float16_products_of_a_gradient_that_float16_does_not_hold(options, monkeypatch):
    monkeypatch.setattr(chunked, "operand_dtype", lambda x: x.dtype)
    case = Case((130, 40, 200), torch.float16, **options)
    case.grad_output = torch.tensor(1.0 / (options["loss"]["smooth_l1"] if "loss" in options else 1e-9))
    case.check(one_row_chunks, slack=1.5)


@pytest.mark.parametrize("weight", [1.0, 1e-8])
def test_float16_products_of_a_small_scatter(weight, monkeypatch):
    monkeypatch.setattr(chunks, "operand_dtype", lambda x: x.dtype)
    student = (1e-3 * torch.randn(4000, 8)).half()
    row_weight = torch.full((4000,), weight)
    _, covariance = mean_and_covariance(student, row_weight)
    _, exact = mean_and_covariance(student.double(), row_weight.double())
    assert error(covariance, exact) <= 1e-5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_column_statistics(dtype, weighted, small_chunks):
    teacher = (torch.randn(300, 7, dtype=torch.float64) + 20).to(dtype)
    row_weight = torch.rand(300, dtype=torch.promote_types(dtype, torch.float32)) if weighted else None
    w = torch.ones(300, 1, dtype=torch.float64) if row_weight is None else row_weight.double()[:, None]
    mean = statistics.column_sums([teacher], [row_weight])[0] / w.sum()
    true_mean = (w * teacher.double()).sum(0) / w.sum()
    exact = torch.promote_types(dtype, torch.float32)
    limit = 1e-13 if dtype == torch.float64 else 1e-6
    assert mean.dtype == exact and error(mean, true_mean) <= limit
    (squares,) = statistics.column_square_sums([teacher], [row_weight], true_mean.to(exact)[None])
    truth = (w * (teacher.double() - true_mean.to(exact).double()).square()).sum(0)
    assert squares.dtype == exact and error(squares, truth) <= limit


def test_statistics_opcheck():
    x, w, mean, sums = torch.randn(6, 4), torch.rand(6), torch.randn(4), torch.randn(4)
    torch.library.opcheck(OPS.column_sum.default, (x, w))
    torch.library.opcheck(OPS.column_square_sum.default, (x, w, mean))
    torch.library.opcheck(OPS.student_scatter_backward.default, (torch.randn(4), torch.randn(4, 4), x, w, mean))
    torch.library.opcheck(OPS.student_scatter.default, (x.requires_grad_(), w, sums, mean))


def test_second_order_of_the_statistics_is_refused():
    x = torch.randn(6, 4, requires_grad=True)
    for value in mean_and_covariance(x, None):
        upstream = torch.ones_like(value, requires_grad=True)
        (gradient,) = torch.autograd.grad(value, x, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match='backend="torch"'):
            gradient.sum().backward()


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False)])
def test_opcheck(needed):
    case = Case((6, 5, 7), torch.float32, **OPTIONS["everything"])
    for name, need in zip(("student", "weight", "bias"), needed, strict=True):
        getattr(case, name).requires_grad_(need)
    options = "layer_norm", 1e-5, 0.2, 0.5, 0.3, 0.5, 1 << 20
    torch.library.opcheck(
        chunked.chunked_loss.overload,
        (
            case.student,
            case.teacher,
            case.weight,
            case.bias,
            case.row_weight,
            case.channel_shift,
            case.channel_scale,
            case.denominator,
            1.0,
            *options,
            *needed,
        ),
    )
    unscaled = [torch.randn(*size) for size in ((6, 5), (7, 5), (7,))]
    backward = torch.ones(()), *unscaled, None, 0.5, torch.float16, torch.float32
    torch.library.opcheck(chunks.chunked_backward.overload, backward)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"loss": "mse"}, {"bias": True, "weights": True, "beta": 0.05}])
@pytest.mark.parametrize("form", [chunked.loss, one_row_chunks])
def test_l2(form, options, dtype):
    for shape in SHAPES[1:]:
        Case(shape, dtype, normalization="l2", **options).check(form)


def test_l2_of_rows_of_zeros():
    """As F.normalize: a norm counts as eps at least."""
    case = Case((6, 3, 5), torch.float32, normalization="l2", eps=1e-3)
    case.teacher[2] = 0
    case.teacher[3] *= 1e-6
    case.check(chunked.loss)
