"""Builds the extension vkd_kernels._C by driving CMakeLists.txt with Ninja; everything else is in pyproject.toml.

VKD_KERNELS_BUILD says what to build:
    auto (default)  C++ where a compiler, PyTorch and the build tools are there, with CUDA where nvcc fits that PyTorch;
                    else pure Python, which needs none of them
    cuda | cpu      C++ with or without CUDA; an error says what is missing
    0               pure Python
TORCH_CUDA_ARCH_LIST chooses the GPU architectures (CMakeLists.txt has the default). The outcome and its reason are
kept in vkd_kernels/_build.json, where vkd_kernels.info() finds them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "cuda", "cpu", "0")
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}


class Plan(NamedTuple):
    build: str  # "cuda", "cpu" or "python"
    reason: str | None  # why not more than that
    nvcc: Path | None = None


def why_it_cannot_compile(command: list[str], suffix: str, source: str) -> str | None:
    """The last line of what a compiler says of a few lines of source, or None when it compiles them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"probe{suffix}")
        path.write_text(source)
        try:
            result = subprocess.run(
                [*command, "-c", path, "-o", path.with_suffix(".o")], capture_output=True, text=True
            )
        except OSError as error:
            return str(error)
        if result.returncode == 0:
            return None
        said = (result.stderr.strip() or result.stdout.strip()).replace(f"{folder}{os.sep}", "")
        errors = [line for line in said.splitlines() if "error" in line]
        return (errors or said.splitlines() or [f"exit status {result.returncode}"])[0]


def cpp_compiler() -> str | None:
    """The C++ compiler that CMake will choose: CXX, or the first one on PATH."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def why_no_cpp() -> str | None:
    """The reason why C++20 can't be compiled against this Python's headers, or None."""
    compiler = cpp_compiler()
    if not compiler or not shutil.which(compiler.split()[0]):
        return "no C++ compiler was found (looked for CXX, c++, g++, clang++)"
    command = [*compiler.split(), "-std=c++20", f"-I{sysconfig.get_path('include')}"]
    reason = why_it_cannot_compile(command, ".cpp", "#include <Python.h>\n#include <concepts>\n")
    return reason and f"{compiler} can't compile C++20 with Python.h: {reason}"


def why_no_build_tools() -> str | None:
    """The reason why an extension of PyTorch can't be built in this environment, or None."""
    missing = [module for module in ("torch", "pybind11") if importlib.util.find_spec(module) is None]
    missing += [tool for tool in ("cmake", "ninja") if program(tool) is None]
    cmake = program("cmake")
    if cmake and not missing:
        return why_no_cmake(cmake)
    return (
        f"{', '.join(missing)} can't be found where the package is built: to have the extension, install them and the "
        "package with pip install --no-build-isolation"
    )


def why_no_cmake(command: str) -> str | None:
    """The reason why the installed CMake can't read CMakeLists.txt, or None."""
    try:
        said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{command} can't be run: {error}"
    needed = re.search(r"cmake_minimum_required\(VERSION (\d+)\.(\d+)", (ROOT / "CMakeLists.txt").read_text())
    version = re.search(r"version (\d+)\.(\d+)", said)
    if version is None or needed is None:
        return f"{command} --version names no version"
    if (int(version[1]), int(version[2])) < (int(needed[1]), int(needed[2])):
        return f"{command} is version {version[1]}.{version[2]} and {needed[1]}.{needed[2]} is needed"
    return None


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((Path(path) for path in candidates if path and Path(path).exists()), None)


def why_no_cuda(nvcc: Path | None) -> str | None:
    """The reason why CUDA sources can't be compiled for the installed PyTorch, or None."""
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if nvcc is None:
        return "nvcc was not found (looked in CUDA_HOME, PATH and /usr/local/cuda)"
    try:
        version = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{nvcc} can't be run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        return f"{nvcc} --version names no release"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release[1]}.{release[2]} and PyTorch was built with CUDA {torch.version.cuda}"
    host = os.environ.get("CUDAHOSTCXX")  # as CMake takes it
    command = [str(nvcc), "-std=c++17", *(["-ccbin", host] if host else [])]
    reason = why_it_cannot_compile(command, ".cu", "__global__ void kernel() {}\n")
    return reason and f"{nvcc} can't compile: {reason}"


