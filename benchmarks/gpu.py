"""Everything for a GPU machine in one command, `make gpu`: build, benchmarks, tests, sanitizer, report.

    python -m benchmarks.gpu [--dry-run] [--records FOLDER]

Uses the Python and the PyTorch that are there: no network, no virtual environment, nothing installed outside this
checkout. Every step has a time limit and all of them together eight minutes; whatever a step does, those before it have
left their records, and gpu.json says after each how it went. Exit status: 0 all passed, 1 some did not, 2 no GPU.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import records

TOTAL_S = 470
PREFIX = records.ROOT / "build" / "gpu-prefix"  # pip's own bookkeeping; the extension lands in vkd_kernels/
# Small shapes that together launch every kernel: the sanitizer is some hundred times slower than the GPU.
KERNEL_TESTS = [f"tests/ops/test_ortho_proj_loss_{part}.py" for part in ("triton", "group", "semi_orthogonal")]
SANITIZED = [
    "tests/ops/test_cayley_cuda.py::TestOnTheGPU::test_every_kernel",
    "tests/ops/test_ortho_proj_loss_triton.py::test_strided_inputs",
    "tests/ops/test_ortho_proj_loss_triton.py::test_masked_rows_may_hold_anything",
    "tests/ops/test_ortho_proj_loss_triton.py::test_chunks_equal_one_chunk",
    "tests/ops/test_ortho_proj_loss_group.py::test_losses_of_many_rows_go_by_themselves",
    "tests/ops/test_ortho_proj_loss_group.py::test_statistics",
]


@dataclass
class Step:
    name: str
    command: list[str] | None
    limit_s: int
    missing: str | None = None  # why it can't run here: skipped, which is no failure


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which("compute-sanitizer")]
    places += [os.path.join(home, "bin", "compute-sanitizer") for home in homes if home]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def steps(folder: Path) -> list[Step]:
    python, pytest = sys.executable, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    no_pytest = None if importlib.util.find_spec("pytest") else "pytest is not installed"
    sanitizer = find_sanitizer()
    no_sanitizer = None if sanitizer else "compute-sanitizer was not found (looked on PATH and in CUDA_HOME/bin)"
    to = ["--records", str(folder)]
    # An editable installation into a prefix of its own builds in place and leaves the system's packages alone.
    pip = [
        python,
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
    return [
        Step("build", pip, 110),
        Step("info", [python, "-m", "vkd_kernels.info"], 30),
        Step(
            "benchmark of the Cayley transform", [python, "-m", "benchmarks.bench_cayley", *to, "--seconds", "0.1"], 75
        ),
        Step(
            "benchmark of the loss",
            [python, "-m", "benchmarks.bench_ortho_proj_loss", *to, "--seconds", "0.2"],
            130,
        ),
        Step("tests that need a GPU", [*pytest, "-m", "gpu", "tests"], 120, no_pytest),
        Step("tests of the kernels", [*pytest, "-m", "not gpu", *KERNEL_TESTS], 90, no_pytest),
        *(
            Step(
                f"compute-sanitizer {tool}",
                [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *pytest, *SANITIZED],
                40,
                no_sanitizer or no_pytest,
            )
            for tool in ("memcheck", "racecheck", "synccheck")
        ),
        Step(  # last: it compiles two networks first
            "benchmark of a training step",
            [python, "-m", "benchmarks.bench_training_step", *to, "--seconds", "2"],
            110,
        ),
        Step("report", [python, "-m", "benchmarks.report", str(folder)], 30),
    ]


def run(step: Step, limit_s: float) -> dict:
    """The step's outcome, for the record."""
    result = {"name": step.name, "limit_s": step.limit_s, "command": step.command and _public(step.command)}
    if step.missing:
        return result | {"outcome": "skipped", "seconds": 0.0, "summary": step.missing, "tail": []}
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(records.ROOT), environment.get("PYTHONPATH")]))
    environment.pop("TRITON_INTERPRET", None)
    if step.name == "build" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")  # for this GPU alone: quicker
    if step.name.startswith("compute-sanitizer"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor an allocation of its own
    started = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=records.ROOT,
        env=environment,
        text=True,
        errors="replace",
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        outcome = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its own session: this ends the step's children too, and nothing else
        output, _ = process.communicate()
        outcome = "timed out"
    lines = [_public([line])[0] for line in output.splitlines() if line.strip()]
    return result | {
        "outcome": outcome,
        "returncode": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "summary": lines[-1][:300] if lines else "",
        "tail": lines[-60:],
    }


def _public(words: list[str]) -> list[str]:
    """Without this machine's folders: records are committed."""
    return [
        str(word).replace(str(records.ROOT), ".").replace(sys.executable, "python").replace(sys.prefix, "<python>")
        for word in words
    ]


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="list the steps and stop")
    parser.add_argument("--records", type=Path, default=records.RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    folder = options.records.resolve()
    listed = steps(folder)
    if options.dry_run:
        for step in listed:
            text = f"skipped: {step.missing}" if step.missing else " ".join(_public(step.command))
            print(f"{step.name:36} {step.limit_s:4} s   {text}")
        print(f"all together at most {TOTAL_S} s; records in {folder / '<device>'}")
        return 0
    if not torch.cuda.is_available():
        print("no NVIDIA GPU: torch.cuda.is_available() is False. --dry-run lists the steps.", file=sys.stderr)
        return 2
    path = folder / records.device_folder() / "gpu.json"
    content = {"benchmark": "gpu", "environment": records.environment(), "ceilings": {}, "steps": []}
    deadline = time.monotonic() + TOTAL_S
    for step in listed:
        remaining = deadline - time.monotonic()
        if remaining < 5 and not step.missing:
            step.missing = "no time was left"
            outcome = run(step, 0) | {"outcome": "timed out"}
        else:
            outcome = run(step, min(step.limit_s, remaining))
        content["steps"].append(outcome)
        if step.name == "info":  # now with the extension that was built
            content["environment"]["info"] = outcome["tail"]
        records.write(path, content)
        print(f"{outcome['outcome']:10} {outcome['seconds']:6.1f} s   {step.name}: {outcome['summary']}", flush=True)
    print(f"records: {path.parent}")
    return 0 if all(step["outcome"] in ("passed", "skipped") for step in content["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
