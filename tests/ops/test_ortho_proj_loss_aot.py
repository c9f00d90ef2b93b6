"""Every fused kernel as it ships, compiled ahead of time for NVIDIA's and AMD's chips: no GPU is needed.

The losses of benchmarks/host_time/forms.py run with their launches recorded: what is compiled here is what would be
launched. Compilation happens in processes of their own, for this one may be interpreting Triton; the kernels for sm_90
are in Triton's cache from then on, where the launches of test_host_time.py find them.
"""

import concurrent.futures
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("benchmarks.host_time.forms", reason="needs the repository's benchmarks")

CHIPS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
SHARED_BYTES = {  # of a program
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,  # and sm_89: GeForce RTX 30 and 40
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,  # GeForce RTX 50
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}


def number(chip: str) -> int:
    """Of any chip, also one that is not in the table: "sm_89" -> 89."""
    return int(chip.removeprefix("sm_").removeprefix("gfx"))


WITH_DESCRIPTORS = ("sm_90", "sm_100", "sm_120")
LIKE_ANOTHER = ("sm_86", "sm_120", "gfx950")  # the tiles of sm_80, sm_90 and gfx942, in less or more shared memory
NOTES = {"C7519"}  # ptxas puts in an arrive where a loop has vanished (S = 1): nothing is serialized
# Its A operand lies in registers, where ptxas before 13.3 has a bug (Triton issue 9433) that waiting avoids.
SERIALIZED = {"scatter_gradients": {"C7515"}}
# A scalar may lie on the stack; a tile too large is hundreds.
SPILLED_BYTES = {"sm_80": 64, "sm_86": 64, "sm_90": 8, "sm_100": 32, "sm_120": 32}
SPILLED_BYTES_BEFORE_3_6 = 64  # the ptxas of Triton 3.4 allocates registers less well: 20 bytes in cosine_rows
TF32 = ("tokens fp32", "pooled fp32", "semi-orthogonal fp32, raw")  # these once more with TF32
SWITCHED = {  # what a benchmark can switch on: (name in tiles.py, value)
    "tokens bf16, row-stationary": ("ROW_STATIONARY_UP_TO", 192),
    "tokens bf16, 768, wide": ("WIDE_FROM", 384),
}
IN_SHORT = (  # each kernel in every dtype and with every option; sm_90 compiles every form in any case
    "tokens bf16",
    "tokens fp16, everything",
    "tokens fp32, everything",
    "tokens fp16, mixture, ragged",
    "pooled bf16, everything",
    "pooled fp32",
    "semi-orthogonal bf16",
    "semi-orthogonal fp32, raw",
    "statistics bf16",
    "statistics fp16, six, weighted",
    "statistics fp32, weighted",
)
WIDEST = ("tokens bf16, 768", "tokens fp32, TF32", "pooled bf16, everything", "semi-orthogonal fp32, raw")
PRODUCTS = {"loss_tile", "gradient_tiles", "teacher_products", "scatter_tiles", "scatter_gradients"} | {
    "cosine_rows",
    "row_stationary",
}
# Registers per thread at most, on sm_90: the numbers of CTAs per SM that the tiles were chosen for.
TUNED = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)  # the compilers tiles are chosen for
REGISTERS = {
    ("loss_tile", "tokens bf16"): 128,  # two CTAs of 8 warps
    ("loss_tile", "pooled bf16"): 128,
    ("gradient_tiles", "pooled bf16"): 128,
}


def names() -> list[str]:
    from benchmarks.host_time import forms

    return [*forms.forms(), *(f"{form}, TF32" for form in TF32), *SWITCHED]


def record(form: str, chip: str) -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """{kernel: (function, arguments, options)} of the form's launches on that chip."""
    from benchmarks.host_time import forms

    launches: dict[str, Any] = {}
    prepare(form, chip, lambda kernel, *details: launches.setdefault(kernel.__name__, (kernel, *details)))
    forms.forms()[re.sub(", (TF32|row-stationary|wide)$", "", form)]()
    return launches


