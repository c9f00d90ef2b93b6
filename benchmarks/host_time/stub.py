"""Builds stub.c and makes Triton launch through it; for a process of its own, before Triton is used for anything."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("stub.c")


def why_not() -> str | None:
    """The reason why the stub can't be used here, or None."""
    if shutil.which("gcc") is None:
        return "gcc is missing"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton can't be imported: {error}"
    return None


class Stub:
    """Triton's CUDA driver over the stub: tensors on the CPU are taken for tensors of an sm_90 with 132 processors."""

    def __init__(self, capability: int = 90) -> None:
        assert not os.environ.pop("TRITON_INTERPRET", None), "TRITON_INTERPRET must not be set"
        self.folder = tempfile.TemporaryDirectory(prefix="stub-libcuda-")  # it goes with the process
        folder = self.folder.name
        library = f"{folder}/libcuda.so.1"
        command = ["gcc", "-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, str(SOURCE)]
        subprocess.run(command, check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        self.library = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # found by its soname from now on
        shutil.copy(library, f"{folder}/libcuda.so")

        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver

        class Driver(CudaDriver):
            def __init__(self) -> None:
                super().__init__()
                self.get_current_device = lambda: 0
                self.get_current_stream = lambda device: 0
                self.get_device_capability = lambda device=0: divmod(capability, 10)
                self.set_current_device = lambda device: None

            def get_current_target(self) -> Any:
                return GPUTarget("cuda", capability, 32)

        driver.set_active(Driver())

        from vkd_kernels.ops.ortho_proj_loss.triton import tiles

        tiles.chip = lambda device: tiles.Chip("cuda", capability, 132)

    @property
    def launches(self) -> int:
        return self.library.stub_launches()


def without_products() -> None:
    """Library products do nothing: what is left is this package and Triton."""
    from vkd_kernels.ops.ortho_proj_loss.triton import many_rows, semi_orthogonal

    def product(a: Any, b: Any, out: Any = None) -> Any:
        return a.new_empty((a.shape[0], b.shape[1]), dtype=a.dtype) if out is None else out

    for module in (many_rows, semi_orthogonal):
        module.product, module.add_product = product, lambda total, a, b: None
