"""The first minutes on a GPU: is the fused loss right, is its reduction sound, where does its time go.

    python -m benchmarks.gpu.smoke [STEP ...] --records FOLDER

Writes FOLDER/<device>/smoke.json after every result; a step that fails or is cut short keeps those before.
"""

import argparse
import contextlib
import functools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import vkd_kernels as vk
from benchmarks import floors, harness, records
from vkd_kernels.ops.ortho_proj_loss import triton
from vkd_kernels.ops.ortho_proj_loss.spec import LossInputs, LossSpec
from vkd_kernels.ops.ortho_proj_loss.triton import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORST_ERROR = 5e-3  # relative, of bfloat16 features: the table of accuracies that the tests hold is below it
TOKEN_ROWS, TOKEN_COLUMNS, TEACHER_DIM = 100352, (192, 384, 768), 3024
RIGHT = [
    ((512, 192, 3024), torch.bfloat16),
    ((4096, 192, 3024), torch.bfloat16),
    ((4096, 384, 3024), torch.float16),
    ((4095, 100, 1001), torch.bfloat16),
    ((4096, 192, 1024), torch.float32),
]
LOSSES = ("smooth_l1", "mse", "cosine")


def features(shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """(student (N, S), teacher (N, T), semi-orthogonal weight (T, S)), representable in dtype; drawn by parts."""
    n, s, t = shape
    random = torch.Generator(device=DEVICE).manual_seed(0)
    student = torch.randn(n, s, generator=random, device=DEVICE).to(dtype)
    teacher = torch.empty(n, t, device=DEVICE, dtype=dtype)
    for part in teacher.split(8192):
        part.copy_(2 * torch.randn(part.shape, generator=random, device=DEVICE) + 0.7)
    weight = torch.linalg.qr(torch.randn(t, s, generator=random, device=DEVICE)).Q.to(dtype).float().contiguous()
    return student.requires_grad_(), teacher, weight.requires_grad_()


def loss_and_gradients(
    inputs: tuple[torch.Tensor, ...], loss: str = "smooth_l1", backend: str = "triton"
) -> list[torch.Tensor]:
    student, teacher, weight = inputs
    value = vk.functional.ortho_proj_loss(student, teacher, weight, loss=loss, backend=backend)
    return [value.detach(), *torch.autograd.grad(value, (student, weight))]


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def median_us(function: Callable[[], object], repeats: int = 20) -> float:
    """The median time of a call in microseconds, by events on a GPU."""
    for _ in range(3):
        function()
    if DEVICE == "cpu":
        samples = []
        for _ in range(3):
            began = time.perf_counter()
            function()
            samples.append(1e6 * (time.perf_counter() - began))
        return round(statistics.median(samples), 1)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return round(1e3 * statistics.median(start.elapsed_time(end) for start, end in events), 1)


class Replay:
    """A function captured as a CUDA graph; `result` is what each replay writes. Without a GPU it is just called."""

    def __init__(self, function: Callable[[], list[torch.Tensor]]):
        if DEVICE == "cpu":
            self.replay, self.result = function, function()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = function()
        self.replay = graph.replay


def kernels_us(function: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """{kernel: (launches, microseconds of all)} of one call, the ten slowest."""
    if DEVICE == "cpu":
        return {}
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    kernels: dict[str, tuple[int, float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            launches, microseconds = kernels.get(event.name[:60], (0, 0.0))
            kernels[event.name[:60]] = launches + 1, round(microseconds + event.device_time, 1)
    return dict(sorted(kernels.items(), key=lambda item: -item[1][1])[:10])


# ------------------------------------------------------------------------------------------------------------ the steps


# Each yields its result, also while it is not complete.


def right(rehearse: bool) -> Iterator[dict]:
    """Relative errors of loss, grad_student and grad_weight against the reference in float64."""
    errors, wrong = {}, []
    for shape, dtype in [((33, 5, 17), torch.bfloat16)] if rehearse else RIGHT:
        for loss in LOSSES:
            name = f"{shape} {dtype} {loss}"
            inputs = features(shape, dtype)
            exact = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
            truth = loss_and_gradients(exact, loss, "torch")
            values = loss_and_gradients(inputs, loss)
            errors[name] = [relative_error(*pair) for pair in zip(values, truth, strict=True)]
            if not all(size <= WORST_ERROR * (2 if rehearse else 1) for size in errors[name]):
                wrong.append(name)
            yield {"errors": errors, "wrong": wrong}


def ceilings(rehearse: bool) -> Iterator[dict]:
    yield {} if rehearse else floors.ceilings(DEVICE, (torch.bfloat16, torch.float32))


def reduction(rehearse: bool) -> Iterator[dict]:
    """The sum of the partial losses has the same bits in thousands of replays, alone and beside another stream."""
    different = {}
    for name, shape, replays in (("pooled", (512, 192, 3024), 4000), ("token", (20000, 192, 1024), 400)):
        inputs = features((9, 4, 11) if rehearse else shape)
        graph = Replay(lambda inputs=inputs: loss_and_gradients(inputs))
        graph.replay()
        first = [value.clone() for value in graph.result]
        wrong = torch.zeros((), device=DEVICE, dtype=torch.int64)
        noise = torch.randn(16 if rehearse else 4096, 16 if rehearse else 4096, device=DEVICE)
        other = torch.cuda.Stream() if DEVICE == "cuda" else None
        for index in range(2 if rehearse else replays):
            if index % 2:
                with torch.cuda.stream(other) if other else contextlib.nullcontext():
                    noise @ noise
            graph.replay()
            wrong += sum((value != start).any() for value, start in zip(graph.result, first, strict=True))
        different[name] = int(wrong)
        yield {"different": different, "wrong": [name for name, count in different.items() if count]}


def time_per_kernel(rehearse: bool) -> Iterator[dict]:
    """Forward + backward at token level: stream, graph, and each kernel's share."""
    times = {}
    for s in TOKEN_COLUMNS:
        inputs = features((9, 4, 11) if rehearse else (TOKEN_ROWS, s, TEACHER_DIM))
        graph = Replay(lambda inputs=inputs: loss_and_gradients(inputs))
        times[s] = {
            "stream_us": median_us(lambda inputs=inputs: loss_and_gradients(inputs)),
            "graph_us": median_us(graph.replay),
            "kernels": kernels_us(lambda inputs=inputs: loss_and_gradients(inputs)),
        }
        del graph
        yield times


@contextlib.contextmanager
def settings(**values: object) -> Iterator[None]:
    """The choice of tiles with some of its settings changed: names of tiles.py, and `tile` for the loss's own."""
    before = {name: getattr(tiles, name) for name in values if name != "tile"}
    key, capability = ("descriptor", 16), 90
    tile_before = tiles.TILES[key][capability]
    try:
        for name in before:
            setattr(tiles, name, values[name])
        if "tile" in values:
            tiles.TILES[key][capability] = values["tile"]
            tiles.tile.cache_clear()
        yield
    finally:
        for name, value in before.items():
            setattr(tiles, name, value)
        tiles.TILES[key][capability] = tile_before
        tiles.tile.cache_clear()


def loss_with_workspace(inputs: tuple[torch.Tensor, ...], workspace_bytes: int) -> list[torch.Tensor]:
    student, teacher, weight = inputs
    tensors = LossInputs(student=student, teacher=teacher, weight=weight, denominator=float(teacher.numel()))
    value = triton.loss(LossSpec(), tensors, workspace_bytes=workspace_bytes)
    return [value.detach(), *torch.autograd.grad(value, (student, weight))]


def variants(s: int) -> dict[str, dict[str, object]]:
    """What may be faster than what is chosen today, by name."""
    shapes = [(128, 128, 8, 3), (128, 128, 4, 3), (128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 3), (64, 128, 4, 3)]
    listed: dict[str, dict[str, object]] = {"as chosen": {}}
    for block_n, block_t, warps, stages in shapes:
        tile = tiles.LossTile(block_n, block_t, 64, warps, stages, descriptors=True)
        listed[f"tile {block_n} x {block_t}, {warps} warps, {stages} stages"] = {"tile": tile}
    if s <= 384:
        listed["row-stationary"] = {"ROW_STATIONARY_UP_TO": s}
    return listed


def tile_choices(rehearse: bool) -> Iterator[dict]:
    """Forward + backward at token level with other tiles, the row-stationary kernel, and other workspaces."""
    times: dict[str, dict[str, float | str]] = {}
    for s in TOKEN_COLUMNS:
        inputs = features((9, 4, 11) if rehearse else (TOKEN_ROWS, s, TEACHER_DIM))
        times[str(s)] = {}
        chosen = list(variants(s).items())
        for name, values in chosen[:1] + chosen[-1:] if rehearse else chosen:
            with settings(**values):
                try:
                    times[str(s)][name] = median_us(lambda inputs=inputs: loss_and_gradients(inputs), repeats=10)
                except harness.run_time_errors() as error:  # of a tile that does not fit: the others go on
                    times[str(s)][name] = f"{type(error).__name__}: {str(error)[:200]}"
            yield times
        for mebibytes in (64,) if rehearse else (64, 128, 256):
            run = functools.partial(loss_with_workspace, inputs, mebibytes << 20)
            times[str(s)][f"workspace of {mebibytes} MiB"] = median_us(run, repeats=10)
            yield times


STEPS = {step.__name__: step for step in (right, ceilings, reduction, time_per_kernel, tile_choices)}


def run_step(name: str, rehearse: bool, path: Path, record: dict) -> dict:
    """The step's last result. Each is written at once: a step that is ended from outside keeps what it has."""
    began, result = time.monotonic(), {}

    def keep(result: dict) -> None:
        record["steps"][name] = {"seconds": round(time.monotonic() - began, 1), **result}
        records.write(path, record)

    try:
        for latest in STEPS[name](rehearse):
            result = latest
            keep(result)
    except Exception:  # a step on its own: the others go on, and the exit status tells
        result = {**result, "failed": traceback.format_exc()[-2000:]}
        keep(result)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--records", type=Path, default=records.RUNS)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on whatever device there is")
    options = parser.parse_args(arguments)
    unknown = set(options.steps) - set(STEPS)
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    path = options.records / records.device_folder() / "smoke.json"
    record = records.read_one(path) or {"benchmark": "smoke", "environment": records.environment(), "steps": {}}
    bad = False
    for name in options.steps or STEPS:
        result = run_step(name, options.rehearse, path, record)
        bad = bad or "failed" in result or bool(result.get("wrong"))
        print(name, str(record["steps"][name])[:1800], flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