def plan() -> Plan:
    mode = os.environ.get("VKD_KERNELS_BUILD", "auto").lower()
    if mode not in MODES:
        raise SystemExit(f"VKD_KERNELS_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
    if mode == "0":
        return Plan("python", "VKD_KERNELS_BUILD=0 at installation")
    reason = why_no_cpp() or why_no_build_tools()
    if reason and mode != "auto":
        raise SystemExit(f"VKD_KERNELS_BUILD={mode}, but {reason}")
    if reason:
        return Plan("python", reason)
    if mode == "cpu":
        return Plan("cpu", "VKD_KERNELS_BUILD=cpu at installation")
    nvcc = find_nvcc()
    reason = why_no_cuda(nvcc)
    if reason and mode == "cuda":
        raise SystemExit(f"VKD_KERNELS_BUILD=cuda, but {reason}")
    return Plan("cpu", reason) if reason else Plan("cuda", None, nvcc)


def build_folder(planned: Plan, torch_version: str) -> Path:
    """One per PyTorch, plan and compilers: CMake keeps those of its first run, and objects must not be stale."""
    cpp = cpp_compiler() or "c++"
    compilers = (cpp, shutil.which(cpp.split()[0]), os.environ.get("CUDAHOSTCXX"), planned.nvcc)
    key = hashlib.sha256(repr(compilers).encode()).hexdigest()[:8]
    python = f"py{sys.version_info[0]}{sys.version_info[1]}"
    return ROOT / "build" / f"{planned.build}-torch{torch_version}-{python}-{key}"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        build = build_folder(PLAN, torch.__version__)
        cmake, ninja = program("cmake"), program("ninja")
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_INCLUDE_DIRS": ";".join(include_paths()),
            "TORCH_LIBRARY_DIRS": ";".join(library_paths()),
            "TORCH_VERSION": torch.__version__,
            "TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
            "VKD_WITH_CUDA": "ON" if PLAN.build == "cuda" else "OFF",
        }
        if PLAN.nvcc:
            definitions["CMAKE_CUDA_COMPILER"] = PLAN.nvcc
            definitions["CUDAToolkit_ROOT"] = PLAN.nvcc.parent.parent
        options = [f"-D{name}={value}" for name, value in definitions.items()]
        subprocess.check_call([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *options])
        subprocess.check_call([cmake, "--build", build])


def program(name: str) -> str | None:
    """A tool's path: beside this Python (as pip installs it), on PATH, or among the user's own scripts."""
    user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path(), user]))


class BuildPy(build_py):
    """Leaves the record of what was built, and why not more, beside the package's Python files."""

    def run(self) -> None:
        if self.editable_mode:  # an earlier build's extension would stay where this one has none, or fails to compile
            extension = ROOT / "vkd_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
            extension.unlink(missing_ok=True)
        else:  # an earlier build's modules would end in the wheel, renamed since or not
            shutil.rmtree(Path(self.build_lib) / "vkd_kernels", ignore_errors=True)
        super().run()
        record = {"build": PLAN.build, "reason": PLAN.reason}
        if PLAN.build != "python":
            import torch

            record["torch"] = torch.__version__
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "vkd_kernels"
        package.mkdir(parents=True, exist_ok=True)
        part = package / "_build.json.part"
        part.write_text(json.dumps(record) + "\n")
        part.replace(package / "_build.json")  # in one step: an installation that is cut short leaves no half record


PLAN = plan() if BUILD_COMMANDS & set(sys.argv) else Plan("python", None)
if PLAN.reason:
    print(f"vkd_kernels: {PLAN.build} build, because {PLAN.reason}", file=sys.stderr)

setup(
    ext_modules=[] if PLAN.build == "python" else [Extension("vkd_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
