"""Where a training runs: Lightning Fabric on one device or as one of torchrun's ranks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

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
