"""Where a training runs: Lightning Fabric on one device or as one of torchrun's ranks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vkd_kernels.functional import standardize

from .config import OptionError
from .runs import RunError

# Fabric imports torchmetrics to see its version, and that imports torchvision and transformers: seconds per process.
_HIDDEN = "torchmetrics" not in sys.modules
if _HIDDEN:
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]
from lightning_fabric import Fabric  # noqa: E402
from lightning_fabric.plugins.environments import LightningEnvironment  # noqa: E402
from lightning_fabric.plugins.precision import MixedPrecision  # noqa: E402
from lightning_fabric.strategies import DDPStrategy  # noqa: E402

if _HIDDEN:
    del sys.modules["torchmetrics"]

if TYPE_CHECKING:
    from .engine import Optim, Run

T = TypeVar("T")


class Autocast(MixedPrecision):
    """Fabric's mixed precision, but batches keep their precision: a box or a cached feature is no activation."""

    def convert_input(self, data: Any) -> Any:
        return data


def accelerator(run: Run) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if run.accelerator == "auto" else run.accelerator


def make_fabric(run: Run, optim: Optim, *, ranks: int = 1, unused_parameters: bool = False) -> Fabric:
    """A launched Fabric: one device, or one of torchrun's ranks."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    device = accelerator(run)
    plugins: list[Any] = [] if ranks > 1 else [LightningEnvironment()]  # one process: whatever else started it
    if optim.precision == "16-mixed" and device == "cpu":
        raise OptionError("optim.precision: 16-mixed needs a GPU; bf16-mixed works on a CPU")
    if optim.precision != "32-true":
        plugins.append(Autocast(optim.precision, device=device))  # type: ignore[arg-type]
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if ranks > 1 else 1
    fabric = Fabric(
        accelerator=device, devices=local, num_nodes=ranks // local, plugins=plugins,
        strategy=DDPStrategy(find_unused_parameters=unused_parameters) if ranks > 1 else "auto",
    )  # fmt: skip
    fabric.launch()
    return fabric


def on_first_rank(fabric: Fabric | None, action: Callable[[], T]) -> T:
    """What `action` returns on the first rank, for all; a RunError there is an error on all."""
    if fabric is None:
        return action()
    outcome: Any = None
    if fabric.is_global_zero:
        try:
            outcome = True, action()
        except RunError as error:
            outcome = False, str(error)
    good, value = fabric.broadcast(outcome)
    if not good:
        raise RunError(value)
    return value


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Batch norms inside the model take their statistics from the batches of all ranks: as one device with all rows."""
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # PyTorch's own drops the activations inside timm's batch norms

        convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.__class__ = BatchNorm  # type: ignore[assignment]


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What SyncBatchNorm is on GPUs, on a CPU."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:  # (N, C, ...)
        x = self.normalised(x)
        for name in ("drop", "act"):  # timm's BatchNormAct2d has them inside
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x

    def normalised(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        rows = x.movedim(1, -1)
        if self.track_running_stats:
            self.update(rows.detach().flatten(0, -2))
        out = standardize(rows, eps=self.eps, process_group=torch.distributed.group.WORLD)
        return (out * self.weight + self.bias if self.affine else out).movedim(-1, 1)

    def update(self, rows: Tensor) -> None:  # (N, C) of this rank
        sums = torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)]).double()
        torch.distributed.all_reduce(sums)
        count, total, squares = sums
        mean = total / count
        variance = (squares - count * mean.square()) / (count - 1)
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)
