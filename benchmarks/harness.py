"""The one timing harness: cases, candidates, the accuracy gate, interleaved samples (records.py keeps the results).

CPU: wall time of single calls. CUDA: events around one call on each of several sets of inputs, which together exceed
the L2 cache, so that every call finds its inputs in memory; slow candidates go through fewer of them. Candidates take
turns (sampling.py), so that whatever else the machine does meets all of them. A candidate whose outputs disagree with
float64 gets no time.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise announces itself on stderr at every use

import torch

from . import floors, records
from .sampling import sample_undisturbed, summary

PASSES = ("forward", "backward", "both")
CACHE_FACTOR = 4  # the sets of inputs take at least this many times the L2
MOST_SETS = 64
SAMPLE_S = 0.02  # a sample goes through as many sets as fit into this time, and through one at least
PAUSE_S = 1e-3  # before a sample, or as long as the host takes to start it, up to SAMPLE_S
CYCLES_PER_SECOND = 2e9  # of a GPU's clock, at most: at a lower one a pause is longer


class WrongOutput(AssertionError):
    """Outputs that disagree with the truth: no time is reported for them."""


@dataclass
class Calls:
    """One candidate on one set of inputs."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]  # forward's result -> gradients


@dataclass
class Candidate:
    name: str
    build: Callable[[Any], Calls]
    check: Callable[[Any, Any, Any], dict[str, float]] | None = None  # (inputs, output, gradients) -> errors
    unavailable: str | None = None  # the reason why it can't run here
    graph: bool = False  # forward and backward captured as one CUDA graph
    passes: tuple[str, ...] = PASSES


@dataclass
class Case:
    name: str
    parameters: dict  # JSON types, for the record
    dtype: str  # of the products that bound it
    cost: floors.Cost  # of forward and backward together
    inputs: Callable[[int], Any]  # seed -> one set of inputs
    input_bytes: int
    candidates: list[Candidate]
    limits: dict[str, float]  # by name of error
    passes: tuple[str, ...] = PASSES
    truth: Callable[[Any], Any] = lambda inputs: None  # float64, computed once and given to every check
    has_shares: bool = True  # of the floor; not where some candidates do less than the cost counts
    plot: dict = field(default_factory=dict)  # {"series": name, "x": label}, for report.py


# ----------------------------------------------------------------------------------------------------- accuracy gate


def autograd_calls(function: Callable[[], torch.Tensor], leaves: list, upstream: torch.Tensor) -> Calls:
    return Calls(function, lambda output: torch.autograd.grad(output, leaves, upstream))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what was expected (float64)."""
    expected = expected.double()
    return ((got.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def compare(output, gradients, truth) -> dict[str, float]:
    """Relative errors against truth = (output, gradients); the largest over the gradients that truth has."""
    expected, expected_gradients = truth
    pairs = list(zip(gradients, expected_gradients, strict=False))
    return {
        "output": relative_error(output, expected),
        "gradients": largest(relative_error(got, want) for got, want in pairs),
    }


def largest(errors: Iterable[float]) -> float:
    """NaN if one of them is: Python's max would drop it."""
    return torch.tensor(list(errors), dtype=torch.float64).max().item()


def gate(errors: dict[str, float], limits: dict[str, float]) -> None:
    """Raises WrongOutput for an error above its limit; a NaN is above every limit."""
    bad = [
        f"{name} is off by {errors[name]:.1e} (limit {limits[name]:.0e})"
        for name in errors
        if not errors[name] <= limits[name]
    ]
    if bad:
        raise WrongOutput("; ".join(bad))


# ------------------------------------------------------------------------------------------------------------- timing


