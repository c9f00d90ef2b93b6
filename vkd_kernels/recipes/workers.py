"""Runs many trainings: in worker processes of one thread each, or one after the other in this process.

Each is a `Task` that leaves a file when it is done, so that an interrupted run goes on where it stopped: what is done
is skipped, what is not continues from its checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .runs import Interrupted, RunError, Worker, signals_blocked

# ---- inside a training -----------------------------------------------------------------------------------------------


class Child(Worker):
    """In a worker process."""

    def __init__(self, stop: Any, reports: Any) -> None:
        self._stop, self._reports = stop, reports
        self._images, self._sent = 0, 0.0

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def report(self, task: str, images: int, expected: int | None = None) -> None:
        self._images += images
        if expected is not None or time.monotonic() - self._sent > 0.1:  # a step may be shorter than sending takes
            self._reports.put((task, self._images, expected))
            self._images, self._sent = 0, time.monotonic()


class Here(Worker):
    """In the process that asked for it."""

    def __init__(self, received: list[int], progress: _Progress) -> None:
        self._received, self._progress = received, progress

    @property
    def signal(self) -> int:
        return self._received[0] if self._received else signal.SIGINT

    def should_stop(self) -> bool:
        return bool(self._received)

    def report(self, task: str, images: int, expected: int | None = None) -> None:
        self._progress.add(task, images, expected)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the workers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    name: str
    result: Path  # exists when the task is done
    images: int  # how many images it trains on, for the progress bar
    work: Callable[..., None]  # called in a worker process as work(*arguments, worker)
    arguments: tuple[Any, ...]
    after: str | None = None  # the task that must be done before


_worker: Child | None = None


def _start_worker(stop: Any, reports: Any) -> None:
    global _worker
    torch.set_num_threads(1)  # one core each; also makes the numbers independent of how many cores there are
    _worker = Child(stop, reports)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent cannot tell its workers to stop; its pipe closes. Files are atomic: leaving at once is safe."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _perform(task: Task) -> None:
    task.work(*task.arguments, _worker)


def perform(tasks: list[Task], *, jobs: int, quiet: bool = False) -> None:
    """Do what is not done yet, in up to `jobs` processes. SIGINT and SIGTERM end it with `Interrupted`, resumably."""
    done = {task.name for task in tasks if task.result.exists()}
    waiting = [task for task in tasks if task.name not in done]
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")
    stop, reports = context.Event(), context.Queue()
    failure: BaseException | None = None
    running: dict[Future, Task] = {}
    jobs = min(jobs, len(waiting))
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(stop, reports))
    with (
        _signals_caught(stop.set, quiet) as received,
        pool,
        _Progress(waiting, len(done), quiet) as progress,
    ):
        while running or (waiting and not stop.is_set()):
            ready = [t for t in waiting if t.after is None or t.after in done] if not stop.is_set() else []
            for task in ready[: jobs - len(running)]:  # no queue inside the pool: nothing to cancel when stopping
                waiting.remove(task)
                with signals_blocked():
                    running[pool.submit(_perform, task)] = task
            finished, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
            progress.read(reports)
            for future in finished:
                task, error = running.pop(future), future.exception()
                if error is None:
                    done.add(task.name)
                    progress.finished(task)
                elif not isinstance(error, Interrupted):
                    failure = failure or error
                    stop.set()
    if isinstance(failure, BrokenProcessPool):
        raise RunError("a worker process was killed (out of memory?): continue with --resume") from failure
    if failure is not None:
        raise failure
    if received:
        raise Interrupted(received[0])


def perform_here(tasks: list[Task], *, quiet: bool = False, insist: bool = False) -> None:
    """The same one after the other in this process: on an accelerator, or as one of torchrun's ranks."""
    done = {task.name for task in tasks if task.result.exists()}
    waiting = [task for task in tasks if task.name not in done]
    with (
        _signals_caught(lambda: None, quiet, insist=insist) as received,
        _Progress(waiting, len(done), quiet) as progress,
    ):
        for task in waiting:
            task.work(*task.arguments, Here(received, progress))
            progress.finished(task)


@contextlib.contextmanager
def _signals_caught(stop: Callable[[], None], quiet: bool, insist: bool = False) -> Iterator[list[int]]:
    """SIGINT and SIGTERM call `stop` and are listed; the second one ends the process at once, unless it has to
    `insist` on its checkpoint: torchrun passes a Ctrl-C on that the terminal has sent already, and kills in the end."""
    received: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        if received and not insist:  # the last checkpoints are still good
            os._exit(128 + number)
        if not received and not quiet:
            again = "" if insist else " (once more to quit at once)"
            print(f"\nstopping: saving checkpoints{again}", file=sys.stderr, flush=True)
        received.append(number)
        stop()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Progress:
    """One bar over everything to be trained on: images, images per second, time left; and what is running now."""

    def __init__(self, waiting: list[Task], done: int, quiet: bool) -> None:
        from tqdm import tqdm

        self.tasks, self.done, self.quiet = done + len(waiting), done, quiet
        self.expected = {task.name: task.images for task in waiting}
        self.current: dict[str, int] = {}
        self.terminal = sys.stderr.isatty()
        size = shutil.get_terminal_size((110, 24))  # tqdm itself shows nothing on a terminal of unknown size
        self.bar = tqdm(
            total=sum(self.expected.values()), unit="img", unit_scale=True, disable=quiet, smoothing=0.05,
            ncols=size.columns, nrows=size.lines,
            mininterval=0.2 if self.terminal else 15,
        )  # fmt: skip

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.close()

    def read(self, reports: Any) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.add(*reports.get_nowait())
        self._describe()

    def add(self, task: str, images: int, expected: int | None) -> None:
        if expected is not None:
            self.bar.total += expected - self.expected[task]
            self.expected[task] = expected
        self.current[task] = self.current.get(task, 0) + images
        self._describe()
        self.bar.update(images)

    def finished(self, task: Task) -> None:
        self.done += 1
        self.bar.update(
            self.expected[task.name] - self.current.pop(task.name, 0)
        )  # what it did not report, e.g. before a resume
        self._describe()

    def _describe(self) -> None:
        self.bar.set_description_str(f"{self.done}/{self.tasks} runs [{', '.join(self.current)}]", refresh=False)
