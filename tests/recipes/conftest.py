"""Tests of `vkd`'s tasks need the extra [recipes]: without it they are left out."""

from importlib.util import find_spec

import pytest
import torch

NEEDED = ("lightning_fabric", "yaml", "pydantic", "filelock", "safetensors", "sklearn", "scipy", "matplotlib", "tqdm")
NEEDED += ("timm", "torchvision", "torchmetrics")
MISSING = [name for name in NEEDED if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> list[str]:
    return [f"tests/recipes left out: {', '.join(MISSING)} missing (the extra [recipes])"] if MISSING else []


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of the toy task, to be read only."""
    from tests.recipes.toy import ARMS, distill

    folder = tmp_path_factory.mktemp("toy") / "run"
    assert distill(folder, "--arms", *ARMS) == 0
    return folder


@pytest.fixture
def folder(tmp_path):
    """Two classes, six and three images of each."""
    from tests.recipes.setups import picture

    for split, count in (("train", 6), ("val", 3)):
        for seed in range(2 * count):
            picture(tmp_path / split / f"class-{seed % 2}" / f"{seed}.png", seed)
    return tmp_path
