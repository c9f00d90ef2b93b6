"""The loss over the ranks of a process group, and whether they train the same projection."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..normalization.all_reduce import global_loss

DRIFTED = 1e-3  # of a tensor's root mean square


class RankAgreement:
    """Asks now and then whether the ranks hold the same weight, scale and bias; a module keeps one for each loss.

    A checksum rides in the collective that adds up the loss: at the first call, the 2nd, 4th, ... 64th, and then every
    64th. Those calls wait for the device, and for one more collective: the largest difference, so that either all ranks
    raise or none. Under torch.compile and in a CUDA graph's capture, which can't wait, the ranks are not asked.
    """

    def __init__(self) -> None:
        self.calls = 0

    def due(self, weight: torch.Tensor) -> bool:
        """Whether this call asks; counts the call."""
        if torch.compiler.is_compiling() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        self.calls += 1
        return self.calls % 64 == 0 or (self.calls < 64 and self.calls & (self.calls - 1) == 0)


def all_ranks_loss(
    share: torch.Tensor,  # () or (G,): of the rows of this rank
    trained: Mapping[str, Any],  # what the ranks must hold alike, by its name; tensors count alone
    process_group: "dist.ProcessGroup | None",
    agreement: RankAgreement | None,
) -> torch.Tensor:
    """The sum of the ranks' shares, on every rank, in one collective; an error where what they train differs."""
    if process_group is None or agreement is None:
        return global_loss(share, process_group)
    tensors = {name: value for name, value in trained.items() if isinstance(value, torch.Tensor)}
    asks = agreement.due(next(iter(tensors.values())))
    mine = sizes = share.new_zeros(1 + len(tensors))  # a collective's size is the same on all
    if asks:
        values, sizes = (x.to(share.dtype) for x in checksums([*tensors.values()]))
        mine = torch.cat([share.new_ones(1), values])
    total = global_loss(torch.cat([share.reshape(-1), mine]), process_group)
    losses, sums = total[: share.numel()].view(share.shape), total[share.numel() :].detach()
    ranks = dist.get_world_size(process_group)
    if asks and sums[0].item() == ranks:
        _check_alike([*tensors], mine[1:], sizes, sums[1:] / ranks, process_group)
    return losses


def _check_alike(
    names: Sequence[str], values: torch.Tensor, sizes: torch.Tensor, means: torch.Tensor, process_group: Any
) -> None:
    """An error on every rank if any rank's checksum is not the mean of all; a NaN is no difference."""
    differences = torch.nan_to_num((values - means).abs() / sizes, nan=0.0)
    dist.all_reduce(differences, op=dist.ReduceOp.MAX, group=process_group)
    for i, (name, difference) in enumerate(zip(names, differences.tolist(), strict=True)):
        if difference > DRIFTED:
            value, mean = values[i].item(), means[i].item()
            raise RuntimeError(
                f"the {name} of the {dist.get_world_size(process_group)} ranks of process_group differ (checksum "
                f"{value:.6g} on this rank, {mean:.6g} on average): the gradients of the loss's own parameters are not "
                "reduced over the ranks, or the ranks started from different ones. Put student and loss into one "
                "module and wrap that, or wrap the loss too: DistributedDataParallel(loss), or fully_shard(loss)"
            )


@torch.no_grad()
def checksums(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:  # -> (K,), (K,)
    """Of every tensor W (..., C): uᵀ W v for fixed unit vectors u and v, and its root mean square."""
    values, sizes = [], []
    for tensor in tensors:
        matrix = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1).float()
        u, v = (torch.arange(1, n + 1, device=matrix.device, dtype=torch.float32).sin() for n in matrix.shape)
        values.append((matrix @ (v / v.norm())).dot(u / u.norm()))
        sizes.append(matrix.square().mean().sqrt())
    return torch.stack(values), torch.stack(sizes)
