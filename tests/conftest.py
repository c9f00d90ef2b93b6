"""Shared by all tests: the skip of GPU tests with its reason, a fixed seed, and no process left behind."""

import os
import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so in a shell's background, and in commands that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Some virtual machines advertise AMX and stop a process that uses it: 16-bit products take the next best instructions.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import pytest
import torch

from tests.helpers import processes

if not torch.cuda.is_available():
    # Triton's decorators read it when kernels and Triton itself are imported: before any test module does.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Files whose tests take a second or more of a processor each: compilers, ranks, commands, kernels in the interpreter.
SLOW_FILES = (
    "test_build.py",
    "ops/test_ortho_proj_loss_aot.py",
    "recipes/*.py",
    "distributed/*.py",
    "ops/test_ortho_proj_loss_triton*.py",
    "ops/test_ortho_proj_loss_group*.py",
    "ops/test_host_time.py",
    "test_benchmarks.py",
    "test_benchmarks_sampling.py",
    "helpers/test_processes.py",
    "modules/test_faults.py",
    "modules/test_integrations*.py",
    "*/test_properties.py",
    "modules/test_store*.py",
    "modules/test_teachers.py",
    "ops/test_ortho_proj_loss_semi_orthogonal.py",
)
# What takes longest runs first, so that two processes end at about the same time: the slow files, and of the others
# those that have slow tests or very many.
ORDER = (
    "test_build.py",
    "ops/test_ortho_proj_loss_aot.py",
    "test_benchmarks_gpu.py",
    *SLOW_FILES,
    "test_docs.py",
    "ops/test_running_statistics.py",
    "ops/test_ortho_proj_loss_cosine.py",
    "ops/test_ortho_proj_loss_chunked.py",
    "ops/test_ortho_proj_loss.py",
    "ops/test_library.py",
    "ops/test_cayley.py",
    "modules/*.py",
    "ops/test_backend.py",
)
NO_GPU = "needs an NVIDIA GPU: torch.cuda.is_available() is False"


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out what is slow: `make test-quick`")
    parser.addoption("--thorough", action="store_true", help="every combination: `make test-thorough`")


def place(path, patterns):
    """That of the first pattern which the file matches; behind all where it matches none."""
    return next((i for i, pattern in enumerate(patterns) if path.match(f"tests/{pattern}")), len(patterns))


def is_slow_file(path):
    return place(path, SLOW_FILES) < len(SLOW_FILES)


def pytest_ignore_collect(collection_path, config):
    """With --quick, slow files are not even imported: it takes seconds. (None: no opinion.)"""
    return True if config.getoption("--quick") and is_slow_file(collection_path) else None


def pytest_collection_modifyitems(items, config):
    for item in items:
        if is_slow_file(item.path) or "compile" in item.name:  # of torch.compile: seconds each
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: place(item.path, ORDER))
    left_out = {"slow": config.getoption("--quick"), "thorough": not config.getoption("--thorough")}
    for mark in (mark for mark, is_left_out in left_out.items() if is_left_out):
        items[:] = [item for item in items if not item.get_closest_marker(mark)]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not a keyword: the folder may be called so
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _processes_end():
    yield
    processes.end_started()


def pytest_unconfigure():
    processes.end_ranks(seconds=30)
    processes.end_children()
