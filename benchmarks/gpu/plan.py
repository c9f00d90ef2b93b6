"""The steps of the three calls, in order of value. Steps of one group run side by side.

The limits of a call's groups add up to at most its own, so that every step is reached however long the others take.
"""

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import records

LIMIT_S = {1: 350, 2: 290, 3: 340}  # of a whole call
PREFIX = records.ROOT / "build" / "gpu-prefix"  # pip's own bookkeeping; the extension lands in vkd_kernels/
KERNEL_TESTS = [f"tests/ops/test_ortho_proj_loss_{room}.py" for room in ("triton", "group_triton", "semi_orthogonal")]
GPU_TESTS = ["tests/ops/test_ortho_proj_loss_gpu.py", "tests/ops/test_cayley_cuda.py", "tests/modules/test_faults.py"]
SANITIZERS = ("memcheck", "racecheck", "synccheck")

# (the step's limit in seconds, the case's name), most valuable first
LOSS_ROWS = {
    1: [
        (40, "token 100352 x 192 -> 3024 bfloat16"),
        (25, "pooled 512 x 192 -> 3024 bfloat16"),
        (40, "token 100352 x 768 -> 3024 bfloat16"),
    ],
    2: [(40, "token 100352 x 384 -> 3024 bfloat16")],
    3: [(40, "detection 6 x 34000 x 256 -> 256 bfloat16"), (20, "detection 6 x 600 x 256 -> 256 bfloat16")],
}
CAYLEY_ROWS = {1: [(25, "3024 x 192"), (20, "6 x 256 x 256")], 2: [(30, "maps 3024 x 192"), (20, "768 x 64")], 3: []}
STEP_ROWS = {1: [], 2: [(100, "pooled deit_tiny_patch16_224 from regnety_160, 512 images")], 3: []}


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
    return {1: first_call, 2: second_call, 3: third_call}[call](folder, rehearse)


def first_call(folder: Path, rehearse: bool) -> list[list[Step]]:
    """Is it right, and a row for most claims."""
    return [
        [build(rehearse), warm(rehearse)],
        [program("right, ceilings, reduction", "smoke", ["right", "ceilings", "reduction"], folder, 40, rehearse)],
        [  # nothing here is timed
            tests("tests of the kernels", KERNEL_TESTS, "not gpu", 11, 60, rehearse),
            tests("tests that need a GPU", GPU_TESTS, "gpu", 4, 60, rehearse),
            program("training with every implementation", "training", [], folder, 60, rehearse),
        ],
        *benchmark_rows("ortho_proj_loss", LOSS_ROWS[1], folder, rehearse),
        *benchmark_rows("cayley", CAYLEY_ROWS[1], folder, rehearse),
    ]


def second_call(folder: Path, rehearse: bool) -> list[list[Step]]:
    """The rows for the other claims."""
    return [
        *prepared(rehearse),
        *benchmark_rows("training_step", STEP_ROWS[2], folder, rehearse, seconds=2.0),
        *benchmark_rows("cayley", CAYLEY_ROWS[2], folder, rehearse),
        *benchmark_rows("ortho_proj_loss", LOSS_ROWS[2], folder, rehearse),
    ]


def third_call(folder: Path, rehearse: bool) -> list[list[Step]]:
    """What no claim rests on: other tiles, sanitizers, a profile, and rows without a target."""
    smoke = ["time_per_kernel", "tile_choices"]
    return [
        *prepared(rehearse),
        [program("where the time goes; other tiles and workspaces", "smoke", smoke, folder, 60, rehearse)],
        [sanitizer(tool, rehearse) for tool in (SANITIZERS[:1] if rehearse else SANITIZERS)],
        [profile(folder, rehearse)],
        *benchmark_rows("ortho_proj_loss", LOSS_ROWS[3], folder, rehearse),
    ]


def prepared(rehearse: bool) -> list[list[Step]]:
    """On the machine of an earlier call there is nothing to do; the first call has rehearsed it."""
    return [] if rehearse else [[build(rehearse), warm(rehearse)]]


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


def program(name: str, module: str, words: list[str], folder: Path, limit_s: int, rehearse: bool) -> Step:
    command = [sys.executable, "-m", f"benchmarks.gpu.{module}", *words, "--records", str(folder)]
    return Step(name, [*command, "--rehearse"] if rehearse else command, limit_s)


def tests(name: str, paths: list[str], marked: str, workers: int, limit_s: int, rehearse: bool) -> Step:
    """Named as they end, so that a step cut short says which have failed; call 3 runs the sanitizers."""
    how = ["--collect-only"] if rehearse else ["-n", str(workers), "--dist", "worksteal"]
    pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "-rf"]
    pytest += ["-m", marked, "-k", "not sanitizer"]
    return Step(name, [*pytest, *how, *paths], limit_s, environment={"OMP_NUM_THREADS": "1"})


def benchmark_rows(
    benchmark: str, rows: list[tuple[int, str]], folder: Path, rehearse: bool, seconds: float = 0.2
) -> list[list[Step]]:
    """One step per case: a record that is cut short keeps the cases before.

    `seconds` of samples for each candidate and pass; a training step is long, and needs more of them for a few samples.
    """
    command = [sys.executable, "-m", f"benchmarks.bench_{benchmark}", "--records", str(folder)]
    command += ["--seconds", "0.2" if rehearse else str(seconds), "--extend", *(["--rehearse"] if rehearse else [])]
    rows = rows[:1] if rehearse else rows  # the others differ in their sizes alone
    return [[Step(f"{benchmark}: {case}", [*command, "--case", case], limit_s)] for limit_s, case in rows]


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
    return Step("profile of the token-level loss", command, 45, missing)


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
