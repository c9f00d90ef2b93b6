"""Runs many trainings: in worker processes of one thread each, or one after the other in this process.

Each is a `Job` that leaves a file when it is done, so that an interrupted run goes on where it stopped: what is done
is skipped, what is not continues from its checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .engine import Interrupted
from .runs import RunError
from .task import Monitor

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    name: str
    result: Path  # exists when the job is done
    work: Callable[..., None]  # called as work(**arguments, monitor=...)
    arguments: dict[str, Any]
    after: str | None = None  # the job that must be done before


class Watch(Monitor):
    """`stop.value` is the signal that asked for an end, or 0."""

    def __init__(self, stop: Any, quiet: bool) -> None:
        self.stop, self.quiet = stop, quiet

    def should_stop(self) -> bool:
        self.signal = self.stop.value
        return bool(self.signal)


def perform(jobs: list[Job], *, processes: int, quiet: bool = False) -> None:
    """Do what is not done yet, in up to so many worker processes; 0: in this process (on an accelerator, or as one of
    torchrun's ranks). SIGINT and SIGTERM end it with `Interrupted`, resumably."""
    done = {job.name for job in jobs if job.result.exists()}
    waiting = [job for job in jobs if job.name not in done]
    context = multiprocessing.get_context("spawn")
    stop = context.Value("i", 0, lock=False)
    with signals_caught(stop, quiet):
        if processes and waiting:
            with tqdm(total=len(jobs), initial=len(done), unit="run", disable=quiet) as bar:
                in_workers(waiting, done, min(processes, len(waiting)), context, stop, bar)
        else:
            for job in waiting:
                job.work(**job.arguments, monitor=Watch(stop, quiet))


def in_workers(waiting: list[Job], done: set[str], processes: int, context: Any, stop: Any, bar: Any) -> None:
    """Work through all jobs, those that others wait for first; the first failure ends it and is raised."""
    failure: BaseException | None = None
    running = dict[Future, Job]()
    with ProcessPoolExecutor(processes, context, _start_worker, (stop,)) as pool:
        while running or (waiting and not stop.value):
            ready = [job for job in waiting if job.after is None or job.after in done] if not stop.value else []
            for job in ready[: processes - len(running)]:  # no queue inside the pool: nothing to cancel when stopping
                waiting.remove(job)
                with signals_blocked():
                    running[pool.submit(_work, job)] = job
            bar.set_postfix_str(", ".join(job.name for job in running.values()))
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                job, error = running.pop(future), future.exception()
                if error is None:
                    done.add(job.name)
                    bar.update()
                elif not isinstance(error, Interrupted):
                    failure, stop.value = failure or error, stop.value or signal.SIGTERM
    if isinstance(failure, BrokenProcessPool):
        raise RunError("a worker process was killed (out of memory?): continue with --resume") from failure
    if failure or stop.value:
        raise failure or Interrupted(stop.value)


# ---- worker processes and signals ------------------------------------------------------------------------------------

_watch: Watch


def _start_worker(stop: Any) -> None:
    global _watch
    for number in SIGNALS:  # a terminal's Ctrl-C is for the parent, which then asks all trainings to stop
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    torch.set_num_threads(1)  # one core each; also makes the numbers independent of how many cores there are
    _watch = Watch(stop, quiet=True)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent cannot tell its workers to stop; its pipe closes. Files are atomic: leaving at once is safe."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _work(job: Job) -> None:
    job.work(**job.arguments, monitor=_watch)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes that start inside inherit the mask: they begin undisturbed."""
    resource_tracker.ensure_running()  # its start, with the first process, would unblock both signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def signals_caught(stop: Any, quiet: bool) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`, which every training looks at before a step."""

    def on_signal(number: int, frame: Any) -> None:
        if not quiet and not stop.value:
            print("\nstopping: saving checkpoints", file=sys.stderr, flush=True)
        stop.value = number

    previous = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
