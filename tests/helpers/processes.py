"""Processes that tests start: each has a time limit, and none outlives its test.

run_ranks(worker, ...)     worker(rank, ...) in two gloo ranks
popen, run                 commands; torchrun gives each rank a session of its own, so what a command has started is
                           found by a mark in its environment, also after the command itself has died
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import time
import traceback
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS_TIMEOUT = 600.0  # seconds
MARK = "VKD_KERNELS_TESTED_BY"

_started = []

# ---- ranks -----------------------------------------------------------------------------------------------------------


def _rank(rank, worker, store, errors, limit, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=limit / 2), world_size=2, rank=rank)
        worker(rank, *arguments)
    except Exception:
        errors.put(f"rank {rank}: {traceback.format_exc()[-3000:]}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(worker, folder, *arguments, seconds=RANKS_TIMEOUT):
    """worker(rank, *arguments) in two processes, ranks of the default group (gloo; no port: its store is a file).

    An error in one rank ends both, and is raised here, the first one first. So does the time limit; a collective whose
    partner never comes fails after half of it. The ranks end with this process.
    """
    errors = mp.get_context("spawn").SimpleQueue()
    store = folder / "store"
    context = mp.spawn(_rank, args=(worker, store, errors, seconds, arguments), nprocs=2, join=False)
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1, grace_period=10):
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks of {worker.__name__} were still running after {seconds:g} s")
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        said = []
        while not errors.empty():
            said.append(errors.get())
        raise AssertionError("\n".join(said) or str(error)) from None
    finally:
        for process in context.processes:
            process.kill()


# ---- commands --------------------------------------------------------------------------------------------------------


def popen(command, *, env=None, **options):
    """subprocess.Popen in a session of its own, as a terminal starts a command; its output is piped as text."""
    env = {**os.environ, **(env or {}), MARK: str(os.getpid())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, start_new_session=True, **{**pipes, **options})
    _started.append(process)
    return process


def run(command, *, seconds, **options):
    """subprocess.run with a time limit that ends whatever the command has started, too; the output is captured."""
    process = popen(command, **options)
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        end_started()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def end_started():
    """Ends what popen has started, and what that has started, wherever it still runs (conftest.py: after each test)."""
    if not _started:
        return
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(os.getpid()):
                process.kill()
    for process in _started:
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    _started.clear()


def end_children():
    """Ends multiprocessing's children that are left at the end (conftest.py): at exit Python would wait for them, and
    for ever where they block SIGTERM, as the recipes' loader processes do."""
    left = multiprocessing.active_children()
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take their end for a failure
    for child in left:
        child.kill()
        child.join()
