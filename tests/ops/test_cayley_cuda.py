"""The Cayley transform in CUDA. Without a GPU: the compiler's report, the choice, vmap. With one: the kernels.

The algorithm itself is tested without a GPU by csrc/cayley/tests. To look for memory errors and races on a GPU:

    for tool in memcheck racecheck synccheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 \\
            python -m pytest tests/ops/test_cayley_cuda.py -k every_kernel
    done
"""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import vkd_kernels as vk
from vkd_kernels.ops import implementations
from vkd_kernels.ops.cayley.api import MAX_KERNEL_COLUMNS, candidates
from vkd_kernels.ops.implementations import Implementation

EXTENSION, MISSING = implementations.extension()
CUDA_BUILD = EXTENSION is not None and EXTENSION.build_info()["cuda"] is not None
needs_extension = pytest.mark.skipif(EXTENSION is None, reason=str(MISSING))
needs_cuda_build = pytest.mark.skipif(not CUDA_BUILD, reason=MISSING or "the extension was built without CUDA")

# Registers per thread that each kernel may take, by tile. 512 threads on an SM leave 128 each, 384 leave 168
# (RESIDENT in csrc/cayley/cuda/plan.h). A kernel that needs more spills, and no kernel may spill.
REGISTER_LIMITS = {
    ("GramKernel", 32): 104,
    ("GramKernel", 64): 112,
    ("SmallForwardKernel", 16): 128,
    ("SmallForwardKernel", 32): 128,
    ("SmallForwardKernel", 64): 128,
    ("FirstPanelKernel", 32): 128,
    ("PanelKernel", 32): 112,
    ("InverseKernel", 32): 112,
    ("InverseKernel", 64): 120,
    ("Q2Kernel", 32): 112,
    ("Q2Kernel", 64): 120,
    ("GradGramKernel", 32): 104,
    ("GradGramKernel", 64): 112,
    ("LeftKernel", 32): 128,
    ("LeftKernel", 64): 128,
    ("GradUKernel", 32): 128,
    ("GradUKernel", 64): 128,
    ("GradVKernel", 32): 128,
    ("GradVKernel", 64): 128,
    ("SmallBackwardKernel", 16): 168,
    ("SmallBackwardKernel", 32): 168,
    ("SmallBackwardKernel", 64): 168,
}
SHARED_LIMIT = 40 * 1024  # bytes: four teams of 128 threads fit an A100's 164 KB, and no kernel has to ask for more

# One shape for every way through csrc/cayley/cuda/plan.h: together they launch every kernel.
EVERY_PATH = [
    (3, 20, 9),  # one launch, tiles of 16
    (3, 40, 30),  # one launch, tiles of 32
    (2, 70, 50),  # one launch, tiles of 64
    (400, 30),  # VᵀV in parts, then the inverse
    (2, 66, 66),  # panels, no V
    (110, 70),  # panels, narrow tiles
    (24, 300, 140),  # panels, wide tiles
]


def find_cuobjdump():
    candidates = [shutil.which("cuobjdump")]
    candidates += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "cuobjdump"]
    try:
        import triton
    except ImportError:
        pass
    else:
        candidates.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(c) for c in candidates if c and Path(c).exists()), None)


