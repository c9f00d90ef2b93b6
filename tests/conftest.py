"""Shared by all tests: the skip of GPU tests with its reason, a fixed seed, and no process left behind."""

import os

# Some virtual machines advertise AMX and stop a process that uses it: 16-bit products take the next best instructions.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import pytest
import torch

from tests.helpers import processes

if not torch.cuda.is_available():
    # Triton's decorators read it when kernels and Triton itself are imported: before any test module does.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Files whose tests take a second or more of a processor each: ranks, commands, compilers, kernels in the interpreter.
SLOW_FILES = (
    "distributed/*.py",
    "helpers/test_processes.py",
    "modules/test_faults.py",
    "modules/test_integrations*.py",
    "*/test_properties.py",
    "modules/test_store*.py",
    "modules/test_teachers.py",
    "ops/test_ortho_proj_loss_aot.py",
    "ops/test_ortho_proj_loss_group*.py",
    "ops/test_ortho_proj_loss_semi_orthogonal.py",
    "ops/test_ortho_proj_loss_triton.py",
    "recipes/*.py",
    "test_benchmarks.py",
    "test_build.py",
)
NO_GPU = "needs an NVIDIA GPU: torch.cuda.is_available() is False"


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out what is slow: `make test-quick`")
    parser.addoption("--thorough", action="store_true", help="every combination: `make test-thorough`")


def is_slow_file(path):
    return any(path.match(f"tests/{pattern}") for pattern in SLOW_FILES)


def pytest_ignore_collect(collection_path, config):
    """With --quick, slow files are not even imported: it takes seconds. (None: no opinion.)"""
    return True if config.getoption("--quick") and is_slow_file(collection_path) else None


def pytest_collection_modifyitems(items, config):
    for item in items:
        if is_slow_file(item.path) or "compile" in item.name:  # of torch.compile: seconds each
            item.add_marker(pytest.mark.slow)
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
