"""Builds the extension vkd_kernels._C by driving CMakeLists.txt with Ninja; everything else is in pyproject.toml.

VKD_KERNELS_BUILD says what to build:
    auto (default)  C++ when there is a compiler, with CUDA when nvcc fits the installed PyTorch; else pure Python
    cuda | cpu      C++ with or without CUDA; an error says what is missing
    0               pure Python
TORCH_CUDA_ARCH_LIST chooses the GPU architectures (CMakeLists.txt has the default). The outcome and its reason are
kept in vkd_kernels/_build.json, where vkd_kernels.info() finds them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "cuda", "cpu", "0")


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((Path(c) for c in candidates if c and Path(c).exists()), None)


def why_no_cuda(nvcc):
    """The reason why CUDA sources can't be compiled for the installed PyTorch, or None."""
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if nvcc is None:
        return "nvcc was not found (looked in CUDA_HOME, PATH and /usr/local/cuda)"
    release = re.search(r"release (\d+)\.(\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release[1]}.{release[2]} and PyTorch was built with CUDA {torch.version.cuda}"
    return None


def why_no_cpp():
    """The reason why C++ can't be compiled, or None."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not shutil.which(compiler.split()[0]):
        return "no C++ compiler was found (looked for CXX, c++, g++, clang++)"
    return None


def missing_build_tools():
    missing = []
    for module in ("torch", "pybind11", "cmake", "ninja"):
        try:
            __import__(module)
        except ImportError:
            if not shutil.which(module):
                missing.append(module)
    return missing


def plan():
    """(what to build: "cuda", "cpu" or "python", the reason for less than was possible, nvcc)."""
    mode = os.environ.get("VKD_KERNELS_BUILD", "auto").lower()
    if mode not in MODES:
        raise SystemExit(f"VKD_KERNELS_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
    if mode == "0":
        return "python", "VKD_KERNELS_BUILD=0 at installation", None
    reason = why_no_cpp()
    if reason:
        if mode != "auto":
            raise SystemExit(f"VKD_KERNELS_BUILD={mode}, but {reason}")
        return "python", reason, None
    missing = missing_build_tools()
    if missing:
        raise SystemExit(
            f"building the extension needs {', '.join(missing)}: install them, or drop --no-build-isolation, "
            "or set VKD_KERNELS_BUILD=0 to install as pure Python"
        )
    if mode == "cpu":
        return "cpu", "VKD_KERNELS_BUILD=cpu at installation", None
    nvcc = find_nvcc()
    reason = why_no_cuda(nvcc)
    if reason and mode == "cuda":
        raise SystemExit(f"VKD_KERNELS_BUILD=cuda, but {reason}")
    return ("cpu", reason, None) if reason else ("cuda", None, nvcc)


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        what, _, nvcc = PLAN
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        # One build folder per PyTorch and plan: a changed environment never meets stale objects.
        build = ROOT / "build" / f"{what}-torch{torch.__version__}-py{sys.version_info[0]}{sys.version_info[1]}"
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_INCLUDE_DIRS": ";".join(include_paths()),
            "TORCH_LIBRARY_DIRS": ";".join(library_paths()),
            "TORCH_VERSION": torch.__version__,
            "TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
            "VKD_WITH_CUDA": "ON" if what == "cuda" else "OFF",
        }
        if nvcc:
            definitions["CMAKE_CUDA_COMPILER"] = nvcc
            definitions["CUDAToolkit_ROOT"] = nvcc.parent.parent
        cmake, ninja = (tool_command(t) for t in ("cmake", "ninja"))
        definitions["CMAKE_MAKE_PROGRAM"] = ninja
        subprocess.check_call(
            [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{k}={v}" for k, v in definitions.items())]
        )
        subprocess.check_call([cmake, "--build", build])


def tool_command(name):
    """The tool's program: the one beside this Python (as pip installs it), or the one on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or sys.exit(f"{name} was not found")


class BuildPy(build_py):
    """Leaves the record of what was built, and why not more, beside the package's Python files."""

    def run(self):
        if not self.editable_mode:  # an earlier build's modules would end in the wheel, renamed since or not
            shutil.rmtree(Path(self.build_lib) / "vkd_kernels", ignore_errors=True)
        super().run()
        what, reason, _ = PLAN
        record = {"build": what, "reason": reason}
        if what != "python":
            import torch

            record["torch"] = torch.__version__
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "vkd_kernels"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(record) + "\n")


PLAN = plan() if {"build_ext", "build", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv) else None
BUILDING = PLAN is not None and PLAN[0] != "python"

setup(
    ext_modules=[Extension("vkd_kernels._C", sources=[])] if BUILDING else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
