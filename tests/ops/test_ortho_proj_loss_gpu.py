"""The fused loss on a GPU at full size: accuracy, the same bits, graphs, memory, synchronisation, 64-bit offsets.

The truth is the chunked loss in float64, which test_ortho_proj_loss_chunked.py holds to the reference.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import vkd_kernels as vk
from tests.helpers.loss_cases import GRADIENT_ERROR, LOSS_ERROR, OPTIONS, Case, error
from vkd_kernels.ops.ortho_proj_loss import chunked, reference
from vkd_kernels.ops.ortho_proj_loss.spec import LossInputs, LossSpec

pytestmark = pytest.mark.gpu

# Paper: a pooled batch, tokens of DeiT-Ti and of a wider student, detection's positions.
POOLED = (512, 192, 3024)
TOKENS = (100352, 192, 3024)
SIZES = [POOLED, TOKENS, (100352, 768, 1024), (34000, 256, 256), (20001, 100, 1001)]
MIB = 1 << 20
SUM_ERROR = 1e-3  # between products of 16 bit over 1e5 rows and more: tensor cores cut what they add off, not round it


@pytest.fixture
def fused_loss():
    # Not imported with this module: its kernels are to be decorated as conftest.py has arranged.
    from vkd_kernels.ops.ortho_proj_loss import triton

    return triton.loss


def case_of(shape, dtype, option="layer_norm", **kwargs):
    return Case(shape, dtype, **OPTIONS[option], **kwargs, device="cuda")


def step(loss_function, case, grad_output=None):
    """loss and gradients of leaves that stay the same tensors from call to call."""
    leaves = case.leaves()
    loss = loss_function(case.spec, case.inputs)
    return [loss, *torch.autograd.grad(loss, leaves, grad_output)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("option", ["layer_norm", "everything", "channels_mse"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_accuracy_at_full_size(shape, option, dtype, fused_loss):
    case = case_of(shape, dtype, option, weight_dtype=torch.float32)
    true_loss, truth = case.truth(chunked.loss)
    composed_loss, composed = case.run(reference.loss)
    loss, got = case.run(fused_loss)
    assert error(loss, true_loss) <= max(LOSS_ERROR[dtype], 1.5 * error(composed_loss, true_loss))
    for name, gradient in got.items():
        limit = max(GRADIENT_ERROR[dtype], 1.5 * error(composed[name], truth[name]))
        assert error(gradient, truth[name]) <= limit, name


def test_tf32_only_where_pytorch_allows_it(fused_loss):
    case = case_of(POOLED, torch.float32)
    _, truth = case.truth(chunked.loss)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, least, most in (("highest", 0.0, 2e-6), ("high", 1e-5, 1e-3)):
            torch.set_float32_matmul_precision(precision)
            _, got = case.run(fused_loss)
            assert least <= error(got["student"], truth["student"]) <= most
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [POOLED, TOKENS], ids=str)
def test_the_same_bits_in_20_runs(shape, fused_loss):
    case = case_of(shape, torch.bfloat16, "everything")
    first = step(fused_loss, case)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, step(fused_loss, case), strict=True))


def test_chunked_run_equals_an_unchunked_one(fused_loss):
    case = case_of(TOKENS, torch.bfloat16)
    loss, got = case.run(fused_loss)
    whole_loss, whole = case.run(fused_loss, workspace_bytes=8 << 30)
    assert torch.equal(loss, whole_loss)  # the same tiles, added in the same order
    assert error(got["student"], whole["student"].double()) <= 4e-3
    assert error(got["weight"], whole["weight"].double()) <= SUM_ERROR


def capture(function):
    """A CUDA graph of function() and its (static) result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("shape", [POOLED, (20000, 192, 1024)], ids=str)
@pytest.mark.parametrize("option", ["layer_norm", "everything"])
def test_graph_replay(shape, option, fused_loss):
    case = case_of(shape, torch.bfloat16, option)
    grad_output = torch.ones((), device="cuda")
    graph, captured = capture(lambda: step(fused_loss, case, grad_output))
    for seed in range(3):
        fresh = case_of(shape, torch.bfloat16, option, seed=seed)
        with torch.no_grad():
            for old, new in zip(case.tensors, fresh.tensors, strict=True):
                old.copy_(new)
        expected = [x.clone() for x in step(fused_loss, case, grad_output)]
        for x in captured:
            x.fill_(torch.nan) if not x.requires_grad else x.detach().fill_(torch.nan)
        for _ in range(2):
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))


