"""One training, for all tasks: an explicit loop on Lightning Fabric. `Loop.fit` is the part to read and to copy.

Fabric moves the model to its device, wraps it for data-parallel ranks and runs it in mixed precision; it owns no loop.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.plugins.precision import MixedPrecision
from lightning_fabric.strategies import DDPStrategy
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from . import runs
from .config import OptionError
from .runs import RunError
from .task import Optim, Run, Task, check_schedule, ranks, seed_all

# ---- where it runs ---------------------------------------------------------------------------------------------------


class Autocast(MixedPrecision):
    """Fabric's mixed precision, but batches keep their precision: a box or a stored feature is no activation."""

    def convert_input(self, data: Any) -> Any:
        return data


def device_of(run: Run) -> str:
    """ "cuda" or "cpu"; an error where the options ask for what is not there."""
    there = torch.cuda.is_available()
    if run.accelerator == "cuda" and not there:
        raise OptionError("run.accelerator: cuda, but PyTorch sees no GPU; use run.accelerator=cpu or auto")
    return "cuda" if there and run.accelerator != "cpu" else "cpu"


def make_fabric(run: Run, optim: Optim, *, unused_parameters: bool = False) -> Fabric:
    """A launched Fabric: one device, or one of torchrun's ranks, which wait for one another in their first one."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    device, alone = device_of(run), ranks() == 1
    plugins: list[Any] = [LightningEnvironment()] if alone else []  # one process: whatever else started it
    if optim.precision != "32-true":
        plugins.append(Autocast(optim.precision, device=device))
    local = 1 if alone else int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=1 if alone else ranks() // local,
        plugins=plugins,
        strategy="auto" if alone else DDPStrategy(find_unused_parameters=unused_parameters),
    )
    fabric.launch()
    return fabric


def progress(**options: Any) -> tqdm:
    """A bar that fills no log file."""
    return tqdm(mininterval=0.2 if sys.stderr.isatty() else 15, **options)


# ---- the loop --------------------------------------------------------------------------------------------------------


def train(task: Task, *, weights: str = "student.safetensors") -> dict[str, Any]:
    """Train, or continue, in the task's folder; returns and leaves there result.json. Done already: only reads it."""
    result = task.context.folder / "result.json"
    if result.exists():
        return runs.load(result)
    seed_all(task.seed)  # the same initial weights in every arm: the student is built first
    task.student = task.make_student()
    task.model = task.make_model(task.student)
    check_schedule(task.optim, task.steps)
    return Loop(task, weights).fit()


def moving_average(student: nn.Module, optim: Optim) -> ModelEmaV3:
    """timm's. It copies at the steps 0 to update_after_step + 1, and those of ours are 0 to ema_start - 1."""
    start = optim.ema_start
    return ModelEmaV3(student, decay=optim.ema, use_warmup=not start, update_after_step=start - 2 if start else 0)


