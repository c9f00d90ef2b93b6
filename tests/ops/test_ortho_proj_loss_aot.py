"""Every fused kernel as it ships, compiled ahead of time for sm_80, sm_90 and sm_100: no GPU is needed.

The operators run on meta tensors with their launches recorded, so that what is compiled here is what would be launched.
Compilation happens in processes of their own, for this one may be interpreting Triton.
"""

import concurrent.futures
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

pytest.importorskip("triton")

CAPABILITIES = (80, 90, 100)
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# ptxas may keep one scalar on the stack; a tile that is too large spills hundreds of bytes.
SPILLED_BYTES = {80: 64, 90: 8, 100: 8}
# form: (N, S, T), dtype of student and teacher, dtype of the weight, options
FORMS = {
    "tokens-bf16": ((100352, 192, 3024), "bfloat16", "bfloat16", {}),
    "tokens-fp16-everything": ((100352, 384, 1024), "float16", "float32", {"everything": True}),
    "tokens-bf16-ragged": ((100352, 100, 1001), "bfloat16", "bfloat16", {"mse": True}),
    "tokens-fp32": ((100352, 192, 3024), "float32", "float32", {}),
    "tokens-fp32-everything": ((100352, 100, 1001), "float32", "float32", {"everything": True}),
    "tokens-tf32": ((100352, 192, 3024), "float32", "float32", {"tf32": True}),
    "orthonormal-bf16": ((100352, 192, 3024), "bfloat16", "float32", {}),
    "orthonormal-fp16-everything": ((100352, 768, 1024), "float16", "float32", {"everything": True}),
    "orthonormal-bf16-ragged": ((100352, 100, 1001), "bfloat16", "float32", {}),
    "orthonormal-fp32": ((100352, 192, 3024), "float32", "float32", {}),
    "orthonormal-tf32": ((100352, 192, 3024), "float32", "float32", {"tf32": True}),
    "statistics-bf16": ((34000, 256, 256), "bfloat16", "float32", {}),
    "statistics-fp32-everything": ((34000, 256, 100), "float32", "float32", {"everything": True}),
    "statistics-levels-bf16": ((34000, 256, 256), "bfloat16", "float32", {"levels": 6}),
    "statistics-levels-fp16-everything": ((34000, 256, 100), "float16", "float32", {"levels": 6, "everything": True}),
    # Sizes of 1 are constants to Triton's compiler.
    "tokens-fp16-ones": ((2000, 1, 1), "float16", "float32", {"everything": True}),
    "orthonormal-bf16-ones": ((2000, 1, 1), "bfloat16", "float32", {}),
    "pooled-bf16-ones": ((1, 1, 1), "bfloat16", "float32", {"everything": True}),
    "statistics-bf16-ones": ((1, 1, 1), "bfloat16", "float32", {}),
    "pooled-bf16": ((512, 192, 3024), "bfloat16", "float32", {}),
    "pooled-bf16-everything": ((512, 100, 1001), "bfloat16", "float32", {"everything": True}),
    "pooled-fp32": ((512, 192, 3024), "float32", "float32", {}),
    "pooled-tf32": ((512, 192, 3024), "float32", "float32", {"tf32": True}),
    # Six projections in one launch: rows of each.
    "pooled-levels-bf16": ((2160, 256, 256), "bfloat16", "float32", {"rows": [1024, 600, 300, 150, 75, 11]}),
    "pooled-levels-fp16-everything": (
        (2160, 100, 1001),
        "float16",
        "float32",
        {"rows": [1024, 600, 300, 150, 75, 11], "everything": True},
    ),
    "pooled-levels-fp32": ((2160, 256, 256), "float32", "float32", {"rows": [1024, 600, 300, 150, 75, 11]}),
    # What autocast makes of a teacher whose last layer normalises: it stays float32.
    "tokens-bf16-teacher-32": ((100352, 192, 3024), "bfloat16", "float32", {"teacher": "float32"}),
    "pooled-bf16-teacher-32": ((512, 192, 3024), "bfloat16", "float32", {"teacher": "float32"}),
}
PRODUCTS = {"loss_tile", "gradient_tiles", "orthonormal_mse_rows", "scatter_tiles", "moment_gradients"}
# Registers per thread at most, on sm_90: the numbers of CTAs per SM that the tiles were chosen for.
REGISTERS = {
    ("loss_tile", "tokens-bf16"): 128,  # two CTAs of 8 warps
    ("loss_tile", "pooled-bf16"): 128,
    ("gradient_tiles", "pooled-bf16"): 128,
}


class Launches:
    """Stands in for the kernels' module: keeps (kernel, arguments, options) of every launch."""

    def __init__(self, kernels):
        self.kernels, self.recorded = kernels, []

    def __getattr__(self, name):
        function = getattr(self.kernels, name)

        class Kernel:
            def __getitem__(_, grid):
                return lambda *args, **options: self.recorded.append((function, args, options))

        return Kernel()