def run_time_errors() -> tuple[type[Exception], ...]:
    """What ends one candidate and not the run. Triton's own errors are no RuntimeError in every version."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return RuntimeError, TritonError


def gpu_seconds(run: Callable[[], Any], pause_s: float) -> float:
    """Seconds that the GPU takes for run(), between two events.

    A pause is queued first, in which the host starts the work: whatever it has not started when the pause ends may keep
    the GPU waiting, and the host's time would be measured.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(pause_s * CYCLES_PER_SECOND))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Runner:
    """One candidate over sets of inputs: `sample(pass)` is the seconds of one call."""

    def __init__(self, candidate: Candidate, sets: list, device: str):
        self.candidate, self.device = candidate, device
        self.calls = [candidate.build(inputs) for inputs in sets]
        self.pause_s = PAUSE_S
        self.replay = None
        self.captured: tuple[Any, Any] | None = None  # output and gradients of the first set that a replay writes

    def add_sets(self, sets: list) -> None:
        """As many more sets of inputs as fit into SAMPLE_S with the first, by the wall time of one call.

        With CACHE_FACTOR L2 of 50 MB and 4 TB/s, what a call that is given fewer sets can save by finding its inputs in
        the L2 is below 0.3 % of its time. A CUDA graph, which is faster than the call that it captures, gets all sets.
        Then the pause before a sample is set: on a GPU as long as the host may take to start all of them.
        """
        if sets and not self.candidate.graph:
            self._wall_seconds()  # the first call loads or compiles what it needs
            sets = sets[: max(0, int(SAMPLE_S / max(self._wall_seconds(), 1e-9)) - 1)]
        self.calls += [self.candidate.build(inputs) for inputs in sets]
        if self.device == "cuda" and not self.candidate.graph:
            self.pause_s = min(max(PAUSE_S, self._wall_seconds()), SAMPLE_S)

    def _wall_seconds(self) -> float:
        """Forward and backward on every set of inputs, from an idle GPU to an idle GPU."""
        self._synchronize()
        start = time.perf_counter()
        self._both()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def capture(self) -> None:
        """Forward and backward on every set of inputs, as one CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._both()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.captured = self._both()
        self.replay = graph.replay

    def _both(self) -> tuple[Any, Any]:
        """Forward and backward on every set of inputs: output and gradients of the first."""
        results = self.first()
        for call in self.calls[1:]:
            call.backward(call.forward())
        return results

    def first(self) -> tuple[Any, Any]:
        output = self.calls[0].forward()
        return output, self.calls[0].backward(output)

    def replayed(self) -> tuple[Any, Any]:
        """What a replay writes into captured tensors that held NaN before."""
        output, gradients = self.captured
        for tensor in (output, *gradients):
            tensor.detach().fill_(torch.nan)
        self.replay()
        self._synchronize()
        return output, gradients

    def sample(self, which: str) -> float:
        outputs = [call.forward() for call in self.calls] if which == "backward" else []
        if self.replay:
            run = self.replay
        elif which == "both":
            run = self._both
        elif which == "forward":
            run = lambda: [call.forward() for call in self.calls]  # noqa: E731
        else:
            run = lambda: [call.backward(output) for call, output in zip(self.calls, outputs, strict=True)]  # noqa: E731
        if self.device == "cuda":
            return gpu_seconds(run, self.pause_s) / len(self.calls)
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / len(self.calls)


def _trace(function) -> list[dict]:
    """Events of torch.profiler around one call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def launches(function) -> int:
    """Kernels, copies and fills that one call starts on the GPU."""
    return sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in _trace(function))


