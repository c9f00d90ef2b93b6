"""Runs many trainings: in worker processes of one thread each, or one after the other in this process.

Each is a `Job` that leaves a file when it is done, so that an interrupted run goes on where it stopped: what is done
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
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

from .engine import Interrupted
from .runs import RunError
from .task import Monitor

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    name: str
    result: Path  # exists when the job is done
    images: int  # how many images it trains on, for the progress bar
    work: Callable[..., None]  # called as work(**arguments, monitor=...)
    arguments: dict[str, Any]
    after: str | None = None  # the job that must be done before


class Child(Monitor):
    """Of a training in a worker process."""

    def __init__(self, stop: Any, reports: Any) -> None:
        self.stop, self.reports, self.images, self.sent = stop, reports, 0, 0.0

    def should_stop(self) -> bool:
        return self.stop.is_set()

    def report(self, name: str, images: int, expected: int | None = None) -> None:
        self.images += images
        if expected is not None or time.monotonic() - self.sent > 0.1:  # a step may be shorter than sending takes
            self.reports.put((name, self.images, expected))
            self.images, self.sent = 0, time.monotonic()


class Here(Monitor):
    """Of a training in the process that asked for it."""

    def __init__(self, received: list[int], progress: Progress) -> None:
        self.received, self.report = received, progress.add  # type: ignore[method-assign]

    def should_stop(self) -> bool:
        if self.received:
            self.signal = self.received[0]
        return bool(self.received)


_child: Child


def _start_worker(stop: Any, reports: Any) -> None:
    global _child
    for number in SIGNALS:  # a terminal's Ctrl-C is for the parent, which then asks all trainings to stop
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    torch.set_num_threads(1)  # one core each; also makes the numbers independent of how many cores there are
    _child = Child(stop, reports)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent cannot tell its workers to stop; its pipe closes. Files are atomic: leaving at once is safe."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _work(job: Job) -> None:
    job.work(**job.arguments, monitor=_child)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes that start inside inherit the mask: they begin undisturbed."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start, with the first process, would unblock both signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def perform(jobs: list[Job], *, processes: int, quiet: bool = False, insist: bool = False) -> None:
    """Do what is not done yet, in up to so many worker processes; 0: in this process (on an accelerator, or as one of
    torchrun's ranks). SIGINT and SIGTERM end it with `Interrupted`, resumably."""
    done = {job.name for job in jobs if job.result.exists()}
    waiting = [job for job in jobs if job.name not in done]
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with signals_caught(stop.set, quiet, insist) as received, Progress(waiting, len(done), quiet) as progress:
        if not processes:
            for job in waiting:
                job.work(**job.arguments, monitor=Here(received, progress))
                progress.finished(job)
            return
        failure = in_workers(waiting, done, min(processes, len(waiting)), context, stop, progress)
    if received:
        raise Interrupted(received[0])
    if isinstance(failure, BrokenProcessPool):
        raise RunError("a worker process was killed (out of memory?): continue with --resume") from failure
    if failure is not None:
        raise failure


def in_workers(
    waiting: list[Job], done: set[str], processes: int, context: Any, stop: Any, progress: Progress
) -> BaseException | None:
    """Work through all jobs, those that others wait for first; the first failure ends it and is returned."""
    failure: BaseException | None = None
    reports, running = context.Queue(), dict[Future, Job]()
    with ProcessPoolExecutor(processes, context, _start_worker, (stop, reports)) as pool:
        while running or (waiting and not stop.is_set()):
            ready = [job for job in waiting if job.after is None or job.after in done] if not stop.is_set() else []
            for job in ready[: processes - len(running)]:  # no queue inside the pool: nothing to cancel when stopping
                waiting.remove(job)
                with signals_blocked():
                    running[pool.submit(_work, job)] = job
            finished, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
            with contextlib.suppress(queue.Empty):
                while True:
                    progress.add(*reports.get_nowait())
            for future in finished:
                job, error = running.pop(future), future.exception()
                if error is None:
                    done.add(job.name)
                    progress.finished(job)
                elif not isinstance(error, Interrupted):
                    failure = failure or error
                    stop.set()
    return failure


@contextlib.contextmanager
def signals_caught(stop: Callable[[], None], quiet: bool, insist: bool) -> Iterator[list[int]]:
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

    previous = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Progress:
    """One bar over everything to be trained on: images, images per second, time left; and what is running now."""

    def __init__(self, waiting: list[Job], done: int, quiet: bool) -> None:
        from tqdm import tqdm

        self.jobs, self.done = done + len(waiting), done
        self.expected = {job.name: job.images for job in waiting}
        self.current: dict[str, int] = {}
        size = shutil.get_terminal_size((110, 24))  # tqdm itself shows nothing on a terminal of unknown size
        self.bar = tqdm(
            total=sum(self.expected.values()),
            unit="img",
            unit_scale=True,
            disable=quiet,
            smoothing=0.05,
            ncols=size.columns,
            nrows=size.lines,
            mininterval=0.2 if sys.stderr.isatty() else 15,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.close()

    def add(self, name: str, images: int, expected: int | None = None) -> None:
        if expected is not None:
            self.bar.total += expected - self.expected[name]
            self.expected[name] = expected
        self.current[name] = self.current.get(name, 0) + images
        self._describe()
        self.bar.update(images)

    def finished(self, job: Job) -> None:
        self.done += 1
        self.bar.update(self.expected[job.name] - self.current.pop(job.name, 0))  # e.g. what was done before a resume
        self._describe()

    def _describe(self) -> None:
        self.bar.set_description_str(f"{self.done}/{self.jobs} runs [{', '.join(self.current)}]", refresh=False)
