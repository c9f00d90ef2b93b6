"""Build modes of setup.py, and its wheels: what is asked for is built or an error says why; what is built works."""

import email
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vkd_kernels as vk
from tests.helpers import processes
from vkd_kernels.ops import implementations

ROOT = Path(__file__).parents[1]
COMPILES = shutil.which(os.environ.get("CXX", "c++")) is not None
needs_compiler = pytest.mark.skipif(not COMPILES, reason="no C++ compiler here")


def run(*command, cwd=ROOT, **environment):
    """A command that ended well, in an environment without this tree's path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    result = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result


def setup(*arguments, **environment):
    command = [sys.executable, "setup.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    return result


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


def planned(monkeypatch, **environment):
    """What setup.py would build under these variables."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    return runpy.run_path(str(ROOT / "setup.py"))["plan"]()


def fake_program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@needs_compiler
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1", "can't be run"),
        ("echo nothing", "names no release"),
        ('[ "$1" = --version ] && echo "release {cuda}" && exit 0; echo "error: host compiler" >&2; exit 1', "compile"),
    ],
)
def test_auto_goes_on_without_cuda_where_nvcc_fails(tmp_path, monkeypatch, script, reason):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    fake_program(tmp_path / "bin" / "nvcc", script.format(cuda="13.0"))
    build, why, nvcc = planned(monkeypatch, VKD_KERNELS_BUILD="auto", CUDA_HOME=tmp_path)
    assert (build, nvcc) == ("cpu", None)
    assert reason in why
    with pytest.raises(SystemExit, match=f"VKD_KERNELS_BUILD=cuda, but .*{reason}"):
        planned(monkeypatch, VKD_KERNELS_BUILD="cuda")


def test_auto_goes_on_in_python_where_the_compiler_fails(tmp_path, monkeypatch):
    compiler = fake_program(tmp_path / "c++", 'echo "fatal error: Python.h: No such file or directory" >&2; exit 1')
    build, why, _ = planned(monkeypatch, VKD_KERNELS_BUILD="auto", CXX=compiler)
    assert build == "python"
    assert "can't compile C++20 with Python.h: fatal error: Python.h: No such file" in why
    with pytest.raises(SystemExit, match="VKD_KERNELS_BUILD=cpu, but .*Python.h"):
        planned(monkeypatch, VKD_KERNELS_BUILD="cpu")


@needs_compiler
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo cmake version 3.22.1", "cmake is version 3.22 and 3.24 is needed"),
        ("echo nothing", "names no version"),
        ("exit 1", "can't be run"),
        ("echo cmake version 3.24.0", None),
        ("echo cmake version 4.1.2", None),
    ],
)
def test_a_cmake_that_cannot_read_the_build_is_a_reason(tmp_path, monkeypatch, script, reason):
    """Ubuntu 22.04 has 3.22."""
    fake_program(tmp_path / "cmake", script)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # the tools beside it come first
    build, why, _ = planned(monkeypatch, VKD_KERNELS_BUILD="auto", CUDA_HOME="/missing")
    if reason is None:
        assert build == "cpu"
        return
    assert build == "python" and reason in why
    for mode in ("cpu", "cuda"):
        with pytest.raises(SystemExit, match=f"VKD_KERNELS_BUILD={mode}, but .*{reason}"):
            planned(monkeypatch, VKD_KERNELS_BUILD=mode)


@needs_compiler
def test_nvcc_is_tried_with_the_host_compiler_that_cmake_takes(tmp_path, monkeypatch):
    """Where the default gcc is too new for nvcc."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    script = """[ "$1" = --version ] && echo "release 13.0" && exit 0
case "$*" in *"-ccbin /older/g++"*) exit 0;; esac
echo "error: unsupported GNU version" >&2; exit 1"""
    nvcc = fake_program(tmp_path / "bin" / "nvcc", script)
    assert planned(monkeypatch, CUDA_HOME=tmp_path)[0] == "cpu"
    assert planned(monkeypatch, CUDAHOSTCXX="/older/g++") == ("cuda", None, nvcc)


@needs_compiler
@pytest.mark.parametrize("found", [True, False])
def test_build_tools_are_found_among_the_users_scripts_or_are_missing(tmp_path, monkeypatch, found):
    """`pip install --user cmake ninja` with a folder that is not on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("c++", "as"):
        (tools / tool).symlink_to(shutil.which(tool))
    for tool in ("cmake", "ninja") if found else ():
        fake_program(tmp_path / "user" / tool, "echo cmake version 3.24.0")
    get_path = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name, *scheme: str(tmp_path / "user") if scheme else get_path(name)
    )
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    build, why, _ = planned(monkeypatch, VKD_KERNELS_BUILD="auto", PATH=tools, CXX="c++", CUDA_HOME="/missing")
    assert build == ("cpu" if found else "python")
    assert found or why.startswith("cmake, ninja can't be found")


def test_another_compiler_has_another_build_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    module = runpy.run_path(str(ROOT / "setup.py"))
    folders = set()
    for nvcc in ("/a/nvcc", "/b/nvcc"):
        for host in ("g++", "clang++"):
            monkeypatch.setenv("CUDAHOSTCXX", host)
            folders.add(module["build_folder"](module["Plan"]("cuda", None, nvcc), "2.14.0"))
    for compiler in (sys.executable, "ccache g++", "ccache clang++"):
        monkeypatch.setenv("CXX", compiler)
        folders.add(module["build_folder"](module["Plan"]("cuda", None, "/a/nvcc"), "2.14.0"))
    assert len(folders) == 7


