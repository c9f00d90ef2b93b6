"""Shared by all tests: the skip of GPU tests with its reason, and the comparison against float64."""

import pytest
import torch

NO_GPU = "needs an NVIDIA GPU: torch.cuda.is_available() is False"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
