"""Sums over the ranks of a process group, as autograd sees them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..checks import describe


class _AllReduceSum(torch.autograd.Function):
    """y = Σ over ranks of x; every rank's y depends on every rank's x, so the gradient is a sum over ranks too.

    ``trained`` has no part in the sum: the backward pass comes by here where it needs a gradient, as if y were of it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, trained: torch.Tensor | None) -> torch.Tensor:
        ctx.group = group
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _AllReduceSum.apply(grad, ctx.group, None), None, None


class _GlobalLoss(torch.autograd.Function):
    """y = Σ over ranks of x for a loss: a rank's gradient is scaled by the number of ranks, without communication, so
    that the average that DDP takes of the parameters' gradients is the gradient of the global loss."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.size = dist.get_world_size(group)
        y = x.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.size, None


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup | None, trained: torch.Tensor | None = None) -> torch.Tensor:
    """Σ over the ranks of ``group`` of ``x`` (``x`` itself for ``group=None``), differentiable: for statistics.

    The backward pass has a collective where ``x`` or ``trained`` requires a gradient. All ranks must agree in that:
    where one rank's ``x`` may have no graph, ``trained`` is to be ``with_gradient`` of what they train.
    """
    return x if group is None else _AllReduceSum.apply(x, group, trained)


def all_reduce_several(
    tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None, trained: torch.Tensor | None = None
) -> Sequence[torch.Tensor]:
    """all_reduce of several tensors of one dtype, all in one collective."""
    if group is None:
        return tensors
    flat = torch.cat([x.reshape(-1) for x in tensors])
    sums = all_reduce(flat, group, trained).split([x.numel() for x in tensors])
    return [flat.view(x.shape) for flat, x in zip(sums, tensors, strict=True)]


def with_gradient(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """``x`` requiring a gradient on every rank that records gradients, so that none waits for another's collective.

    A rank's features have no graph where its student is frozen in this step, or an optional pair was skipped.
    """
    if group is None or x.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x  # torch.compile can't make leaves in a graph
    return x.detach().requires_grad_()


def global_loss(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Σ over the ranks of ``group`` of the local shares ``x`` of a loss (``x`` itself for ``group=None``)."""
    return x if group is None else _GlobalLoss.apply(x, group)


def check_group(group: object) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be None or a torch.distributed.ProcessGroup; got {describe(group)}")


class GroupHandle:
    """Keeps a group from being copied and pickled with its module."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupHandle":
        return self

    def __reduce__(self) -> tuple[type["GroupHandle"], tuple[()]]:
        return GroupHandle, ()


class HasProcessGroup:
    """A module's ``process_group``. It stays with copies of the module and does not travel with pickles: a group is of
    its process, so a module unpickled elsewhere computes the statistics of its own rows until it is given one."""

    _group_handle = GroupHandle()  # read before a constructor sets one

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return self._group_handle.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._set_group(group)

    def _set_group(self, group: dist.ProcessGroup | None) -> None:
        """In constructors: assigned, a module given by mistake would become a submodule instead of an error."""
        check_group(group)
        self._group_handle = GroupHandle(group)


def share_group(module: object, group: dist.ProcessGroup | None, *, before: dist.ProcessGroup | None) -> None:
    """Gives a loss's group to what makes its targets, if that has statistics and the group that the loss had before.

    A module with another group has it from the user, and keeps it.
    """
    if isinstance(module, HasProcessGroup) and module.process_group is before:
        module.process_group = group
