"""One training, for all tasks: an explicit loop on Lightning Fabric. `Loop.fit` is the part to read and to copy.

Fabric moves the model to its device, wraps it for data-parallel ranks and runs it in mixed precision; it owns no loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.plugins.precision import MixedPrecision
from lightning_fabric.strategies import DDPStrategy
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from . import runs
from .config import OptionError
from .runs import RunError
from .task import Optim, Run, Task, seed_all

STOP_EVERY = 10  # steps between two times that ranks ask one another whether to stop


class Interrupted(Exception):
    """The run was asked to stop. Its checkpoints are on disk."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


# ---- where it runs ---------------------------------------------------------------------------------------------------


class Autocast(MixedPrecision):
    """Fabric's mixed precision, but batches keep their precision: a box or a stored feature is no activation."""

    def convert_input(self, data: Any) -> Any:
        return data


def device_of(run: Run, optim: Optim) -> str:
    """ "cuda" or "cpu"; an error where the options ask for what is not there."""
    if run.accelerator == "cuda" and not torch.cuda.is_available():
        raise OptionError("run.accelerator: cuda, but PyTorch sees no GPU; use run.accelerator=cpu or auto")
    device = "cpu" if run.accelerator == "cpu" or not torch.cuda.is_available() else "cuda"
    if optim.precision == "16-mixed" and device == "cpu":
        raise OptionError("optim.precision: 16-mixed needs a GPU; bf16-mixed works on a CPU")
    return device


def ranks() -> int:
    """How many ranks torchrun started, in all."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def make_fabric(run: Run, optim: Optim, *, alone: bool = True, unused_parameters: bool = False) -> Fabric:
    """A launched Fabric: one device, or one of torchrun's ranks."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    device = device_of(run, optim)
    plugins: list[Any] = [LightningEnvironment()] if alone else []  # one process: whatever else started it
    if optim.precision != "32-true":
        plugins.append(Autocast(optim.precision, device=device))  # type: ignore[arg-type]
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


# ---- the loop --------------------------------------------------------------------------------------------------------


def train(task: Task, *, weights: str = "student.safetensors") -> dict[str, Any]:
    """Train, or continue, in the task's folder; returns and leaves there result.json. Done already: only reads it."""
    result = task.context.folder / "result.json"
    if result.exists():
        return runs.load_json(result)
    seed_all(task.seed)  # the same initial weights in every arm: the student is built first
    task.student = task.make_student()
    task.model = task.make_model(task.student)
    return Loop(task, weights).fit()