class Loop:
    """The state of one training. Tasks' `step` sees `model` (wrapped) and `apply`."""

    COUNTERS = ("step", "seconds", "cpu_seconds", "records")  # what a checkpoint holds beside the states of `parts`

    def __init__(self, task: Task, weights: str) -> None:
        self.task, self.options, self.context, self.fabric = task, task.config.run, task.context, task.fabric
        folder, optim = self.context.folder, task.optim
        self.checkpoint, self.weights, self.log_path = (folder / x for x in ("checkpoint.pt", weights, "metrics.jsonl"))
        if self.fabric.world_size > 1 and self.fabric.device.type == "cuda":
            convert_sync_batchnorm(task.model)
        self.model: Any = self.fabric.setup_module(task.model)
        self.raw_optimizers = task.optimizers()
        self.optimizers = {name: self.fabric.setup_optimizers(o) for name, o in self.raw_optimizers.items()}
        self.ema = moving_average(task.student, optim) if optim.ema else None
        self.student: nn.Module = self.ema.module if self.ema else task.student  # what is evaluated and stored
        self.parts: dict[str, Any] = {"model": task.model, **self.raw_optimizers}
        self.parts |= {"ema": self.student} if self.ema else {}
        self.step = 0
        self.seconds = self.cpu_seconds = 0.0  # of the steps alone: no evaluation, no checkpoints
        self.records: list[dict[str, float]] = []  # the lines of metrics.jsonl

    def fit(self) -> dict[str, Any]:
        task, options, rank = self.task, self.options, self.fabric.global_rank
        if self.checkpoint.exists():
            self.load()
        if rank == 0:  # as of the checkpoint, which holds its lines: what came later, or is damaged, is gone
            runs.write_text(self.log_path, "".join(json.dumps(record) + "\n" for record in self.records))
        steps, batches = task.steps, iter(task.batches(self.step))
        name = f"{self.context.folder.parent.name} {task.seed}"
        bar = progress(total=steps, initial=self.step, desc=name, unit="step", disable=self.context.quiet)
        self.model.train()
        while self.step < steps:
            wall, cpu = time.perf_counter(), time.process_time()
            batch = next(batches)
            seed_all(self.context.seed, self.step, rank)  # dropout and the like
            for optimizer in self.raw_optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = group.setdefault("peak_lr", group["lr"]) * task.optim.rate(self.step, steps)
            losses = task.step(self, batch)
            if self.ema:
                self.ema.update(task.student, step=self.step)
            self.step += 1
            self.seconds += time.perf_counter() - wall
            self.cpu_seconds += time.process_time() - cpu
            bar.update()
            last = self.step == steps
            if last or self.step % options.log_every == 0:
                self.log_losses(losses)
            if last or (options.eval_every and self.step % options.eval_every == 0):
                self.validate(last)
            if not last and self.step % options.save_every == 0:
                self.save()
        bar.close()
        return self.finish()

    def apply(self, name: str) -> None:
        """Clip, step and clear the gradients of one optimizer."""
        optimizer = self.optimizers[name]
        if norm := self.task.optim.clip_norm:
            self.fabric.clip_gradients(self.model, optimizer, max_norm=norm, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()

    def validate(self, last: bool) -> None:
        self.student.eval()
        if self.fabric.world_size > 1:  # batch norms of CPU ranks have statistics of their own
            for buffer in self.student.buffers():
                of_the_first = buffer.contiguous()
                torch.distributed.broadcast(of_the_first, src=0)
                buffer.copy_(of_the_first)
        if self.ema:
            self.check_weights()  # singular vectors of weights that are not finite would be another error
            self.task.renew_buffers(self.student)
        with torch.no_grad(), self.fabric.autocast():
            metrics = self.task.evaluate(self.student)
            if last and self.fabric.is_global_zero:
                self.task.pictures(self.student, self.context.folder / "figures")
        self.model.train()
        line = {f"eval/{name}": value for name, value in metrics.items()}
        self.log(line | {f"diagnostics/{name}": value for name, value in self.task.diagnostics().items()})

    # ---- the log -----------------------------------------------------------------------------------------------------

    def log(self, line: Mapping[str, float]) -> None:
        self.records.append({"step": self.step, "seconds": self.seconds, **line})
        if self.fabric.is_global_zero:
            with runs.writing(self.log_path), open(self.log_path, "a") as file:
                file.write(json.dumps(self.records[-1]) + "\n")

    def log_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Those of this step, on this rank."""
        self.check_finite(losses, "loss")
        line = {f"train/{name}": loss.item() for name, loss in losses.items()}
        one = len(self.raw_optimizers) == 1
        self.log(line | {"lr" if one else f"lr/{k}": o.param_groups[0]["lr"] for k, o in self.raw_optimizers.items()})

    # ---- what stays --------------------------------------------------------------------------------------------------

    def check_finite(self, values: Mapping[str, Tensor], what: str) -> None:
        """Nothing of a training that has gone wrong is stored: the last checkpoint is from before."""
        for name, value in values.items():
            if value.is_floating_point() and not value.isfinite().all():
                where = f"{self.context.folder}: step {self.step}"
                lower = f"lower {self.task.rate_option} or raise optim.warmup"
                raise RunError(f"{where}: the {what} {name!r} is not finite; {lower}")

    def check_weights(self) -> None:
        for module in (self.task.model, self.student):
            self.check_finite(module.state_dict(), "weight")

    def save(self) -> None:
        """Everything that must continue; nothing random is in it, because every step is seeded."""
        self.check_weights()
        if self.fabric.is_global_zero:
            saved: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
            runs.save_tensors(self.checkpoint, saved | {name: getattr(self, name) for name in self.COUNTERS})
        self.fabric.barrier()

    def load(self) -> None:
        saved = runs.load(self.checkpoint)
        for name, part in self.parts.items():
            runs.load_state(part, saved.get(name), f"{self.checkpoint}: {name}")
        for name in self.COUNTERS:
            setattr(self, name, saved[name])

    def finish(self) -> dict[str, Any]:
        """Weights first, the result last: a folder with a result.json is complete."""
        self.check_weights()
        key = f"eval/{self.task.metric.key}"
        measured = [record for record in self.records if key in record]
        last = measured[-1]
        result = {
            "arm": self.context.folder.parent.name,
            "seed": self.task.seed,
            "steps": self.step,
            **{name[5:]: value for name, value in last.items() if name.startswith("eval/")},
            "diagnostics": {name[12:]: value for name, value in last.items() if name.startswith("diagnostics/")},
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "curve": [(record["step"], record[key]) for record in measured],
        }
        if self.fabric.is_global_zero:
            runs.save_safetensors(self.weights, self.student.state_dict())
            runs.save_json(self.context.folder / "result.json", result)
            self.checkpoint.unlink(missing_ok=True)
        self.fabric.barrier()
        return result