def record(form, capability):
    """The launches of one loss and its backward, on meta tensors."""
    launch = importlib.import_module("vkd_kernels.ops.ortho_proj_loss.triton.launch")
    (n, s, t), dtype, weight_dtype, options = FORMS[form]
    launches = Launches(launch.kernels)
    launch.kernels = launches
    launch._capability = lambda device: capability
    launch._precision = lambda dtype: "tf32" if options.get("tf32") else "ieee"
    everything = options.get("everything", False)
    rows = options.get("rows", [n])
    batch = [] if len(rows) == 1 else [len(rows)]
    factors = [1e-9] * len(rows)
    empty = lambda *size, dtype="float32": torch.empty(size, dtype=getattr(torch, dtype), device="meta")  # noqa: E731
    student, teacher = empty(n, s, dtype=dtype), empty(n, t, dtype=options.get("teacher", dtype))
    weight = empty(*batch, t, s, dtype=weight_dtype)
    channel, row_weight, denominator = (empty(*batch, t), empty(n), empty(*batch)) if everything else (None,) * 3
    needed = (True, True, everything)
    scalars = True, 1e-5, not options.get("mse"), 1.0
    try:  # the implementations themselves: a meta tensor would take an operator to its fake implementation
        if form.startswith("orthonormal"):
            _, *gradients = launch._orthonormal_mse(
                student, teacher, weight, empty(), row_weight, denominator, 1e-9, True, 1e-5, 128 << 20, *needed
            )
            launch._scale(empty(), *gradients, denominator, 1e-9, student.dtype, weight.dtype)
        elif form.startswith("statistics"):
            levels = [teacher] * options.get("levels", 1)
            weights = [row_weight] * len(levels) if everything else []
            means = empty(len(levels), t)
            launch._column_sums(levels, weights, None)
            sums, scatters = launch._moments(levels, weights, means, means)
            launch._moments_backward(sums, scatters, levels, weights, means)
        elif form.startswith("pooled"):
            _, gradient, sums = launch._pooled_forward(
                student, teacher, weight, channel, row_weight, channel, channel, denominator, factors, rows,
                *scalars, *needed,
            )  # fmt: skip
            launch._pooled_backward(
                empty(*batch), gradient, sums, student, weight, row_weight, denominator, factors, rows, *needed
            )
        else:
            _, *gradients = launch._fused_forward(
                student, teacher, weight, channel, row_weight, channel, channel, denominator, 1e-9,
                *scalars, 128 << 20, *needed,
            )  # fmt: skip
            launch._scale(empty(), *gradients, denominator, 1e-9, student.dtype, weight.dtype)
    finally:
        launch.kernels = launches.kernels
    return launches.recorded


def source(function, args, options, target):
    """(source, options) of the recorded launch, specialised as Triton's just-in-time compiler does it."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, flags = bind(*args, **options)
    flags, signature, constants, attributes = function._pack_args(backend, options, bound, specialization, flags)
    return ASTSource(function, signature, constants, attributes), flags.__dict__


def compile_form(job):
    """{kernel: what the compiler made of it} for one form and capability."""
    import triton
    from triton.backends.compiler import GPUTarget

    form, capability = job
    results = {}
    for function, args, options in record(form, capability):
        name = function.__name__
        if name in results:
            continue
        target = GPUTarget("cuda", capability, 32)
        code, flags = source(function, args, options, target)
        compiled = triton.compile(code, target=target, options=flags)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        ptx = compiled.asm["ptx"]
        results[name] = {
            "registers": registers, "spilled": stack + local, "shared": compiled.metadata.shared,
            "mma": len(re.findall(r"\bmma\.sync", ptx)), "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
            "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)), "fma": len(re.findall(r"\bfma\.rn\.f32", ptx)),
            "descriptors": "cp.async.bulk.tensor" in ptx,
        }  # fmt: skip
    return results


@pytest.fixture(scope="module")
def compiled():
    """{(form, capability): {kernel: resources}} of everything, compiled by two processes."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        jobs = [(form, capability) for form in FORMS for capability in CAPABILITIES]
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context) as pool:
            return dict(zip(jobs, pool.map(compile_form, jobs), strict=True))
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


JOBS = pytest.mark.parametrize("capability", CAPABILITIES)
EACH = pytest.mark.parametrize("form", FORMS)


@JOBS
@EACH
def test_every_kernel_of_the_form(compiled, form, capability):
    kernels = {
        "tokens": {"row_statistics", "loss_tile", "scale"},
        "pooled": {"row_statistics", "loss_tile", "gradient_tiles"},
        "orthonormal": {"orthonormal_mse_rows", "scale"},
        "statistics": {"column_sums", "scatter_tiles", "moment_gradients"},
    }
    assert set(compiled[form, capability]) == kernels[form.split("-")[0]]


@JOBS
@EACH
def test_fits_the_chip_without_spills(compiled, form, capability):
    for name, used in compiled[form, capability].items():
        assert used["shared"] <= SHARED_BYTES[capability], (name, used)
        assert used["spilled"] <= SPILLED_BYTES[capability], (name, used)
        if capability == 90:
            assert used["registers"] <= REGISTERS.get((name, form), 255), (name, used)


@JOBS
@EACH
def test_tensor_cores(compiled, form, capability):
    """Tensor-core instructions of the architecture for 16 bit and TF32; none for IEEE float32."""
    for name in PRODUCTS & set(compiled[form, capability]):
        used = compiled[form, capability][name]
        if "fp32" in form:
            assert used["mma"] == used["wgmma"] == used["tcgen05"] == 0 < used["fma"], (name, used)
        else:
            assert used[{80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]] > 0, (name, used)


@JOBS
def test_descriptors_where_the_hardware_has_them(compiled, capability):
    assert compiled["tokens-bf16", capability]["loss_tile"]["descriptors"] == (capability >= 90)
    assert not compiled["tokens-bf16-ragged", capability]["loss_tile"]["descriptors"]


if __name__ == "__main__":  # the table: python tests/ops/test_ortho_proj_loss_aot.py
    for job in [(form, capability) for form in FORMS for capability in CAPABILITIES]:
        if len(sys.argv) > 1 and sys.argv[1] not in job[0]:
            continue
        for kernel, used in compile_form(job).items():
            print(f"{job[0]:24} sm_{job[1]:<4} {kernel:16}", *(f"{k} {v}" for k, v in used.items() if v))
