"""How kernels are launched: by keyword, through the compiled kernel that is kept for arguments of the same kind.

Triton's own ``kernel[grid](...)`` works out, for some forty arguments, which compiled kernel serves them. A ``Launch``
does so for those that can differ between calls of one shape. benchmarks/results/cpu/host_time.json has the times.
"""

import contextlib
import functools
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ...tf32 import tf32_allowed
from .tiles import Chip

# Triton 3.10 changes the default of fp_fusion; the accuracy that the tests hold is that of fused multiply-add.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
INT32_MAX = 2**31 - 1
FARTHEST_ROWS = INT32_MAX // 256  # elements between rows, of which a tile has up to 256


class Launch:
    """A kernel with the arguments that are the same for every call of one shape; the others come with the call.

    ``prepared`` makes one and keeps it. ``bind`` takes tensors that several calls share::

        launch = prepared(loss_tile, S=s, T=t, ..., BLOCK_N=128, num_warps=8, num_stages=3).bind(student=student, ...)
        for first_row in range(0, n, chunk):
            launch(grid, first_row=first_row, last_row=first_row + chunk)
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = {
            name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants
        } | OPTIONS
        self.constants = constants
        self.compiled: dict[tuple[Any, ...], Any] = {}  # by the kinds of the other arguments
        self.index = {name: index for index, name in enumerate(kernel.arg_names)}
        self.values = [constants.get(name) for name in kernel.arg_names]

    def bind(self, **arguments: Any) -> "BoundLaunch":
        return BoundLaunch(self, arguments)

    def __call__(self, grid: tuple[int, ...], **arguments: Any) -> None:
        BoundLaunch(self, arguments)(grid)


class BoundLaunch:
    """A Launch with arguments that its calls share."""

    def __init__(self, launch: Launch, arguments: dict[str, Any]) -> None:
        self.launch, self.arguments = launch, arguments
        self.values = launch.values.copy()
        self.kinds = self._set(arguments)

    def _set(self, arguments: dict[str, Any]) -> list[Any]:
        """Puts the arguments at their places; their kinds, what Triton's choice of a compiled kernel depends on."""
        values, index, kinds = self.values, self.launch.index, []
        for name, value in arguments.items():
            values[index[name]] = value
            kinds.append(None if value is None else KINDS.get(type(value), _other_kind)(value))
        return kinds

    def __call__(self, grid: tuple[int, ...], **arguments: Any) -> None:
        launch = self.launch
        if 0 in grid:
            return
        if recorder is not None:
            recorder(launch.kernel, launch.constants | self.arguments | arguments, launch.options)
        elif not _keeps_compiled_kernels():
            launch.kernel[grid](**launch.constants, **self.arguments, **arguments, **launch.options)
        else:
            key = (_device(), *self.kinds, *self._set(arguments))
            compiled = launch.compiled.get(key)
            if compiled is None:
                every = {**launch.constants, **self.arguments, **arguments, **launch.options}
                launch.compiled[key] = launch.kernel[grid](**every)
            else:
                compiled[(*grid, 1, 1)[:3]](*self.values)


@functools.lru_cache(maxsize=4096)
def prepared(kernel: Any, **constants: Any) -> Launch:
    """A Launch of the kernel; constants have num_warps and num_stages besides the kernel's own arguments."""
    return Launch(kernel, constants)


recorder: Any = None  # in tests: called with (kernel, arguments, options) of every launch in its place


def _device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


# The kind of an argument is what Triton's choice of a compiled kernel depends on, or more.


def _tensor_kind(value: torch.Tensor) -> Any:
    return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype, "unaligned")


def _int_kind(value: int) -> Any:
    return value == 1, value % 16 == 0, -INT32_MAX <= value <= INT32_MAX


def _float_kind(value: float) -> Any:
    return float


def _descriptor_kind(value: TensorDescriptor) -> Any:
    return value.base.dtype, *value.block_shape


def _tuple_kind(value: tuple[Any, ...]) -> Any:
    return tuple(KINDS.get(type(entry), _other_kind)(entry) for entry in value)


def _other_kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):  # of a class that adds methods
        return _tensor_kind(value)
    raise TypeError(f"a kernel's argument that changes between calls can't be {value!r:.100}")


KINDS: dict[type, Any] = {
    torch.Tensor: _tensor_kind,
    torch.nn.Parameter: _tensor_kind,
    TensorDescriptor: _descriptor_kind,
    int: _int_kind,
    float: _float_kind,
    tuple: _tuple_kind,
}


@functools.cache
def _keeps_compiled_kernels() -> bool:
    """On AMD a compiled kernel also depends on the sizes of tensors, and the interpreter compiles nothing."""
    return not triton.knobs.runtime.interpret and driver.active.get_current_target().backend == "cuda"


_STAY = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' own."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _STAY
    return torch.cuda.device(device)


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def unit_stride(matrix: torch.Tensor) -> torch.Tensor:  # (N, C)
    """The matrix, or a copy with consecutive channels and with rows near enough for 32-bit offsets in a tile."""
    if matrix.is_contiguous():
        return matrix
    if matrix.stride(-1) == 1 and matrix.shape[1] <= matrix.stride(0) <= FARTHEST_ROWS:
        return matrix
    return matrix.contiguous()


def dense(vectors: torch.Tensor | None) -> torch.Tensor | None:  # (C,) or (G, C)
    """What kernels read with no stride of its own: the tensor, or a copy one value after the other."""
    return None if vectors is None else vectors.contiguous()


def row_stride(weight: torch.Tensor) -> int:
    """Elements between the rows of (T, S), or of a contiguous (G, T, S), whose own strides say nothing where T = 1."""
    return weight.stride(0) if weight.dim() == 2 else weight.shape[-1]


def aligned(*matrices: torch.Tensor) -> bool:
    """Whether every row starts on a 16-byte boundary, as tensor descriptors need it."""
    return all(m.data_ptr() % 16 == 0 and m.stride(0) * m.element_size() % 16 == 0 for m in matrices)


def descriptor(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def precision(dtype: torch.dtype, chip: Chip) -> str:
    """float32 products are IEEE unless PyTorch's setting allows TF32."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() and chip.has_tf32 else "ieee"


def group_rows(rows: list[int]) -> tuple[int, ...] | None:
    """The kernels' argument of that name, for the number of rows of each loss of a group; None for one loss.

    Numbers that are 1 or a multiple of 16 would each be compiled for, and batches of images differ in their rows:
    2 n + 1 is neither.
    """
    return None if len(rows) == 1 else tuple(2 * n + 1 for n in rows)
