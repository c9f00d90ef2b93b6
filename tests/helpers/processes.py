"""Processes that tests start: each has a time limit, and none outlives its test.

run_ranks(worker, ...)     worker(rank, ...) in two gloo ranks
run_python, Python         commands of Python that import PyTorch, forked where it has been imported
popen, run                 other commands; torchrun gives each rank a session of its own, so what a command has started
                           is found by a mark in its environment, also after the command itself has died
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

RANKS_TIMEOUT = 600.0  # seconds
MARK = "VKD_KERNELS_TESTED_BY"


class NotConnected(AssertionError):
    """The ranks did not find each other, as happens now and then on a busy machine; no worker has begun."""


_started = []  # by popen
_forked = []  # as Python


def _forks():
    """Where processes are forked from: one that has imported PyTorch, which takes longer than what most tests do there.

    Not the package: some tests import it in another environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    return context


# ---- ranks -----------------------------------------------------------------------------------------------------------

_ranks = []  # [(process, connection)] of two processes that wait for work, once they have been needed


def _serve(rank, connection):
    """One rank's process: takes (worker, store, limit, arguments), answers None or (the error's text, was it begun)."""
    torch.set_num_threads(1)
    folder = os.getcwd()
    while True:
        try:
            worker, store, limit, arguments = connection.recv()
        except EOFError:  # the tests have ended
            return
        torch.manual_seed(0)
        said, begun = None, False
        try:
            dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=limit / 2), world_size=2, rank=rank)
            dist.barrier()
            begun = True
            worker(rank, *arguments)
        except Exception:
            said = f"rank {rank}: {traceback.format_exc()[-3000:]}", begun
        finally:
            os.chdir(folder)
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(said)


def _start_ranks():
    context = _forks()
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
    what tests need takes longer than most workers; they end with this process. Ranks that do not connect try once more.
    """
    try:
        _run_ranks(worker, folder, arguments, seconds)
    except NotConnected:
        _run_ranks(worker, folder, arguments, seconds)


def _run_ranks(worker, folder, arguments, seconds):
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
            texts, begun = zip(*errors, strict=True)
            raise (AssertionError if any(begun) else NotConnected)("\n".join(texts))
        if waiting:
            raise TimeoutError(f"ranks of {worker.__name__} were still running after {seconds:g} s")
    except BaseException:
        end_ranks()
        raise


def _answer(rank, connection):
    """[(what the rank says of its error, whether its worker had begun)], or [] after a success."""
    try:
        said = connection.recv()
    except EOFError:
        process, _ = _ranks[rank]
        process.join()
        said = f"rank {rank} ended with the exit code {process.exitcode}", True
    return [] if said is None else [said]


# ---- Python ----------------------------------------------------------------------------------------------------------


class Python:
    """``python -c CODE ...`` or ``python -m MODULE ...`` in a session of its own, with what tests use of Popen."""

    def __init__(self, command, *, env=None, cwd=None, stderr=subprocess.PIPE, **_):
        _, flag, what, *words = (os.fspath(word) for word in command)
        assert flag in ("-c", "-m"), command
        self.args, self.returncode = command, None
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        if stderr == subprocess.STDOUT:
            self._outputs[1] = None
        arguments = (
            flag,
            what,
            words,
            dict(os.environ if env is None else env),
            os.fspath(cwd or os.getcwd()),
            self._outputs,
        )
        self._process = _forks().Process(target=_run_as_python_does, args=arguments)
        self._process.start()
        self.pid = self._process.pid
        _forked.append(self)

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """Its session, too."""
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()

    def communicate(self, timeout=None):
        """(stdout, stderr), both as text; stderr is None where it goes to stdout."""
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout)
        self.returncode = self._process.exitcode
        texts = [path and path.read_text() for path in self._outputs]
        self._folder.cleanup()
        return texts


def _run_as_python_does(flag, what, words, env, folder, outputs):
    os.setsid()
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(1 if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = [flag, *words]
    if flag == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def run_python(*words, seconds, **options):
    """subprocess.run of Python with these words, a time limit and captured output."""
    process = Python([sys.executable, *words], **options)
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


# ---- other commands --------------------------------------------------------------------------------------------------


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
    """Ends what Python and popen have started, and what that has started, where it still runs (after each test)."""
    for process in _forked:
        process.kill()
    _forked.clear()
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
