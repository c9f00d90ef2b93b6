"""Batch norm with statistics of the global batch and, for BigGAN, gains and biases per class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vkd_kernels as vk

MOMENTUM, EPS = 0.1, 1e-5  # PyTorch's


class BatchNorm(nn.Module):
    """BatchNorm2d whose statistics are those of all data-parallel ranks, on a CPU too (SyncBatchNorm needs GPUs).

    With `classes` gain and bias are looked up by each image's label: `forward(x (N, C, H, W), labels (N,))`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, classes: int = 0) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.classes = classes
        self.gain = nn.Parameter(torch.ones(classes or 1, channels))
        self.bias = nn.Parameter(torch.zeros(classes or 1, channels))

    def no_weight_decay(self) -> set[str]:
        return {"gain", "bias"}

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if not self.classes:
            return self.normalised(x, self.gain[0], self.bias[0])
        if labels is None:
            raise ValueError("labels: a class-conditional batch norm needs them")
        gain, bias = (F.embedding(labels, table)[:, :, None, None] for table in (self.gain, self.bias))
        return self.normalised(x) * gain + bias

    def normalised(self, x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed and torch.distributed.get_world_size() > 1):
            return F.batch_norm(x, self.running_mean, self.running_var, gain, bias, self.training, MOMENTUM, EPS)
        rows = x.movedim(1, -1)
        out = vk.functional.standardize(rows, eps=EPS, process_group=torch.distributed.group.WORLD)
        self.update(rows.detach().flatten(0, -2))
        return (out if gain is None or bias is None else out * gain + bias).movedim(-1, 1)

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:  # (N, C) of this rank
        """Running statistics as BatchNorm2d keeps them, of the rows of all ranks."""
        sums = torch.stack([rows.new_full((rows.shape[1],), len(rows)), rows.sum(0), rows.square().sum(0)]).double()
        torch.distributed.all_reduce(sums)
        count, total, squares = sums
        mean = total / count
        variance = (squares - count * mean.square()) / (count - 1)
        self.running_mean.lerp_(mean.to(rows.dtype), MOMENTUM)
        self.running_var.lerp_(variance.to(rows.dtype), MOMENTUM)
