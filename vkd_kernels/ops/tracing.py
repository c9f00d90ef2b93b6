"""What torch.compile is told of functions. torch.compiler has the same decorators, but each imports torch._dynamo at
once: `import vkd_kernels` would take nearly twice its time and 160 MiB more, in every worker process of a DataLoader.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """torch.compiler.assume_constant_result: called while tracing, and what it returns is a constant of the graph."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# torch.compiler.disable as PyTorch's optimizers use it, or itself where a version has no such name.
not_traced = getattr(torch, "_disable_dynamo", torch.compiler.disable)
