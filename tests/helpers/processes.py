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
import uuid
from datetime import timedelta
from multiprocessing.connection import wait

import psutil
import torch
import torch.distributed as dist

RANKS_TIMEOUT = 600.0  # seconds
MARK = "VKD_KERNELS_TESTED_BY"

_started = []

# ---- ranks -----------------------------------------------------------------------------------------------------------

_ranks = []  # [(process, connection)] of two processes that wait for work, once they have been needed


def _serve(rank, connection):
    """One rank's process: takes (worker, store, limit, arguments), answers None or the text of the error."""
    torch.set_num_threads(1)
    folder = os.getcwd()
    while True:
        try:
            worker, store, limit, arguments = connection.recv()
        except EOFError:  # the tests have ended
            return
        torch.manual_seed(0)
        said = None
        try:
            dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=limit / 2), world_size=2, rank=rank)
            worker(rank, *arguments)
        except Exception:
            said = f"rank {rank}: {traceback.format_exc()[-3000:]}"
        finally:
            os.chdir(folder)
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(said)


def _start_ranks():
    """Forked from a process of their own kind that has imported PyTorch: once, however often ranks are started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "vkd_kernels"])
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, theirs))
        process.start()
        theirs.close()  # so that the end of the process ends the connection
        _ranks.append((process, ours))


def end_ranks(seconds=0):
    """Ends the ranks' processes: those that have not ended by themselves after that time are killed."""
    for _, connection in _ranks:
        connection.close()
    for process, _ in _ranks:
        process.join(seconds)
        process.kill()
        process.join()
    _ranks.clear()


def run_ranks(worker, folder, *arguments, seconds=RANKS_TIMEOUT):
    """worker(rank, *arguments) in two processes, ranks of the default group (gloo; no port: its store is a file).

    An error in one rank ends both, and is raised here, the first one first. So does the time limit; a collective whose
    partner never comes fails after half of it. After a success the processes wait for the next call, because importing
    what tests need takes longer than most workers; they end with this process.
    """
    if not _ranks:
        _start_ranks()
    deadline = time.monotonic() + seconds
    store = folder / f"store-{uuid.uuid4()}"
    waiting, errors = {connection: rank for rank, (_, connection) in enumerate(_ranks)}, []
    try:
        for connection in waiting:
            connection.send((worker, store, seconds, arguments))
        while waiting:
            ready = wait(list(waiting), timeout=10 if errors else max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for connection in ready:
                errors += _answer(waiting.pop(connection), connection)
        if errors:
            raise AssertionError("\n".join(errors))
        if waiting:
            raise TimeoutError(f"ranks of {worker.__name__} were still running after {seconds:g} s")
    except BaseException:
        end_ranks()
        raise


def _answer(rank, connection):
    """[what the rank says of its error], or [] after a success."""
    try:
        said = connection.recv()
    except EOFError:
        process, _ = _ranks[rank]
        process.join()
        said = f"rank {rank} ended with the exit code {process.exitcode}"
    return [] if said is None else [said]


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
