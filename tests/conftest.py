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

NO_GPU = "needs an NVIDIA GPU: torch.cuda.is_available() is False"


def pytest_collection_modifyitems(items):
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
    processes.end_children()
