"""Build modes of setup.py: what VKD_KERNELS_BUILD asks for is built, or an error says what is missing."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