def compiler_report():
    """[(architecture, kernel, tile, registers, bytes of stack and local memory, bytes of shared memory), ...]."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump (in the CUDA toolkit and in Triton)")
    text = subprocess.check_output([cuobjdump, "--dump-resource-usage", EXTENSION.__file__], text=True)
    rows, architecture = [], None
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            kernel, tile = re.search(r"\d([A-Z]\w*?Kernel)I\w*?ShapeILi(\d+)E", match[1]).groups()
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            rows.append((architecture, kernel, int(tile), registers, stack + local, shared))
    return rows


@needs_cuda_build
def test_no_kernel_spills_or_outgrows_its_registers():
    report = compiler_report()
    bad = [
        f"sm_{architecture} {kernel}<{tile}>: {registers} registers (limit {REGISTER_LIMITS[kernel, tile]}), "
        f"{spilled} B of stack (limit 0), {shared} B shared (limit {SHARED_LIMIT})"
        for architecture, kernel, tile, registers, spilled, shared in report
        if registers > REGISTER_LIMITS[kernel, tile] or spilled > 0 or shared > SHARED_LIMIT
    ]
    assert not bad, "\n".join(bad)
    for architecture in {row[0] for row in report}:
        seen = [row[1:3] for row in report if row[0] == architecture]
        assert set(seen) == set(REGISTER_LIMITS)
        assert seen.count(("GramKernel", 32)) == 2, "float32 and float64"


@needs_cuda_build
def test_the_default_architectures_are_in_the_binary():
    built = EXTENSION.build_info()["cuda_architectures"].split()
    assert {row[0] for row in compiler_report()} == {a.removesuffix("-real") for a in built if a.endswith("-real")}
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert {"80-real", "90-real"} <= set(built), "nvcc 12 and later know both"
        assert sum(a.endswith("-virtual") for a in built) == 1, "PTX for the GPUs to come"


def test_the_kernels_are_chosen_up_to_their_largest_size():
    both = (Implementation.EXTENSION, Implementation.REFERENCE)
    assert candidates("cuda", MAX_KERNEL_COLUMNS) == candidates("cpu", MAX_KERNEL_COLUMNS + 1) == both
    assert candidates("cuda", MAX_KERNEL_COLUMNS + 1) == (Implementation.REFERENCE,)


def test_a_request_overrules_the_choice(monkeypatch):
    monkeypatch.delenv(implementations.ENVIRONMENT, raising=False)
    monkeypatch.setattr(implementations, "why_not", lambda *args: None)
    decide = functools.partial(
        implementations.decide,
        "cayley",
        device=torch.device("cuda"),
        dtype=torch.float32,
        candidates=(Implementation.REFERENCE,),
    )
    assert decide(backend=None) is Implementation.REFERENCE
    assert decide(backend="extension") is Implementation.EXTENSION
    monkeypatch.setenv(implementations.ENVIRONMENT, "extension")
    assert decide(backend=None) is Implementation.EXTENSION


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80-real 90-real 100-real 100-virtual", (8, 6), True),  # binary code of its generation
        ("80-real 90-real 100-real 100-virtual", (7, 5), False),
        ("80-real 90-real 100-real 100-virtual", (12, 0), True),  # PTX
        ("80-real 90-real", (12, 0), False),
        ("90a-real", (9, 0), True),
        ("90a-virtual", (10, 0), False),
        ("100a-real 120a-real", (10, 3), False),
        ("100f-real", (10, 3), True),
        ("100f-virtual", (12, 0), False),
        ("89-real", (8, 6), False),
    ],
)
def test_whether_a_build_has_code_for_a_gpu(architectures, capability, runs):
    assert implementations.has_code_for(architectures, capability) is runs


def extension_cayley(weight):
    return vk.cayley(weight, backend="extension")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@needs_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(4, 7, 3), (3, 2, 5, 5)])
def test_vmap_is_one_batched_call(shape, device):
    weight = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    upstream = torch.randn_like(weight)
    expected = extension_cayley(weight)
    mapped = torch.func.vmap(extension_cayley)(weight)
    torch.testing.assert_close(mapped, expected)
    torch.testing.assert_close(torch.func.vmap(extension_cayley, in_dims=1)(weight.movedim(0, 1)), expected)
    grads = [torch.autograd.grad(q, weight, upstream)[0] for q in (mapped, expected)]
    torch.testing.assert_close(*grads)


@needs_extension
def test_vmap_over_the_backward():
    weight = torch.randn(6, 3, dtype=torch.float64)
    jacobians = [
        torch.autograd.functional.jacobian(lambda w, b=backend: vk.cayley(w, backend=b), weight, vectorize=vectorize)
        for backend, vectorize in (("extension", True), ("torch", False))
    ]
    torch.testing.assert_close(*jacobians)


@needs_extension
@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 2, 0)])
def test_vmap_of_the_backward_op(in_dims):
    """Of several gradients at one weight, and of a batch along any dimension."""
    weight, upstream = torch.randn(2, 4, 7, 3, dtype=torch.float64)
    weight = weight if in_dims[1] is not None else weight[:1].expand(4, 7, 3)
    r = torch.ops.vkd_kernels.cayley_forward(weight)[1]
    expected = torch.ops.vkd_kernels.cayley_backward(upstream, weight, r)
    given = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip((upstream, weight, r), in_dims, strict=True)]
    torch.testing.assert_close(torch.func.vmap(torch.ops.vkd_kernels.cayley_backward, in_dims)(*given), expected)


def value_and_grad(weight, upstream, backend="extension"):
    leaf = weight.detach().requires_grad_()
    q = vk.cayley(leaf, backend=backend)
    return q.detach(), torch.autograd.grad(q, leaf, upstream)[0]


def relative_error(got, expected):
    expected = expected.double()
    return ((got.double().to(expected.device) - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@pytest.mark.gpu
@needs_cuda_build
class TestOnTheGPU:
    @pytest.mark.parametrize("shape", EVERY_PATH)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_every_kernel(self, shape, dtype):
        weight, upstream = torch.randn(2, *shape, dtype=dtype).cuda() / shape[-1] ** 0.5
        expected = value_and_grad(weight.double().cpu(), upstream.double().cpu(), "torch")
        # The result is rounded once; inside it is float64, with sums of up to 400 terms.
        limit = 1e-7 if dtype == torch.float32 else 1e-12
        for got, truth in zip(value_and_grad(weight, upstream), expected, strict=True):
            assert got.dtype == dtype and got.is_contiguous()
            assert relative_error(got, truth) <= limit

    @pytest.mark.parametrize("shape", [(1, 1), (5, 1), (3024, 192), (6, 256, 256), (12, 768, 384), (1024, 1000)])
    def test_against_float64_on_the_cpu(self, shape):
        weight, upstream = torch.randn(2, *shape).cuda() / shape[-1] ** 0.5
        expected = value_and_grad(weight.double().cpu(), upstream.double().cpu(), "torch")
        for got, truth in zip(value_and_grad(weight, upstream), expected, strict=True):
            assert relative_error(got, truth) <= 1e-7

    @pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0, 1e3])
    @pytest.mark.parametrize("shape", [(3024, 192), (6, 256, 256), (20, 40, 30), (1500, 1100)])
    def test_orthonormal_at_every_scale(self, shape, scale):
        q = extension_cayley(torch.randn(shape, device="cuda") * scale).double()
        assert (q.mT @ q - torch.eye(shape[-1], device="cuda")).abs().max().item() <= 1e-6

    @pytest.mark.parametrize("shape", [(5, 3), (4, 4), (1, 1), (2, 20, 17), (70, 67)])
    def test_gradcheck(self, shape):
        weight = torch.randn(shape, dtype=torch.float64, device="cuda", requires_grad=True)
        assert torch.autograd.gradcheck(extension_cayley, (weight,), fast_mode=weight.numel() > 100)

    @pytest.mark.parametrize("shape", [(5, 3), (2, 4, 4), (2, 3, 90, 70)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_opcheck(self, shape, dtype):
        weight = torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)
        torch.library.opcheck(torch.ops.vkd_kernels.cayley_forward.default, (weight,))
        q, r = torch.ops.vkd_kernels.cayley_forward(weight.detach())
        torch.library.opcheck(torch.ops.vkd_kernels.cayley_backward.default, (q, weight.detach(), r))

    @pytest.mark.parametrize("shape", [(3024, 192), (6, 256, 256), (300, 40, 20)])
    def test_the_same_bits_every_run(self, shape):
        weight, upstream = torch.randn(2, *shape, device="cuda")
        q, grad = value_and_grad(weight, upstream)
        for _ in range(20):
            again = value_and_grad(weight, upstream)
            assert torch.equal(again[0], q) and torch.equal(again[1], grad)

    def test_uninitialised_memory_does_not_matter(self):
        weight, upstream = torch.randn(2, 2, 400, 200, device="cuda")
        expected = value_and_grad(weight, upstream)
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            assert torch.empty(4, device="cuda").isnan().all()
            again = value_and_grad(weight, upstream)
        finally:
            torch.use_deterministic_algorithms(False)
        for got, same in zip(again, expected, strict=True):
            assert torch.equal(got, same)

    def test_graph_capture_and_replay(self):
        weight = torch.randn(400, 130, device="cuda", requires_grad=True)
        upstream = torch.randn(400, 130, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.autograd.grad(extension_cayley(weight), weight, upstream)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            q = extension_cayley(weight)
            (grad,) = torch.autograd.grad(q, weight, upstream)
        for _ in range(3):
            with torch.no_grad():
                weight.copy_(torch.randn_like(weight))
            graph.replay()
            expected = value_and_grad(weight, upstream)
            assert torch.equal(q, expected[0]) and torch.equal(grad, expected[1])

    def test_no_host_synchronisation(self):
        weight, upstream = torch.randn(2, 400, 130, device="cuda")
        value_and_grad(weight, upstream)
        torch.cuda.set_sync_debug_mode("error")
        try:
            value_and_grad(weight, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_two_streams_at_once(self):
        pairs = [torch.randn(2, *shape, device="cuda") for shape in ((2000, 192), (6, 256, 256))]
        expected = [value_and_grad(*pair) for pair in pairs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in pairs]
        results = [[], []]
        for _ in range(10):
            for stream, pair, result in zip(streams, pairs, results, strict=True):
                with torch.cuda.stream(stream):
                    result.append(value_and_grad(*pair))
        torch.cuda.synchronize()
        for result, (q, grad) in zip(results, expected, strict=True):
            assert all(torch.equal(a, q) and torch.equal(b, grad) for a, b in result)

    def test_a_hundred_thousand_small_matrices(self):
        weight, upstream = torch.randn(2, 100_000, 12, 8, device="cuda")
        q, grad = value_and_grad(weight, upstream)
        some = torch.tensor([0, 1, 65_535, 65_536, 99_999], device="cuda")
        expected = value_and_grad(weight[some].double().cpu(), upstream[some].double().cpu(), "torch")
        assert relative_error(q[some], expected[0]) <= 1e-7 and relative_error(grad[some], expected[1]) <= 1e-6
        assert (q.mT @ q - torch.eye(8, device="cuda")).abs().max().item() <= 1e-5  # this product rounds in float32

    def test_strides(self):
        base = torch.randn(2, 90, 140, device="cuda")
        weight = base.transpose(-1, -2)[:, ::2, ::2].requires_grad_()  # (2, 70, 45), no unit stride
        before = base.clone()
        q = extension_cayley(weight)
        (grad,) = torch.autograd.grad(q, weight, torch.ones((), device="cuda").expand_as(q))
        expected = value_and_grad(weight.detach().contiguous(), torch.ones(2, 70, 45, device="cuda"))
        assert torch.equal(q, expected[0]) and torch.equal(grad, expected[1])
        assert torch.equal(base, before)

    def test_an_empty_batch(self):
        weight = torch.randn(0, 5, 3, device="cuda", requires_grad=True)
        assert torch.autograd.grad(extension_cayley(weight).sum(), weight)[0].shape == (0, 5, 3)

    def test_nan_reaches_the_result(self):
        weight = torch.randn(200, 100, device="cuda")
        weight[150, 3] = torch.nan
        assert extension_cayley(weight).isnan().any()

    def test_bad_arguments(self):
        op, weight = torch.ops.vkd_kernels, torch.randn(5, 3, device="cuda")
        with pytest.raises(TypeError, match="float32 or float64"):
            op.cayley_forward(weight.half())
        with pytest.raises(ValueError, match="T >= S"):
            op.cayley_forward(weight.mT)
        q, r = op.cayley_forward(weight)
        with pytest.raises(TypeError, match="grad_q must be"):
            op.cayley_backward(q.double(), weight, r)
        with pytest.raises(ValueError, match="r must have the shape"):
            op.cayley_backward(q, weight, r[:2])

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_the_weights_device_is_used(self):
        weight, upstream = torch.randn(2, 100, 70, device="cuda:1")
        got = value_and_grad(weight, upstream)
        assert got[0].device == weight.device == got[1].device
        assert relative_error(got[0].cpu(), vk.cayley(weight.cpu().double(), backend="torch")) <= 1e-7