def build_wheel(folder, source=ROOT, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, source]
    run(*command, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def link(distribution, folder):
    """An installed package, also there by links."""
    for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        if not (folder / top).exists():
            (folder / top).symlink_to(distribution.locate_file(top))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"import setuptools.build_meta as backend; backend.build_sdist({str(folder)!r})")
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_the_sdist_holds_what_its_build_needs_and_no_build(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert {*sources, "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert {"Makefile", "mkdocs.yml", "docs/evidence.md", "tests/test_docs.py", "tools/evidence.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]


def test_without_pytorch_a_wheel_is_pure_python(tmp_path, sdist):
    """What `pip install` does: an environment with setuptools alone, and a compiler or not."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    link(importlib.metadata.distribution("setuptools"), site)
    code = f"import setuptools.build_meta as backend; backend.build_wheel({str(tmp_path)!r})"
    run(tmp_path / "venv" / "bin" / "python", "-c", code, cwd=source, VKD_KERNELS_BUILD="auto")
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    reason = record_and_names(wheel)[0]["reason"]
    assert "torch" in reason if COMPILES else "compiler" in reason


def test_an_editable_build_removes_the_extension_of_an_earlier_one(tmp_path, sdist):
    """Where the new build has none, or its compiler fails, the record would be another's."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    earlier = source / "vkd_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    earlier.touch()
    code = f"import setuptools.build_meta as backend; backend.build_editable({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=source, VKD_KERNELS_BUILD="0")
    record = json.loads((source / "vkd_kernels" / "_build.json").read_text())
    assert record == {"build": "python", "reason": "VKD_KERNELS_BUILD=0 at installation"}
    assert not earlier.exists()


# Each record in a process of its own, forked once PyTorch is imported.
ONE_LOSS_WITH_EACH_RECORD = """
import os, pathlib, sys, torch
for record in ('{"build": "cu', "", "[]"):
    pathlib.Path("vkd_kernels/_build.json").write_text(record)
    process = os.fork()
    if process:
        assert os.waitpid(process, 0)[1] == 0, record
        continue
    import vkd_kernels as vk
    loss = vk.OrthoProjLoss(3, 7)(torch.randn(9, 3, requires_grad=True), torch.randn(9, 7))
    loss.backward()
    assert loss.isfinite() and vk.__file__.startswith(os.getcwd()), vk.__file__
    assert "reinstall the package" in vk.info()["extension"]["missing"], vk.info()
    sys.exit()
"""


def test_a_damaged_build_record_is_a_reason_and_no_error(tmp_path):
    """A disk that was full during the installation."""
    shutil.copytree(ROOT / "vkd_kernels", tmp_path / "vkd_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    result = processes.run_python("-c", ONE_LOSS_WITH_EACH_RECORD, cwd=tmp_path, seconds=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory, sdist):
    """Pure Python, of this tree; and with the extension, of the sdist, where there is a compiler. By backend."""
    stale = ROOT / "build" / "lib" / "vkd_kernels" / "renamed_since.py"  # of an earlier build
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    built = {"torch": build_wheel(tmp_path_factory.mktemp("pure"), VKD_KERNELS_BUILD="0")}
    if implementations.extension()[0] is not None:
        built["extension"] = build_wheel(tmp_path_factory.mktemp("compiled"), sdist, VKD_KERNELS_BUILD="auto")
    return built


def record_and_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("vkd_kernels/_build.json")), archive.namelist()


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.mark.slow
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


@pytest.mark.slow
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
    installed, waiting = {}, [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist")]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if name not in installed and wanted:
            installed[name] = importlib.metadata.distribution(name)
            assert requirement.specifier.contains(installed[name].version, prereleases=True), requirement
            waiting += [Requirement(line) for line in installed[name].requires or ()]
    return installed.values()


def clean_environment(folder, wheel):
    """A virtual environment of its own with the wheel installed. What the wheel declares to need is on its path by
    links to this environment's, so that nothing is downloaded; nothing else is, neither the working tree nor an extra.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    links = folder.with_name("links")  # not among the environment's own packages: pip must not think that it owns them
    links.mkdir()
    for distribution in needed(wheel):
        link(distribution, links)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{links}\n")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-compile", wheel]
    run(*command)
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
assert set(called) <= set(vk.__all__) and all(hasattr(vk, name) for name in vk.__all__)
for name in ("functional", "diagnostics"):
    assert set(called[name]) == set(getattr(vk, name).__all__)
served_by = called["info"]["ops"]["cayley"]["cpu"]["served_by"][0]["implementation"]
assert served_by == {{"torch": "reference"}}.get({backend!r}, {backend!r})
print(vk.__file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "extension"])
def test_every_public_name_works_in_a_clean_environment(tmp_path, wheels, backend):
    if backend not in wheels:
        pytest.skip("no compiler here: the installed package has no extension either")
    python = clean_environment(tmp_path / "venv", wheels[backend])
    result = run(python, "-W", "ignore", "-c", USE_EVERYTHING.format(backend=backend), cwd=tmp_path)
    assert result.stdout.startswith(str(tmp_path / "venv"))
    if backend == "torch":
        output = run(python.with_name("vkd"), "info", cwd=tmp_path).stdout
        assert "VKD_KERNELS_BUILD=0 at installation" in output
        command = [python.with_name("vkd"), "distill"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 2, result.stderr
        assert re.match(r"vkd: error: \w+ is missing: pip install 'vkd_kernels\[recipes\]'", result.stderr)
