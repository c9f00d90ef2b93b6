"""Runs many trainings: in worker processes of one thread each, or one after the other in this process.

Each is a `Job` that leaves a file when it is done, so that an interrupted run goes on where it stopped: what is done
is skipped, what is not continues from its checkpoint. SIGINT and SIGTERM end both ways with `Interrupted`. A training
in this process saves a checkpoint first; workers are killed, which costs no more than the steps since their last one.
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

from .engine import Interrupted, progress
from .runs import RunError
from .task import Monitor

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    name: str
    result: Path  # exists when the job is done
    work: Callable[..., None]  # called as work(monitor=...)
    after: str | None = None  # the job that must be done before


def perform(jobs: list[Job], *, processes: int, quiet: bool = False) -> None:
    """Do what is not done yet, in up to so many worker processes; 0: in this process (on an accelerator, or as one of
    torchrun's ranks)."""
    waiting = [job for job in jobs if not job.result.exists()]
    if processes and waiting:
        in_workers(jobs, waiting, min(processes, len(waiting)), quiet)
        return
    monitor = Monitor(quiet)
    with signals_caught(lambda number: setattr(monitor, "signal", number)):
        for job in waiting:
            job.work(monitor=monitor)


def in_workers(jobs: list[Job], waiting: list[Job], processes: int, quiet: bool) -> None:
    """Work through all jobs, those that others wait for first; the first failure ends it and is raised."""

    def interrupt(number: int) -> None:
        raise Interrupted(number)

    others = {*multiprocessing.active_children()}  # of whoever called
    done, running = {job.name for job in jobs if job.result.exists()}, dict[Future, Job]()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker)
    bar = progress(total=len(jobs), initial=len(done), unit="run", disable=quiet)
    with signals_caught(interrupt), bar, pool:
        try:
            while running or waiting:
                ready = [job for job in waiting if job.after is None or job.after in done]
                for job in ready[: processes - len(running)]:
                    waiting.remove(job)
                    with signals_blocked():
                        running[pool.submit(_work, job)] = job
                bar.set_postfix_str(", ".join(job.name for job in running.values()), refresh=sys.stderr.isatty())
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    done.add(running.pop(future).name)
                    bar.update()
        except BaseException as error:
            for process in {*multiprocessing.active_children()} - others:
                process.kill()
            if isinstance(error, BrokenProcessPool):
                raise RunError("a worker process was killed (out of memory?): continue with --resume") from error
            raise


def _work(job: Job) -> None:
    job.work(monitor=Monitor())


def _start_worker() -> None:
    torch.set_num_threads(1)  # one core each; also makes the numbers independent of how many cores there are
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent cannot end its workers; its pipe closes. Files are atomic: leaving at once is safe."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes that start inside inherit the mask: a terminal's Ctrl-C is not for them."""
    resource_tracker.ensure_running()  # its start, with the first process, would unblock both signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def signals_caught(act: Callable[[int], Any]) -> Iterator[None]:
    """SIGINT and SIGTERM call `act`."""
    previous = {number: signal.signal(number, lambda number, frame: act(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
