"""Compiles what the calls will launch on this GPU into Triton's cache, in as many processes as there are cores.

    python -m benchmarks.gpu.warm [--forms NAME ...]

That is every shipped form, those of the ahead-of-time tests, and what smoke.py, once.py and the rows of the detection
loss launch beyond them. On a machine without a GPU they are compiled for sm_90.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from tests.ops import test_ortho_proj_loss_aot as aot

MOST_PROCESSES = 12
DETECTION_ROWS = (34000, 600)


def names() -> list[str]:
    """What the calls launch comes first: if this is cut short, what is compiled by then stays in the cache."""
    return [*programs(), *aot.names()]


def programs() -> dict[str, Callable[[], object]]:
    """Further losses by name; they run on the CPU, on tensors that nothing fills, with their launches recorded."""
    from benchmarks.gpu import once, smoke

    listed: dict[str, Callable[[], object]] = {}
    for shape, dtype in smoke.RIGHT:
        for loss in smoke.LOSSES:
            listed[f"right {shape} {dtype} {loss}"] = functools.partial(right, shape, dtype, loss)
    for n in DETECTION_ROWS:
        listed[f"detection {n}"] = functools.partial(detection, n)
    for name, values in smoke.variants(smoke.TOKEN_COLUMNS[0]).items():  # the kernels are the same for every S
        listed[name] = functools.partial(tile_choice, smoke.TOKEN_COLUMNS[0], values)
    return listed | {f"once small {i}": loss for i, loss in enumerate(once.losses(once.SMALL, "cpu"))}


def empty(n: int, s: int, t: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    student, teacher = torch.empty(n, s, dtype=dtype), torch.empty(n, t, dtype=dtype)
    return student.requires_grad_(), teacher, torch.empty(t, s).requires_grad_()


def right(shape: tuple[int, int, int], dtype: torch.dtype, loss: str) -> None:
    from benchmarks.gpu import smoke

    smoke.loss_and_gradients(empty(*shape, dtype), loss)


def tile_choice(s: int, values: dict[str, object]) -> None:
    from benchmarks.gpu import smoke

    with smoke.settings(**values):
        smoke.loss_and_gradients(empty(smoke.TOKEN_ROWS, s, smoke.TEACHER_DIM, torch.bfloat16))


def detection(n: int) -> None:
    """Six losses in one call, and one of them by itself."""
    import vkd_kernels as vk

    students, teachers, weights = zip(*(empty(n, 256, 256, torch.bfloat16) for _ in range(6)), strict=True)
    options = {"normalization": "batch_norm", "backend": "triton"}
    vk.functional.ortho_proj_losses(students, teachers, torch.stack(weights), **options).sum().backward()
    vk.functional.ortho_proj_loss(students[0], teachers[0], weights[0], **options).backward()


def launched(name: str, chip: str) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """(function, arguments, options) of the launches of one of names()."""
    from vkd_kernels.ops import implementations

    if name in aot.names():
        return list(aot.record(name, chip).values())
    launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    aot.prepare(name, chip, lambda *launch: launches.append(launch))
    implementations._why_not_triton = lambda device, dtype: None  # nothing is launched
    programs()[name]()
    return launches


def compile_one(job: tuple[str, str]) -> tuple[str, str | None]:
    """(the form, why it does not compile)."""
    import triton
    from triton.backends.compiler import GPUTarget

    name, chip = job
    target = GPUTarget("cuda", aot.number(chip), 32)
    try:
        for launch in launched(name, chip):
            code, flags = aot.source(*launch, target)
            triton.compile(code, target=target, options=flags)
    except Exception as error:  # of Triton or ptxas, of many kinds: the other forms go on, and the call reports it
        return name, f"{type(error).__name__}: {str(error)[:200]}"
    return name, None


def without_gpu() -> None:
    """In the processes that compile: what is recorded runs on the CPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.warm", description=__doc__.splitlines()[0])
    parser.add_argument("--forms", nargs="*", help="names of forms (default: all)")
    forms = parser.parse_args(arguments).forms or names()
    os.environ.pop("TRITON_INTERPRET", None)
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    jobs = [(form, f"sm_{major}{minor}") for form in forms]
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(jobs))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, initializer=without_gpu) as pool:
        reasons = {form: reason for form, reason in pool.map(compile_one, jobs) if reason}
    for form, reason in reasons.items():
        print(f"{form}: {reason}")
    print(f"{len(jobs) - len(reasons)} of {len(jobs)} forms compiled")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