def host_seconds(function, calls: int = 20) -> float:
    """The median time that the host takes to start one call's work on an idle GPU."""
    samples = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def peak_bytes(function, device: str) -> int:
    """The most memory of PyTorch's allocator that one call takes beyond what was there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    steps = sorted(
        ((e["ts"], e["args"]["Bytes"]) for e in _trace(function) if e.get("name") == "[memory]"),
        key=lambda step: step[0],
    )
    peak = held = 0
    for _, step in steps:
        held += step
        peak = max(peak, held)
    return peak


def _nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


# -------------------------------------------------------------------------------------------------------------- a case


def number_of_sets(input_bytes: int, device: str) -> int:
    if device != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_SETS, -(-CACHE_FACTOR * l2 // input_bytes)))


def measure(
    case: Case, device: str, rates: dict, seconds: float = 1.0, *, memory: bool = True, least: int = 3, tries: int = 1
) -> dict:
    """The case's part of a record: a row for every candidate and pass, or the reason why there is none.

    `sets_of_inputs` is the case's, and in a row that of a candidate too slow for all of them.
    `samples` of each row stay in the returned rows for pytest-benchmark; Record writes the summary only.
    """
    sets = [case.inputs(seed) for seed in range(number_of_sets(case.input_bytes, device))]
    truth = case.truth(sets[0])
    floor = case.cost.floor_seconds(rates, case.dtype)
    rows, runners, facts = [], {}, {}
    for candidate in case.candidates:
        if candidate.unavailable:
            rows.append({"candidate": candidate.name, "skipped": candidate.unavailable})
            continue
        try:
            runner = Runner(candidate, sets[:1], device)
            facts[candidate.name] = _check(case, candidate, runner.first, truth)
            runner.add_sets(sets[1:])
            if candidate.graph:
                runner.capture()
                facts[candidate.name] = _check(case, candidate, runner.replayed, truth)
            if memory:
                facts[candidate.name] |= _memory_and_launches(candidate, runner, device)
        except WrongOutput as wrong:
            rows.append({"candidate": candidate.name, "wrong": str(wrong)})
        except run_time_errors() as error:  # of PyTorch, its compiler, CUDA, memory, Triton: the others go on
            reason = str(error).strip().splitlines() or [""]
            rows.append({"candidate": candidate.name, "failed": f"{type(error).__name__}: {reason[0]}"[:500]})
        else:
            runners[candidate.name] = runner
    del truth
    samplers = {
        (name, which): lambda runner=runner, which=which: runner.sample(which)
        for name, runner in runners.items()
        for which in case.passes
        if which in runner.candidate.passes
    }
    others_share, sampled = sample_undisturbed(samplers, seconds, least, tries if device == "cpu" else 1)
    for (name, which), samples in sampled.items():
        row = {"candidate": name, "pass": which, **summary(samples)}
        if len(runners[name].calls) < len(sets):
            row["sets_of_inputs"] = len(runners[name].calls)
        if which == "both":
            row |= ({"share_of_floor": floor / row["median_s"]} if case.has_shares else {}) | facts[name]
        rows.append(row | {"raw": samples})
    return {
        "case": case.name,
        "parameters": case.parameters,
        "dtype": case.dtype,
        "flops": case.cost.flops,
        "bytes": case.cost.bytes,
        "floor_s": floor,
        "sets_of_inputs": len(sets),
        "others_cpu_share": others_share,
        "plot": case.plot,
        "rows": rows,
    }


def _check(case, candidate, run, truth) -> dict:
    """The gate, on what run() gives for the first set of inputs; returns {"errors": ...}."""
    if candidate.check is None:
        return {}
    errors = candidate.check(truth, *run())
    gate(errors, case.limits)
    return {"errors": errors}


def _memory_and_launches(candidate, runner, device) -> dict:
    facts = {}
    if not candidate.graph:
        results = runner.first()[1]
        extra = _nbytes(results) if isinstance(results, tuple) else 0
        del results
        facts["peak_bytes_beyond_gradients"] = max(0, peak_bytes(runner.first, device) - extra)
    if device == "cuda":
        if candidate.graph:
            facts["launches"] = launches(runner.replay) / len(runner.calls)
        else:
            facts["launches"] = launches(runner.first)
            facts["host_s"] = host_seconds(runner.first)
    return facts


def without_samples(case: dict) -> dict:
    return {**case, "rows": [{k: v for k, v in row.items() if k != "raw"} for row in case["rows"]]}


def failures(case: dict) -> list[str]:
    return [
        f"{case['case']}, {row['candidate']}: {row.get('wrong') or row['failed']}"
        for row in case["rows"]
        if "wrong" in row or "failed" in row
    ]


def line(case: dict) -> str:
    """The case's medians in one line per candidate."""
    lines = [f"{case['case']}  (floor {case['floor_s'] * 1e3:.3f} ms)"]
    for name in dict.fromkeys(row["candidate"] for row in case["rows"]):
        rows = [row for row in case["rows"] if row["candidate"] == name]
        reason = next((f"{k}: {row[k]}" for row in rows for k in ("skipped", "wrong", "failed") if k in row), None)
        times = "   ".join(f"{row['pass']} {row['median_s'] * 1e3:.3f} ms" for row in rows if "pass" in row)
        lines.append(f"    {name:42} {reason or times}")
    return "\n".join(lines)


def main(benchmark: str, cases: Callable[..., list[Case]], dtypes, arguments=None) -> int:
    """A benchmark as a program, where pytest-benchmark is not to be had; 1 if a candidate was wrong or failed."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{benchmark}")
    parser.add_argument("-k", default="", help="only cases whose name contains this")
    parser.add_argument("--case", metavar="NAME", help="only the case of this very name")
    parser.add_argument("--seconds", type=float, default=0.5, help="sampling time per candidate and pass")
    parser.add_argument(
        "--records", type=Path, default=records.RUNS, help="folder of the records (default: %(default)s)"
    )
    parser.add_argument("--tries", type=int, default=1, help="on a CPU: for each case, while other processes are busy")
    parser.add_argument(
        "--extend", action="store_true", help="keep the cases that this machine's record of this commit has"
    )
    parser.add_argument("--rehearse", action="store_true", help="a GPU's cases on a CPU, with tiny shapes")
    options = parser.parse_args(arguments)
    device = "cpu" if options.rehearse else records.device_type()
    listed = cases("cuda", rehearse=True) if options.rehearse else cases(device)
    names = [case.name for case in listed]
    if options.case is not None and options.case not in names:
        parser.error(f"--case: there is no {options.case!r} on this device, but {', '.join(names)}")
    record = records.Record(benchmark, options.records, floors.ceilings(device, dtypes(device)), options.extend)
    problems = []
    for case in listed:
        if options.k in case.name and options.case in (None, case.name):
            result = measure(case, device, record.ceilings, options.seconds, tries=options.tries)
            record.add(without_samples(result))
            problems += failures(result)
            print(line(result), flush=True)
    print(f"record: {record.path}")
    for problem in problems:
        print("FAILED", problem)
    return 1 if problems else 0
