"""Build modes of setup.py, and its wheels: what is asked for is built or an error says why; what is built works."""

import email
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vkd_kernels as vk
from vkd_kernels.ops import implementations

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


def build_wheel(folder, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, "."]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """What `make wheels` builds: pure Python, and with the extension where there is a compiler; by backend."""
    stale = ROOT / "build" / "lib" / "vkd_kernels" / "renamed_since.py"  # of an earlier build
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    found = {"torch": build_wheel(tmp_path_factory.mktemp("pure"), VKD_KERNELS_BUILD="0")}
    if implementations.extension()[0] is not None:
        found["extension"] = build_wheel(tmp_path_factory.mktemp("compiled"), VKD_KERNELS_BUILD="auto")
    return found


def record_and_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("vkd_kernels/_build.json")), archive.namelist()


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_a_wheel_holds_the_package_and_nothing_else(wheels):
    package = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.yaml", "py.typed")
        for path in (ROOT / "vkd_kernels").rglob(pattern)
    }
    for wheel in wheels.values():
        _, names = record_and_names(wheel)
        inside = {name for name in names if name.startswith("vkd_kernels/")}
        compiled = {name for name in inside if name.endswith(".so")}
        assert inside - compiled == package | {"vkd_kernels/_build.json"}
        assert len(compiled) == (wheel is wheels.get("extension"))
        assert any(name.endswith("/LICENSE") for name in names)
        assert metadata(wheel)["Version"] == vk.__version__


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "VKD_KERNELS_BUILD=0 at installation"),
        (
            {"VKD_KERNELS_BUILD": "auto", "CXX": "/missing/c++"},
            "no C++ compiler was found (looked for CXX, c++, g++, clang++)",
        ),
    ],
)
def test_a_pure_python_wheel_says_why(tmp_path, wheels, environment, reason):
    wheel = build_wheel(tmp_path, **environment) if environment else wheels["torch"]
    assert wheel.name.endswith("py3-none-any.whl")
    assert record_and_names(wheel)[0] == {"build": "python", "reason": reason}


def needed(wheel):
    """Names of the packages that a wheel says it needs, and those that these need: of this environment, no extras."""
    found, waiting = {}, [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist")]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if name not in found and wanted:
            found[name] = importlib.metadata.distribution(name)
            assert requirement.specifier.contains(found[name].version, prereleases=True), requirement
            waiting += [Requirement(line) for line in found[name].requires or ()]
    return found.values()


def clean_environment(folder, wheel):
    """A virtual environment of its own with the wheel installed. What the wheel declares to need is on its path by
    links to this environment's, so that nothing is downloaded; nothing else is, neither the working tree nor an extra.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    links = folder.with_name("links")  # not among the environment's own packages: pip must not think that it owns them
    links.mkdir()
    for distribution in needed(wheel):
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(distribution.locate_file(top))
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{links}\n")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-compile", wheel]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return python


USE_EVERYTHING = """
import json, torch, vkd_kernels as vk
x, y, eye = torch.randn(2, 9, 3), torch.randn(2, 9, 7), torch.eye(3)
q = vk.cayley(torch.randn(7, 3), backend={backend!r})
assert (q.T @ q - eye).abs().max() < 1e-6
loss = vk.OrthoProjLoss(3, 7)
loss(x, y).backward()
pair = {{"student": "", "teacher": "", "student_pool": "tokens", "teacher_pool": "tokens"}}
models, tokens = (torch.nn.Linear(5, 3), torch.nn.Linear(5, 7)), torch.randn(2, 9, 5)
distiller = vk.FeatureDistiller(*models, [pair], example_input=tokens)
distiller(tokens, metrics=True)[1]["total"].backward()
called = {{
    "cayley": q, "OrthoProjLoss": loss, "FeatureDistiller": distiller, "__version__": vk.__version__,
    "OrthogonalLinear": vk.OrthogonalLinear(3, 7)(x), "orthogonal": vk.orthogonal(torch.nn.Linear(3, 7)),
    "Whitening": vk.Whitening(7)(y), "info": vk.info(),
    "functional": {{
        "cayley": vk.functional.cayley(torch.randn(7, 3)), "cayley_inverse": vk.functional.cayley_inverse(q),
        "ortho_proj_loss": vk.functional.ortho_proj_loss(x, y, q),
        "ortho_proj_losses": vk.functional.ortho_proj_losses([x], [y], q[None]),
        "standardize": vk.functional.standardize(y), "whiten": vk.functional.whiten(y),
    }},
    "diagnostics": {{
        "orthogonality_error": vk.diagnostics.orthogonality_error(q), "cka": vk.diagnostics.cka(x, y),
        "effective_rank": vk.diagnostics.effective_rank(x), "metrics": vk.diagnostics.metrics(x, y, q),
    }},
}}
assert set(called) == set(vk.__all__)
for name in ("functional", "diagnostics"):
    assert set(called[name]) == set(getattr(vk, name).__all__)
assert called["info"]["ops"]["cayley"]["cpu"]["served_by"] == {backend!r}
print(vk.__file__)
"""


@pytest.mark.parametrize("backend", ["torch", "extension"])
def test_every_public_name_works_in_a_clean_environment(tmp_path, wheels, backend):
    if backend not in wheels:
        pytest.skip("no compiler here: the installed package has no extension either")
    python = clean_environment(tmp_path / "venv", wheels[backend])

    def run(*command):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    result = run(python, "-W", "ignore", "-c", USE_EVERYTHING.format(backend=backend))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / "venv"))
    if backend == "torch":
        result = run(python.with_name("vkd"), "info")
        assert result.returncode == 0 and "VKD_KERNELS_BUILD=0 at installation" in result.stdout, result.stderr
        result = run(python.with_name("vkd"), "inspect", ".")
        assert result.returncode == 2, result.stderr
        assert re.match(r"vkd: error: \w+ is missing: pip install 'vkd_kernels\[recipes\]'", result.stderr)