def prepare(form: str, chip: str, recorder: Any) -> None:
    """From now on in this process, recorder(kernel, arguments, options) is called in place of every launch."""
    from benchmarks.host_time import stub
    from vkd_kernels.ops.ortho_proj_loss.triton import launch, loss_tiles, pooled, rows, semi_orthogonal, tiles

    launch.recorder = recorder
    tiles.chip = lambda device: tiles.Chip("cuda" if chip.startswith("sm") else "hip", number(chip), 132)
    for module in (loss_tiles, pooled, rows, semi_orthogonal):
        module.precision = lambda dtype, chip: "tf32" if form.endswith("TF32") else "ieee"
    launch.prepared.cache_clear()
    stub.without_products()
    for name, (switch, value) in SWITCHED.items():
        setattr(tiles, switch, value if form == name else None)


def source(
    function: Any, arguments: dict[str, Any], options: dict[str, Any], target: Any
) -> tuple[Any, dict[str, Any]]:
    """(source, options) of the recorded launch, specialized as Triton's just-in-time compiler does it."""
    from triton._utils import find_paths_if, get_iterable_path
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, _ = bind(**arguments, **options)
    if hasattr(function, "_pack_args"):
        flags, signature, constants, attributes = function._pack_args(
            backend, {**arguments, **options}, bound, specialization, None
        )
        return ASTSource(function, signature, constants, attributes), flags.__dict__
    # Triton 3.4 has no such method; this is what its `run` does before it compiles.
    kinds = [kind for kind, _ in specialization]
    marks = [mark for _, mark in specialization]
    constants = find_paths_if(kinds, lambda _, kind: kind == "constexpr")
    attributes = find_paths_if(marks, lambda _, mark: isinstance(mark, str))
    code = ASTSource(
        function,
        dict(zip([parameter.name for parameter in function.params], kinds, strict=True)),
        {path: get_iterable_path(list(bound.values()), path) for path in constants},
        {path: backend.parse_attr(get_iterable_path(marks, path)) for path in attributes},
    )
    return code, backend.parse_options(options).__dict__


def compile_form(job: tuple[str, str]) -> dict[str, dict[str, Any]]:
    """{kernel: what the compiler made of it} for one form and chip."""
    import triton
    from triton.backends.compiler import GPUTarget

    form, chip = job
    target = GPUTarget("cuda", number(chip), 32) if chip.startswith("sm") else GPUTarget("hip", chip, 64)
    results = {}
    for name, launch in record(form, chip).items():
        code, flags = source(*launch, target)
        try:
            compiled = triton.compile(code, target=target, options=flags)
        except Exception as error:
            if "ROCm linker" not in str(error):  # later versions of Triton bring it
                raise
            return {"missing": {"reason": f"Triton {triton.__version__}: {error}"}}
        used = _of_nvidia(compiled, chip) if target.backend == "cuda" else _of_amd(compiled)
        results[name] = {"shared": compiled.metadata.shared, **used}
    return results


