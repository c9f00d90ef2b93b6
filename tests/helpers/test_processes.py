"""The tests' own processes end: ranks that hang or fail, and torchrun's ranks without torchrun."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.helpers import processes

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def waits_for_a_partner(rank, folder):
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        time.sleep(1000)
    dist.all_reduce(torch.ones(1))


def first_rank_fails(rank):
    if rank == 0:
        raise ArithmeticError("of the first rank")
    dist.all_reduce(torch.ones(1))


def first_rank_dies(rank):
    if rank == 0:
        os._exit(3)
    dist.all_reduce(torch.ones(1))


def alive(folder):
    pids = [int(path.read_text()) for path in folder.iterdir() if path.name.isdigit()]
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@needs_gloo
def test_ranks_that_hang_are_ended(tmp_path):
    with pytest.raises((TimeoutError, AssertionError), match="(?i)still running|time"):
        processes.run_ranks(waits_for_a_partner, tmp_path, tmp_path, seconds=12)
    deadline = time.monotonic() + 30
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(tmp_path)


@needs_gloo
@pytest.mark.parametrize(
    ("worker", "message"),
    [(first_rank_fails, "rank 0(.|\n)*of the first rank"), (first_rank_dies, "rank 1|exit code 3")],
)
def test_a_rank_that_fails_ends_its_partner(tmp_path, worker, message):
    with pytest.raises(AssertionError, match=message):
        processes.run_ranks(worker, tmp_path)


ENDLESS = "import pathlib, os, sys, time; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid())); "


@needs_gloo
def test_ranks_of_torchrun_end_with_their_test(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS + "time.sleep(1000)")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = processes.popen([*launcher, script, tmp_path])
    deadline = time.monotonic() + 300
    while not all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.kill()  # its ranks stay
    process.wait()
    assert len(alive(tmp_path)) == 2
    processes.end_started()
    deadline = time.monotonic() + 30
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(tmp_path)


def test_a_command_past_its_limit_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", "import time; time.sleep(1000)"], seconds=1)
    assert processes.run([sys.executable, "-c", "print(7)"], seconds=100).stdout == "7\n"


BLOCKED = """
import multiprocessing, signal, sys, time
from multiprocessing import resource_tracker
sys.path.insert(0, sys.argv[1])
from tests.helpers import processes
if __name__ == "__main__":
    resource_tracker.ensure_running()  # it unblocks signals when it starts
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,), daemon=True)
    child.start()
    processes.end_children()
"""


def test_children_that_block_sigterm_are_ended(tmp_path):
    script = tmp_path / "blocked.py"
    script.write_text(BLOCKED)
    result = processes.run([sys.executable, script, Path(__file__).parents[2]], seconds=300)
    assert result.returncode == 0, result.stderr