@pytest.mark.parametrize(
    "rows", [[600] * 6, [34000, 8500, 2125, 544, 136, 40]], ids=["six of few rows", "a pyramid of many and few"]
)
def test_group(rows):
    """Detection's six projections in one call: accuracy, the same bits, no synchronisation, graph replay."""
    students = [torch.randn(n, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in rows]
    teachers = [2 * torch.randn(n, 256, device="cuda", dtype=torch.bfloat16) + 1 for n in rows]
    weights = torch.linalg.qr(torch.randn(6, 256, 256, device="cuda")).Q.requires_grad_()
    masks = [torch.rand(n, device="cuda") > 0.2 for n in rows]
    leaves, upstream = [*students, weights], torch.linspace(0.5, 2, 6, device="cuda")

    def losses(students, teachers, weights, **options):
        return vk.functional.ortho_proj_losses(
            students, teachers, weights, masks=masks, normalization="batch_norm", **options
        )

    def step():
        value = losses(students, teachers, weights)
        return [value, *torch.autograd.grad(value, leaves, upstream)]

    first = step()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = losses(exact[:-1], [y.double() for y in teachers], exact[-1], backend="torch")
    assert error(first[0], truth) <= 1e-4
    for got, expected in zip(first[1:], torch.autograd.grad(truth, exact, upstream.double()), strict=True):
        assert error(got, expected) <= 1e-2
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [step() for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for run in runs for a, b in zip(first, run, strict=True))
    graph, captured = capture(step)
    for x in captured:
        x.detach().fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


@pytest.mark.parametrize("option, most", [("layer_norm", 3), ("bias", 3), ("none", 3)])
def test_pooled_launches(option, most, fused_loss):
    """Forward and backward: row statistics, loss, gradients."""
    case = case_of(POOLED, torch.bfloat16, option)
    grad_output = torch.ones((), device="cuda")
    graph, _ = capture(lambda: step(fused_loss, case, grad_output))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels) <= most, kernels


@pytest.mark.parametrize("rows, channels", [(100352, 192), (200704, 192), (100352, 768)])
def test_memory_beyond_inputs_and_gradients(rows, channels, fused_loss):
    """At most the workspace, and in backward the unscaled dX (kept until then) beside the scaled one."""
    case = case_of((rows, channels, 3024), torch.bfloat16, weight_dtype=torch.float32)
    leaves = case.leaves()
    gradients = sum(x.numel() * x.element_size() for x in leaves)
    torch.eye(64, device="cuda", dtype=torch.bfloat16).mm(torch.eye(64, device="cuda", dtype=torch.bfloat16))  # cuBLAS
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = fused_loss(case.spec, case.inputs)
    assert torch.cuda.max_memory_allocated() - before - gradients <= 128 * MIB
    torch.autograd.grad(loss, leaves)
    assert torch.cuda.max_memory_allocated() - before - 2 * gradients <= 128 * MIB


@pytest.mark.parametrize("shape", [POOLED, (20000, 192, 1024)], ids=str)
def test_no_host_synchronisation(shape, fused_loss):
    case = case_of(shape, torch.float16, "everything")
    step(fused_loss, case)  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(fused_loss, case, torch.ones((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_past_32_bit_offsets(fused_loss):
    """N·T beyond 2³¹ elements: the last rows get the gradient they get alone."""
    n, s, t = (1 << 21) + 300, 16, 1024 + 8
    needed = 20 << 30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory; {torch.cuda.mem_get_info()[0] >> 30} GiB are free")
    assert n * t > 1 << 31
    student = torch.randn(n, s, device="cuda", dtype=torch.bfloat16)
    teacher = torch.empty(n, t, device="cuda", dtype=torch.bfloat16).normal_()
    weight = torch.randn(t, s, device="cuda").requires_grad_()

    def run(rows, **kwargs):
        leaf = student[rows].detach().requires_grad_()
        loss = fused_loss(LossSpec(), LossInputs(leaf, teacher[rows], weight, denominator=1.0), **kwargs)
        return loss, *torch.autograd.grad(loss, (leaf, weight))

    tail = slice(n - 4096, n)
    _, alone, _ = run(tail)
    parts = [run(slice(start, start + (1 << 19))) for start in range(0, n, 1 << 19)]
    true_loss, true_dp = (sum(part[i].double() for part in parts) for i in (0, 2))
    for workspace_bytes in (128 * MIB, 8 << 30):  # in chunks, and with a G of more than 2³¹ elements
        loss, dx, dp = run(slice(None), workspace_bytes=workspace_bytes)
        assert error(loss, true_loss) <= 1e-5
        assert error(dx[tail], alone.double()) <= 4e-3
        assert error(dp, true_dp) <= SUM_ERROR


SANITIZED = """
import torch
from vkd_kernels.ops.ortho_proj_loss import triton
from vkd_kernels.ops.ortho_proj_loss.spec import LossInputs, LossSpec
for n in (33, 1500):
    x = torch.randn(n, 20, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    p, b = torch.randn(45, 20, device="cuda", requires_grad=True), torch.randn(45, device="cuda", requires_grad=True)
    teacher, row_weight = torch.randn(n, 45, device="cuda"), torch.rand(n, device="cuda")
    inputs = LossInputs(x, teacher, p, denominator=1.0, row_weight=row_weight, bias=b)
    triton.loss(LossSpec(), inputs).backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or an overrun ends in memory of the same segment
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | separate)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