def keep_reports_of_ptxas() -> None:
    """Triton calls ptxas with -v and drops what it says: from now on it stays in the metadata of what is compiled."""
    from triton.backends.nvidia import compiler

    make_cubin = compiler.CUDABackend.make_cubin
    said = []

    class Subprocess:
        """The module subprocess, as far as the compiler uses it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(subprocess, name)

        def run(self, command: list[str], *, stderr: Any, **options: Any) -> Any:
            result = subprocess.run(command, stderr=stderr, **options)
            said.append(Path(stderr.name).read_text())
            return result

    def with_report(self: Any, src: Any, metadata: dict[str, Any], *arguments: Any) -> Any:
        cubin = make_cubin(self, src, metadata, *arguments)
        metadata["report"] = said.pop()
        return cubin

    compiler.subprocess = Subprocess()
    compiler.CUDABackend.make_cubin = with_report


def report_of_ptxas(ptx: str, chip: str) -> str:
    from triton import knobs

    newer = getattr(knobs.nvidia, "ptxas_blackwell", None) if number(chip) >= 100 else None
    architecture = chip + ("a" if number(chip) >= 90 else "")
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(ptx)
        file.flush()
        command = [(newer or knobs.nvidia.ptxas).path, "-v", "--gpu-name", architecture, file.name, "-o", "/dev/null"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def _of_nvidia(compiled: Any, chip: str) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    # Without a report the kernel was in the cache before: a user's own launch has compiled it.
    report = getattr(compiled.metadata, "report", None) or report_of_ptxas(ptx, chip)
    stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report).groups()
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled": max(int(stack), int(stores), int(loads)),
        "warnings": sorted(set(re.findall(r"C75\d\d", report)) - NOTES),
        "mma": len(re.findall(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
        "fma": len(re.findall(r"\bfma\.rn\.f32", ptx)),
        "descriptors": "cp.async.bulk.tensor" in ptx,
    }


def _of_amd(compiled: Any) -> dict[str, Any]:
    assembly = compiled.asm["amdgcn"]
    numbers = {
        key: int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    return {
        "registers": numbers["vgpr_count"],
        "spilled": max(numbers["vgpr_spill_count"], numbers["private_segment_fixed_size"]),
        "warnings": [],
        # AMD's matrix units multiply float32 in full precision, too (…x2_f32): IEEE, as fused multiply-adds are.
        "mma": len(re.findall(r"v_mfma_f32_\w*(?:bf16|xf32|(?<![0-9a-z])f16)", assembly)),
        "fma": len(re.findall(r"v_(?:pk_)?fma|v_mfma_f32_\d+x\d+x\d+_?f32", assembly)),
        "descriptors": False,
    }


JOBS = [(form, chip) for form in names() for chip in CHIPS if chip.startswith("sm") or form in IN_SHORT]


def is_thorough(form: str, chip: str) -> bool:
    """Whether `make test` leaves this one to `make test-thorough`."""
    return chip != "sm_90" and form not in (WIDEST if chip in LIKE_ANOTHER else IN_SHORT + WIDEST)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """{(form, chip): {kernel: resources}} of the tests that were asked for, compiled by two processes."""
    asked = [item.callspec.params for item in request.session.items if item.path == request.path]
    jobs = [(params["form"], params["chip"]) for params in asked]
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            min(2, os.cpu_count() or 1), mp_context=context, initializer=keep_reports_of_ptxas
        ) as pool:
            return dict(zip(jobs, pool.map(compile_form, jobs), strict=True))
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


@pytest.mark.parametrize(
    "form, chip",
    [pytest.param(*job, marks=[pytest.mark.thorough] if is_thorough(*job) else []) for job in JOBS],
)
def test_compiles_for_the_chip(compiled: Any, form: str, chip: str) -> None:
    """Within its shared memory, without spills, without serialized wgmma (ptxas warns of it), on tensor cores."""
    kernels = compiled[form, chip]
    if "missing" in kernels:
        pytest.skip(kernels["missing"]["reason"])
    expected = {
        "tokens": {"loss_tile", "sum_shares", "scale_gradients"},
        "pooled": {"loss_tile", "gradient_tiles"},
        "group": {"loss_tile", "gradient_tiles"},
        "semi-orthogonal": {"teacher_products", "loss_rows", "sum_shares", "scale_gradients"},
        "statistics": {"column_sums_kernel", "scatter_tiles", "scatter_gradients"},
    }
    if form.endswith("row-stationary") and chip in ("sm_90", "sm_100"):
        expected["tokens"] = {"row_stationary", "sum_shares", "scale_gradients"}
    assert expected[form.split(" ")[0]] <= set(kernels)
    for name, used in kernels.items():
        assert used["shared"] <= SHARED_BYTES[chip], (name, used)
        assert used["spilled"] <= (SPILLED_BYTES.get(chip, 0) if TUNED else SPILLED_BYTES_BEFORE_3_6), (name, used)
        assert set(used["warnings"]) <= SERIALIZED.get(name, set()), (name, used)
        if chip == "sm_90" and TUNED:
            assert used["registers"] <= REGISTERS.get((name, form), 255), (name, used)
        if name in PRODUCTS and "fp32" in form and "TF32" not in form:
            assert used["mma"] == 0 < used["fma"], (name, used)  # IEEE
        elif name in PRODUCTS and not (form.endswith("TF32") and chip.startswith("gfx")):
            assert used["mma"] > 0, (name, used)
    if form in ("tokens bf16", "tokens bf16, ragged"):
        has_descriptors = chip in WITH_DESCRIPTORS and form == "tokens bf16"
        assert kernels["loss_tile"]["descriptors"] == has_descriptors


if __name__ == "__main__":  # the table: python -m tests.ops.test_ortho_proj_loss_aot [form [chip]]
    for job in JOBS:
        if all(word in "/".join(job) for word in sys.argv[1:]):
            for kernel, used in compile_form(job).items():
                print(f"{job[0]:36} {job[1]:7} {kernel:20}", *(f"{k} {v}" for k, v in used.items() if v), flush=True)
