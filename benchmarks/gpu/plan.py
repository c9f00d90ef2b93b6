"""The steps of the two calls, in order of value. Steps of one group run side by side."""

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import records

LIMIT_S = {1: 350, 2: 290}  # of a whole call
PREFIX = records.ROOT / "build" / "gpu-prefix"  # pip's own bookkeeping; the extension lands in vkd_kernels/
KERNEL_TESTS = [f"tests/ops/test_ortho_proj_loss_{room}.py" for room in ("triton", "group_triton", "semi_orthogonal")]
GPU_TESTS = ["tests/ops/test_ortho_proj_loss_gpu.py", "tests/ops/test_cayley_cuda.py", "tests/modules/test_faults.py"]
SANITIZERS = ("memcheck", "racecheck", "synccheck")

# (the step's limit in seconds, a part of the case's name), most valuable first
LOSS_ROWS = {
    1: [(45, "token 100352 x 192 "), (25, "pooled 512 x 192 -> 3024 bfloat16"), (45, "token 100352 x 768 ")],
    2: [(45, "token 100352 x 384 "), (40, "6 x 34000"), (25, "6 x 600")],
}
CAYLEY_ROWS = {1: [(25, "3024 x 192"), (20, "6 x 256 x 256")], 2: [(20, "768 x 64"), (40, "maps 3024 x 192")]}


@dataclass
class Step:
    """One command with its limit. `missing` says why it can't run here, which is no failure."""

    name: str
    command: list[str]
    limit_s: int
    missing: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def find_tool(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which(name)] + [os.path.join(home, "bin", name) for home in homes if home]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def with_tool(name: str, options: list[str], command: list[str], rehearse: bool) -> tuple[list[str], str | None]:
    """(the command run by a tool of CUDA, why it can't be). A rehearsal runs the command alone."""
    if rehearse:
        return command, None
    tool = find_tool(name)
    missing = None if tool else f"{name} was not found (looked on PATH and in CUDA_HOME/bin)"
    return [tool or name, *options, *command], missing


def groups(call: int, folder: Path, rehearse: bool) -> list[list[Step]]:
    return (first_call if call == 1 else second_call)(folder, rehearse)


def first_call(folder: Path, rehearse: bool) -> list[list[Step]]:
    return [
        [build(rehearse), warm(rehearse)],
        [info()],
        [program("right, ceilings, reduction", "smoke", ["right", "ceilings", "reduction"], folder, 40, rehearse)],
        [program("where the time goes", "smoke", ["time_per_kernel"], folder, 40, rehearse)],
        [
            tests("tests of the kernels", KERNEL_TESTS, "not gpu", 12, 90, rehearse),
            tests("tests that need a GPU", GPU_TESTS, "gpu", 4, 90, rehearse),
        ],
        *benchmark_rows("ortho_proj_loss", LOSS_ROWS[1], folder, rehearse),
        *benchmark_rows("cayley", CAYLEY_ROWS[1], folder, rehearse),
        [program("training with every implementation", "training", [], folder, 60, rehearse)],
    ]


def second_call(folder: Path, rehearse: bool) -> list[list[Step]]:
    return [
        # nothing to do on a machine that is still warm; the first call has rehearsed it
        *([] if rehearse else [[build(rehearse), warm(rehearse)]]),
        [program("tiles, chunks and the row-stationary kernel", "smoke", ["tile_choices"], folder, 60, rehearse)],
        [profile(folder, rehearse)],
        [sanitizer(tool, rehearse) for tool in (SANITIZERS[:1] if rehearse else SANITIZERS)],
        *benchmark_rows("ortho_proj_loss", LOSS_ROWS[2], folder, rehearse),
        *benchmark_rows("training_step", [(100, "pooled")], folder, rehearse),
        *benchmark_rows("cayley", CAYLEY_ROWS[2], folder, rehearse),
    ]


# ------------------------------------------------------------------------------------------------------------ the steps


def build(rehearse: bool) -> Step:
    """An editable installation into a prefix of its own: it builds in place and leaves the system's packages alone."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        "--prefix",
        str(PREFIX),
        "-e",
        ".",
    ]
    return Step("build", [*pip, "--dry-run"] if rehearse else pip, 100)


def warm(rehearse: bool) -> Step:
    """Every shipped form compiled into Triton's cache by as many processes as there are cores."""
    few = ["--forms", "pooled bf16, ones"] if rehearse else []
    return Step("warm Triton's cache", [sys.executable, "-m", "benchmarks.gpu.warm", *few], 100)


def info() -> Step:
    return Step("info", [sys.executable, "-m", "vkd_kernels.info"], 30)


def program(name: str, module: str, words: list[str], folder: Path, limit_s: int, rehearse: bool) -> Step:
    command = [sys.executable, "-m", f"benchmarks.gpu.{module}", *words, "--records", str(folder)]
    return Step(name, [*command, "--rehearse"] if rehearse else command, limit_s)


def tests(name: str, paths: list[str], marked: str, workers: int, limit_s: int, rehearse: bool) -> Step:
    how = ["--collect-only"] if rehearse else ["-n", str(workers), "--dist", "worksteal"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rf", "-m", marked]
    return Step(name, [*pytest, *how, *paths], limit_s)


def benchmark_rows(benchmark: str, rows: list[tuple[int, str]], folder: Path, rehearse: bool) -> list[list[Step]]:
    """One step per case: a record that is cut short keeps the cases before."""
    command = [sys.executable, "-m", f"benchmarks.bench_{benchmark}", "--records", str(folder), "--seconds", "0.2"]
    command += ["--extend", *(["--rehearse"] if rehearse else [])]
    rows = rows[:1] if rehearse else rows  # the others differ in their sizes alone
    return [[Step(f"{benchmark}: {case.strip()}", [*command, "-k", case], limit_s)] for limit_s, case in rows]


def profile(folder: Path, rehearse: bool) -> Step:
    options = [
        "--clock-control",
        "none",
        "--set",
        "full",
        "--launch-skip",
        "24",
        "-c",
        "6",
        "-f",
        "-o",
        str(folder / "token768"),
        "-k",
        "regex:statistics|loss|nvjet|gemm|cutlass",
    ]
    once = [sys.executable, "-m", "benchmarks.gpu.once", "tiny" if rehearse else "768"]
    command, missing = with_tool("ncu", options, once, rehearse)
    return Step("profile of the token-level loss", command, 60, missing)


def sanitizer(tool: str, rehearse: bool) -> Step:
    once = [sys.executable, "-m", "benchmarks.gpu.once", "tiny" if rehearse else "small"]
    command, missing = with_tool("compute-sanitizer", ["--tool", tool, "--error-exitcode", "9"], once, rehearse)
    separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation of its own
    return Step(f"compute-sanitizer {tool}", command, 75, missing, separate)


def described(listed: list[list[Step]], call: int) -> str:
    lines = [f"call {call}: at most {LIMIT_S[call]} s"]
    for group in listed:
        for step in group:
            text = f"skipped: {step.missing}" if step.missing else " ".join(step.command[1:])
            lines.append(f"  {step.name:44} {step.limit_s:4} s   {text}")
    return "\n".join(lines)
