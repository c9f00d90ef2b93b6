"""The loss over the ranks of a process group, and whether they train the same projection."""

import math

import torch
import torch.distributed as dist

from ..normalization.all_reduce import global_loss

DRIFTED = 1e-3  # of the weight's root mean square


class RankAgreement:
    """Asks now and then whether the ranks of a group hold the same weight; a module keeps one for each of its losses.

    A checksum rides in the collective that adds up the loss: at the first call, the 2nd, 4th, ... 64th, and then every
    64th. Only those calls wait for the device. Under torch.compile and in a CUDA graph's capture, which can't wait, the
    ranks are not asked.
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
    weight: torch.Tensor,  # (..., T, S)
    process_group: "dist.ProcessGroup | None",
    agreement: RankAgreement | None,
) -> torch.Tensor:
    """The sum of the ranks' shares, on every rank, in one collective; an error where their weights differ."""
    if process_group is None or agreement is None:
        return global_loss(share, process_group)
    asks = agreement.due(weight)
    mine = checksum(weight).to(share.dtype) if asks else share.new_zeros(3)  # a collective's size is the same on all
    total = global_loss(torch.cat([share.reshape(-1), mine]), process_group)
    losses, sums = total[: share.numel()].view(share.shape), total[share.numel() :].detach()
    if asks:
        _compare(mine, sums, dist.get_world_size(process_group))
    return losses


@torch.no_grad()
def checksum(weight: torch.Tensor) -> torch.Tensor:  # (..., T, S) -> (3,)
    """(1, uᵀ W v for fixed unit vectors u and v, the root mean square of W)."""
    matrix = weight.reshape(-1, weight.shape[-1]).float()
    u, v = (torch.arange(1, n + 1, device=matrix.device, dtype=torch.float32).sin() for n in matrix.shape)
    value = (matrix @ (v / v.norm())).dot(u / u.norm())
    return torch.stack([torch.ones_like(value), value, matrix.square().mean().sqrt()])


def _compare(mine: torch.Tensor, sums: torch.Tensor, ranks: int) -> None:
    """An error if this rank's checksum is not the mean of all ranks'; nothing unless all of them were asked."""
    (_, value, size), (asked, total, _) = mine.tolist(), sums.tolist()
    if asked != ranks or math.isnan(total):
        return
    if abs(value - total / ranks) > DRIFTED * size:
        raise RuntimeError(
            f"the projections of the {ranks} ranks of process_group differ (checksum {value:.6g} on this rank, "
            f"{total / ranks:.6g} on average): the gradients of the loss's own parameters are not reduced over the "
            "ranks, or the ranks started from different ones. Put student and loss into one module and wrap that, or "
            "wrap the loss too: DistributedDataParallel(loss), or fully_shard(loss)"
        )
