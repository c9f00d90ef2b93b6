"""What runs a function: torch.compile, which is told of some, or a backward pass that computes it again.

torch.compiler has the decorators, too, but each imports torch._dynamo at once: `import vkd_kernels` would take nearly
twice its time and 160 MiB more, in every worker process of a DataLoader.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """torch.compiler.assume_constant_result: called while tracing, and what it returns is a constant of the graph."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_recomputation() -> bool:
    """Whether a backward pass is running, inside of which activation checkpointing computes a forward pass again.

    What counts steps or batches has counted this one. In a compiled graph it is always False.
    """
    if torch.compiler.is_compiling():
        return False
    task = getattr(torch._C, "_current_graph_task_id", None)  # private, but torch.utils.checkpoint goes by it
    return task is not None and task() != -1


# torch.compiler.disable as PyTorch's optimizers use it, or itself where a version has no such name.
not_traced = getattr(torch, "_disable_dynamo", torch.compiler.disable)
