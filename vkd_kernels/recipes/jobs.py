"""Runs many trainings: in worker processes of one thread each, or one after the other in this process.

SIGINT and SIGTERM end both ways at once, with `Interrupted`. That costs the steps since the last checkpoints.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from tqdm import tqdm

from .engine import progress
from .runs import RunError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Job = Callable[..., None]  # called as job(quiet=...)


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def interrupt(number: int, frame: Any) -> None:
    raise Interrupted(number)


def perform(stages: Sequence[Sequence[Job]], *, processes: int, quiet: bool = False) -> None:
    """Do the jobs of one stage after the other, in up to so many worker processes; 0: in this process (on an
    accelerator, or as one of torchrun's ranks). The first failure ends it and is raised."""
    with handled(interrupt):
        if processes and any(stages):
            in_workers(stages, min(processes, max(map(len, stages))), quiet)
            return
        for stage in stages:
            for job in stage:
                job(quiet=quiet)


def in_workers(stages: Sequence[Sequence[Job]], processes: int, quiet: bool) -> None:
    theirs, ours = multiprocessing.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (theirs,))
    with progress(total=sum(map(len, stages)), unit="run", disable=quiet) as bar, ours, pool:
        try:
            for stage in stages:
                with handled(signal.SIG_IGN):  # processes that start inside inherit it: Ctrl-C is not for them
                    futures = [pool.submit(job, quiet=True) for job in stage]
                for future in as_completed(futures):
                    future.result()
                    bar.update()
        except BaseException as error:
            ours.close()  # which ends the workers
            if isinstance(error, BrokenProcessPool):
                raise RunError("a worker process was killed (out of memory?): continue with --resume") from error
            raise


def _start_worker(parent: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which would outlast a killed worker
    torch.set_num_threads(1)  # one core each; also makes the numbers independent of how many cores there are
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: Any) -> None:
    """Its end of this pipe closes when it leaves or is killed. Files are atomic: leaving at once is safe."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


@contextlib.contextmanager
def handled(handler: Any) -> Iterator[None]:
    """SIGINT and SIGTERM are handled so."""
    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
