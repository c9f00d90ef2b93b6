"""Build modes of setup.py: what VKD_KERNELS_BUILD asks for is built, or an error says what is missing."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from vkd_kernels import _backend

ROOT = Path(__file__).parents[1]


def setup(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VKD_KERNELS_BUILD": "gpu"}, "VKD_KERNELS_BUILD must be one of auto, cuda, cpu, 0; got 'gpu'"),
        ({"VKD_KERNELS_BUILD": "cpu", "CXX": "/missing/c++"}, "VKD_KERNELS_BUILD=cpu, but no C++ compiler was found"),
        ({"VKD_KERNELS_BUILD": "cuda", "CUDA_HOME": "/missing"}, "VKD_KERNELS_BUILD=cuda, but "),
    ],
)
def test_a_requested_build_that_cannot_be_made_is_an_error(tmp_path, environment, message):
    result = setup("build", "--build-base", str(tmp_path), **environment)
    assert result.returncode != 0
    assert message in result.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"VKD_KERNELS_BUILD": "0"}, "VKD_KERNELS_BUILD=0 at installation"),
        (
            {"VKD_KERNELS_BUILD": "auto", "CXX": "/missing/c++"},
            "no C++ compiler was found (looked for CXX, c++, g++, clang++)",
        ),
    ],
)
def test_a_pure_python_wheel_says_why(tmp_path, environment, reason):
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, "."]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert json.loads(archive.read("vkd_kernels/_build.json")) == {"build": "python", "reason": reason}
    assert "vkd_kernels/py.typed" in names and not [n for n in names if n.endswith(".so")]


USE_EVERYTHING = """
import torch, vkd_kernels as vk
print(vk.__file__)
q = vk.cayley(torch.randn(7, 3), backend={backend!r})
assert (q.T @ q - torch.eye(3)).abs().max() < 1e-6
vk.OrthoProjLoss(3, 7)(torch.randn(5, 3), torch.randn(5, 7)).backward()
assert vk.OrthogonalLinear(3, 7)(torch.randn(5, 3)).shape == (5, 7)
vk.orthogonal(torch.nn.Linear(3, 7))
vk.Whitening(7)(torch.randn(9, 7))
assert all(hasattr(vk, name) for name in vk.__all__)
assert all(hasattr(vk.functional, name) for name in vk.functional.__all__)
assert vk.info()["ops"]["cayley"]["cpu"]["served_by"] == {backend!r}
"""


@pytest.mark.parametrize(("build", "backend"), [("0", "torch"), ("auto", "extension")])
def test_a_wheel_installed_elsewhere_works(tmp_path, build, backend):
    if backend == "extension" and _backend.extension()[0] is None:
        pytest.skip("no compiler here: the installed package has no extension either")
    environment = {**os.environ, "VKD_KERNELS_BUILD": build}
    pip = [sys.executable, "-m", "pip"]
    command = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, "."]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], capture_output=True, check=True
    )
    # -S: without the .pth files of this environment, which lead to the working tree.
    program = [sys.executable, "-S", "-W", "ignore", "-c", USE_EVERYTHING.format(backend=backend)]
    paths = os.pathsep.join([str(tmp_path / "site"), sysconfig.get_path("purelib")])
    result = subprocess.run(
        program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path))