class Loop:
    """The state of one training. Tasks' `step` sees `model` (wrapped), `apply` and `step`."""

    COUNTERS = ("step", "sums", "counts", "seconds", "cpu_seconds", "evaluations", "records")  # what a checkpoint holds

    def __init__(self, task: Task, weights: str) -> None:
        self.task, self.options, self.context, self.fabric = task, task.config.run, task.context, task.fabric
        folder, optim = self.context.folder, task.optim
        if optim.batch_size % (self.fabric.world_size * optim.accumulate):
            raise OptionError(
                f"optim.batch_size: {optim.batch_size} images are not equal parts for {self.fabric.world_size} ranks "
                f"x optim.accumulate={optim.accumulate}"
            )
        self.checkpoint, self.weights = folder / "checkpoint.pt", folder / weights
        if self.fabric.world_size > 1 and self.fabric.device.type == "cuda":
            convert_sync_batchnorm(task.model)
        self.model: Any = self.fabric.setup_module(task.model)
        self.raw_optimizers = task.optimizers()
        self.optimizers: dict[str, Any] = {
            name: self.fabric.setup_optimizers(optimizer) for name, optimizer in self.raw_optimizers.items()
        }
        self.ema = ModelEmaV3(task.student, decay=optim.ema, use_warmup=True) if optim.ema else None
        self.step = 0
        self.sums: dict[str, Tensor] = {}  # of the losses since the last line of the log
        self.counts: dict[str, int] = {}
        self.seconds = 0.0  # wall time of the steps alone: no evaluation, no checkpoints
        self.cpu_seconds = 0.0  # the same in this process's processor time, which other programs do not stretch
        self.evaluations: list[dict[str, float]] = []
        self.records: list[dict[str, float]] = []  # the lines of metrics.jsonl
        self.board: Any = None

    @property
    def student(self) -> nn.Module:
        """What is evaluated and stored: the moving average where there is one."""
        return self.ema.module if self.ema else self.task.student

    def fit(self) -> dict[str, Any]:
        task, options, monitor = self.task, self.options, self.context.monitor
        if self.checkpoint.exists():
            self.load()
        self.open_log()
        steps, images = task.steps, task.images_per_step
        monitor.report(self.context.name, self.step * images, steps * images)
        batches = iter(task.batches(self.step))
        self.model.train()
        while self.step < steps:
            if self.should_stop():
                self.save()
                raise Interrupted(monitor.signal)
            with self.clock():
                batch = next(batches)
                seed_all(self.context.seed, self.step, self.fabric.global_rank)  # dropout and the like
                for optimizer in self.raw_optimizers.values():
                    for group in optimizer.param_groups:
                        peak = group.setdefault("peak_lr", group["lr"])
                        group["lr"] = peak * task.optim.rate(self.step, steps)
                for name, loss in task.step(self, batch).items():
                    self.sums[name] = self.sums.get(name, 0) + loss.detach().double()
                    self.counts[name] = self.counts.get(name, 0) + 1
                if self.ema:
                    self.ema.update(task.student, step=self.step)
                self.step += 1
            monitor.report(self.context.name, images)
            last = self.step == steps
            if last or self.step % options.log_every == 0:
                self.log_losses()
            if last or due(self.step, options.eval_every):
                self.validate()
            if last and self.fabric.is_global_zero:
                with self.evaluating() as student:
                    task.pictures(student, self.context.folder / "figures")
            if self.step % options.save_every == 0 and not last:
                self.save()
        return self.finish()

    def apply(self, name: str) -> None:
        """Clip, step and clear the gradients of one optimizer."""
        optimizer = self.optimizers[name]
        if norm := self.task.optim.clip_norm:
            self.fabric.clip_gradients(self.model, optimizer, max_norm=norm, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()

    def validate(self) -> None:
        with self.evaluating() as student:
            metrics = self.task.evaluate(student)
        line = {f"eval/{name}": value for name, value in metrics.items()}
        line |= {f"diagnostics/{name}": value for name, value in self.task.diagnostics().items()}
        self.evaluations.append({"step": self.step, **line})
        self.log(line)

    def should_stop(self) -> bool:
        """Was this process asked to stop? With several ranks: was any? All of them ask at the same steps."""
        if self.fabric.world_size == 1:
            return self.context.monitor.should_stop()
        if self.step % STOP_EVERY:
            return False
        flag = torch.tensor(float(self.context.monitor.should_stop()), device=self.fabric.device)
        return bool(self.fabric.all_reduce(flag, reduce_op="max"))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        self.student.eval()
        with torch.no_grad(), self.fabric.autocast():
            yield self.student
        self.model.train()

    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu

    # ---- the log -----------------------------------------------------------------------------------------------------

    def open_log(self) -> None:
        """metrics.jsonl as of the checkpoint, which holds its lines: what came later, or is damaged, is gone."""
        if not self.fabric.is_global_zero:
            return
        runs.write_text(self.log_path, "".join(json.dumps(record) + "\n" for record in self.records))
        if self.options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with runs.writing(self.context.folder / "tensorboard"):
                purge = self.step + 1 if self.step else None
                self.board = SummaryWriter(str(self.context.folder / "tensorboard"), purge_step=purge)

    @property
    def log_path(self) -> Any:
        return self.context.folder / "metrics.jsonl"

    def log(self, line: Mapping[str, float]) -> None:
        images = self.step * self.task.images_per_step
        self.records.append({"step": self.step, "images": images, "seconds": self.seconds, **line})
        if self.fabric.is_global_zero:
            with runs.writing(self.log_path), open(self.log_path, "a") as file:
                file.write(json.dumps(self.records[-1]) + "\n")
            for name, value in line.items() if self.board else ():
                self.board.add_scalar(name, value, self.step)

    def mean_losses(self) -> dict[str, float]:
        """The mean of every loss since the last time, over the ranks too; an error where one is NaN or infinite."""
        if not self.sums:
            return {}
        sums: Any = self.fabric.all_reduce(torch.stack(list(self.sums.values())), reduce_op="mean")
        self.sums = dict(zip(self.sums, sums.unbind(), strict=True))  # every rank's from here on: checkpoints hold one
        losses = {f"train/{name}": s / self.counts[name] for name, s in zip(self.sums, sums.tolist(), strict=True)}
        if not all(map(math.isfinite, losses.values())):
            raise self.diverged(f"a loss is not finite around step {self.step} ({losses})")
        return losses

    def log_losses(self) -> None:
        losses = self.mean_losses()
        self.sums, self.counts = {}, {}
        one = len(self.raw_optimizers) == 1
        rates = {"lr" if one else f"lr/{k}": o.param_groups[0]["lr"] for k, o in self.raw_optimizers.items()}
        self.log(losses | rates)

    # ---- what stays --------------------------------------------------------------------------------------------------

    def diverged(self, what: str) -> RunError:
        saved = "the last checkpoint is of before: " if self.checkpoint.exists() else ""
        return RunError(f"{self.context.folder}: {what}; {saved}lower optim.lr or raise optim.warmup")

    def check_weights(self) -> None:
        """A step with a finite loss may be the one that breaks the weights."""
        for module in (self.task.model, self.student):
            for name, value in module.state_dict().items():
                if value.is_floating_point() and not value.isfinite().all():
                    raise self.diverged(f"step {self.step} left {name} with values that are not finite")

    def finish(self) -> dict[str, Any]:
        """Weights first, the result last: a folder with a result.json is complete."""
        self.check_weights()
        last = self.evaluations[-1]
        result = {
            **self.context.about,
            "steps": self.step,
            **{name[5:]: value for name, value in last.items() if name.startswith("eval/")},
            "diagnostics": {name[12:]: value for name, value in last.items() if name.startswith("diagnostics/")},
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "images_per_second": self.step * self.task.images_per_step / self.seconds,
            "evaluations": self.evaluations,
        }
        if self.fabric.is_global_zero:
            runs.write_text(self.log_path, "".join(json.dumps(record) + "\n" for record in self.records))
            if self.board:
                self.board.close()
            runs.save_safetensors(self.weights, self.student.state_dict())
            runs.save_json(self.context.folder / "result.json", result)
            self.checkpoint.unlink(missing_ok=True)
        self.fabric.barrier()
        return result

    def parts(self) -> dict[str, Any]:
        parts = {"model": self.task.model, "precision": self.fabric.strategy.precision}
        parts |= {f"optimizers/{name}": optimizer for name, optimizer in self.raw_optimizers.items()}
        return parts | ({"ema": self.ema.module} if self.ema else {})

    def save(self) -> None:
        """Everything that must continue; nothing random is in it, because every step is seeded."""
        self.mean_losses()  # no checkpoint of a training that has gone wrong
        self.check_weights()
        if self.fabric.is_global_zero:
            saved: dict[str, Any] = {name: part.state_dict() for name, part in self.parts().items()}
            runs.save_tensors(self.checkpoint, saved | {"counters": {n: getattr(self, n) for n in self.COUNTERS}})
            runs.save_safetensors(self.weights, self.student.state_dict())  # for vkd evaluate in between
        self.fabric.barrier()

    def load(self) -> None:
        saved = runs.load_tensors(self.checkpoint)
        for name, part in self.parts().items():
            runs.load_state(part, saved.get(name), f"{self.checkpoint}: {name}")
        counters = saved.get("counters")
        if not isinstance(counters, dict) or not {*self.COUNTERS} <= {*counters}:
            raise RunError(f"{self.checkpoint}: made by another version; delete it to begin this training anew")
        for name in self.COUNTERS:
            setattr(self, name, counters[name])
        self.sums = {name: value.to(self.fabric.device) for name, value in self.sums.items()}


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
