"""One training, for all tasks: an explicit loop on Lightning Fabric. `Fit.run` is the loop: the part to read and copy.

Fabric moves the model to its device, wraps it for data-parallel ranks and runs it in mixed precision; it owns no loop.
A task gives a `Training` (model and loss together, batches, evaluation); compare.py calls `fit` for every arm and seed.
Everything that is drawn depends on (seed, step, rank) alone, so that an interrupted training continues bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from . import runs
from .config import OptionError, option
from .devices import Fabric, synchronise_batch_norm
from .log import Log

STOP_EVERY = 10  # steps between two times that ranks ask one another whether to stop


@dataclass(frozen=True)
class Optim:
    """How a student is optimised. Tasks choose other defaults with `section(Optim, lr=..., sources={"lr": "..."})`."""

    lr: float = option(5e-4, "peak learning rate", source="released code", above=0)
    min_lr: float = option(0.0, "learning rate at the end of the cosine", minimum=0)
    betas: tuple[float, ...] = option((0.9, 0.999), "AdamW's betas", source="PyTorch", minimum=0, below=1)
    eps: float = option(1e-8, "AdamW's eps", source="PyTorch", above=0)
    weight_decay: float = option(
        0.05, "weight decay, except of 1-D parameters, tokens and the projection", source="released code", minimum=0
    )
    schedule: str = option("cosine", "learning rate after the warm-up, step by step", choices=("cosine", "constant"))
    warmup: float = option(0.0, "steps in which the learning rate rises; below 1: their share", minimum=0)
    steps: int = option(0, "optimiser steps; 0: as many as optim.epochs are", minimum=0)
    epochs: float = option(0.0, "passes over the training data; 0: optim.steps says it", minimum=0)
    batch_size: int = option(64, "images per optimiser step, of all ranks together", minimum=1)
    accumulate: int = option(1, "parts of a batch whose gradients are accumulated", minimum=1)
    clip_norm: float = option(0.0, "largest norm of the gradient; 0: no clipping", minimum=0)
    ema: float = option(0.0, "decay of the moving average of the student; 0: none", minimum=0, below=1)
    precision: str = option(
        "32-true", "of activations; the projection is always exact", choices=("32-true", "bf16-mixed", "16-mixed")
    )

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise OptionError(f"optim.betas: must be two numbers, got {self.betas}")
        if (self.steps > 0) == (self.epochs > 0):
            raise OptionError(f"optim.steps={self.steps} and optim.epochs={self.epochs:g}: exactly one must be above 0")
        if self.min_lr > self.lr:
            raise OptionError(f"optim.min_lr: must be at most optim.lr={self.lr:g}, got {self.min_lr:g}")

    def total_steps(self, images: int) -> int:
        """Optimiser steps in all, with so many training images in an epoch (an incomplete last batch is left out)."""
        return self.steps or max(1, round(self.epochs * (images // self.batch_size)))

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, as a share of the peak: rises in a line, then falls in half a cosine."""
        rise = round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)
        if step < rise:
            return (step + 1) / rise
        if self.schedule == "constant":
            return 1.0
        low = self.min_lr / self.lr
        return low + (1 - low) * (0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass(frozen=True)
class Run:
    """How a training is run. Nothing here changes what a training gives; `--resume` may change it."""

    accelerator: str = option("auto", "device; auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    workers: int = option(0, "processes that load data, per rank", minimum=0)
    log_every: int = option(50, "steps between two lines of metrics", minimum=1)
    eval_every: int = option(0, "steps between two evaluations; 0: only at the end", minimum=0)
    picture_every: int = option(0, "steps between two sets of pictures; 0: only at the end", minimum=0)
    save_every: int = option(500, "steps between two checkpoints", minimum=1)
    tensorboard: bool = option(True, "write TensorBoard's files too")


class Training:
    """What a task gives: subclass it.

    Args:
        model: student and loss in one module, so that data-parallel wrapping reduces all gradients:
            ``forward(batch) -> {"total": scalar, ...}``, each the mean over this rank's equal share of the batch, or
            the global mean (``process_group`` semantics). A frozen teacher is no submodule of it.
        student: the part of it that is averaged, evaluated and stored. No projection in it.
        optim: how to optimise it.
        steps: optimiser steps in all.
    """

    def __init__(self, model: nn.Module, student: nn.Module, optim: Optim, steps: int) -> None:
        self.model, self.student, self.optim, self.steps = model, student, optim, steps
        self.images_per_step = optim.batch_size  # for images/s; of all ranks together
        self.state: dict[str, Any] = {}  # what else must continue: name -> something with (load_)state_dict

    def batches(self, start: int) -> Iterator[Any]:
        """This rank's share of the batches start, start + 1, ...: each depends on (seed, step, rank, ranks) alone.

        Let the share be `rows[rank::ranks]`: the parts of an accumulated batch then are those of a single process.
        """
        raise NotImplementedError

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        """Metrics on held-out data; every rank calls it and returns the same."""
        raise NotImplementedError

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        o = self.optim
        fused = o.precision != "16-mixed"  # a fused optimiser unscales by itself, which excludes clipping
        groups = parameter_groups(self.model, o.weight_decay)
        return {"optimizer": torch.optim.AdamW(groups, lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, fused=fused)}

    def step(self, fit: Fit, batch: Any) -> dict[str, Tensor]:
        """One optimiser step; returns the losses to be logged. Tasks with several optimisers write their own."""
        logged: dict[str, Tensor] = {}
        parts = split(batch, self.optim.accumulate)
        for index, part in enumerate(parts):
            with fit.fabric.no_backward_sync(fit.model, enabled=index + 1 < len(parts)):
                losses = fit.model(part)
                fit.fabric.backward(losses["total"] / len(parts))
            for name, loss in losses.items():
                share = loss.detach() / len(parts)
                logged[name] = logged[name] + share if index else share
        fit.apply("optimizer")
        return logged

    def diagnostics(self) -> dict[str, float]:
        """Further numbers for the log, e.g. {"orthogonality_error": 3e-7}."""
        return {}

    def pictures(self, student: nn.Module, folder: Path) -> None:
        """Draw what the student does now; only the first rank calls it."""

    def example(self) -> tuple[Any, ...]:
        """Arguments of the student for one image or more, for `vkd export`."""
        raise NotImplementedError


@dataclass
class Context:
    """What a task is told of the place it runs in."""

    fabric: Fabric
    folder: Path
    seed: int
    worker: runs.Worker
    name: str = ""  # in the progress bar
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # goes into result.json: arm and seed

    @property
    def process_group(self) -> Any:
        """For OrthoProjLoss and FeatureDistiller: all ranks, or None where there is one."""
        return torch.distributed.group.WORLD if self.fabric.world_size > 1 else None

    def should_stop(self) -> bool:
        """Was this process asked to stop? With several ranks: was any? All of them must ask at the same step."""
        stop = self.worker.should_stop()
        if self.fabric.world_size > 1:
            flag = torch.tensor(float(stop), device=self.fabric.device)
            stop = bool(self.fabric.all_reduce(flag, reduce_op="max"))
        return stop


# ---- the loop --------------------------------------------------------------------------------------------------------


def fit(training: Training, run: Run, context: Context, *, weights: str = "student.safetensors") -> dict[str, Any]:
    """Train, or continue, in `context.folder`; returns and leaves there result.json. Done already: only reads it."""
    result = context.folder / "result.json"
    return runs.load_json(result) if result.exists() else Fit(training, run, context, weights).run()


class Fit:
    """The state of one training. Tasks' `step` sees `model` (wrapped), `optimizers` (wrapped), `fabric` and `step`."""

    def __init__(self, training: Training, run: Run, context: Context, weights: str) -> None:
        self.training, self.options, self.context, self.fabric = training, run, context, context.fabric
        check_batch(training.optim, self.fabric)
        self.checkpoint, self.weights = context.folder / "checkpoint.pt", context.folder / weights
        if self.fabric.world_size > 1:
            synchronise_batch_norm(training.model, self.fabric.device)
        self.model: Any = self.fabric.setup_module(training.model)
        self.raw_optimizers = training.optimizers()
        self.optimizers: dict[str, Any] = {
            name: self.fabric.setup_optimizers(optimizer) for name, optimizer in self.raw_optimizers.items()
        }
        self.ema = Ema(training.student, training.optim.ema) if training.optim.ema else None
        self.step = 0
        self.sums: dict[str, Tensor] = {}  # of the losses since the last line of the log
        self.counts: dict[str, int] = {}
        self.seconds = 0.0  # wall time of the steps alone: no evaluation, no checkpoints
        self.cpu_seconds = 0.0  # the same in this process's processor time, which other programs do not stretch
        self.evaluations: list[dict[str, float]] = []

    @property
    def student(self) -> nn.Module:
        """What is evaluated and stored: the moving average where there is one."""
        return self.ema.average if self.ema else self.training.student

    def run(self) -> dict[str, Any]:
        training, options, context = self.training, self.options, self.context
        if self.checkpoint.exists():
            self.load()
        log = Log(context.folder, self.step, options.tensorboard) if self.fabric.is_global_zero else None
        total = training.steps * training.images_per_step
        context.worker.report(context.name, self.step * training.images_per_step, total)
        ask = 1 if self.fabric.world_size == 1 else STOP_EVERY
        batches = iter(training.batches(self.step))
        self.model.train()
        while self.step < training.steps:
            if self.step % ask == 0 and context.should_stop():
                self.save(log)
                raise runs.Interrupted(context.worker.signal)
            with self.clock():
                # Processes that read for it outlive a Ctrl-C until the checkpoint is there.
                with runs.signals_blocked():
                    batch = next(batches)
                seed_all(context.seed, self.step, self.fabric.global_rank)  # dropout and the like
                for optimizer in self.raw_optimizers.values():
                    for group in optimizer.param_groups:
                        peak = group.setdefault("peak_lr", group["lr"])
                        group["lr"] = peak * training.optim.rate(self.step, training.steps)
                self.add(training.step(self, batch))
                if self.ema:
                    self.ema.update(training.student, self.step)
                self.step += 1
            context.worker.report(context.name, training.images_per_step)
            last = self.step == training.steps
            if last or self.step % options.log_every == 0:
                self.write_losses(log)
            if last or due(self.step, options.eval_every):
                self.evaluate(log)
            if self.fabric.is_global_zero and (last or due(self.step, options.picture_every)):
                self.draw()
            if self.step % options.save_every == 0 and not last:
                self.save(log)
        return self.finish(log)

    def apply(self, name: str) -> None:
        """Clip, step and clear the gradients of one optimiser."""
        optimizer = self.optimizers[name]
        if norm := self.training.optim.clip_norm:
            self.fabric.clip_gradients(self.model, optimizer, max_norm=norm, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()

    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu

    # ---- what it writes ----------------------------------------------------------------------------------------------

    def add(self, losses: Mapping[str, Tensor]) -> None:
        for name, value in losses.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def mean_losses(self) -> dict[str, float]:
        """The mean of every loss since the last time, over the ranks too; an error where one is NaN or infinite."""
        if not self.sums:
            return {}
        sums: Any = self.fabric.all_reduce(torch.stack(list(self.sums.values())), reduce_op="mean")
        self.sums = dict(zip(self.sums, sums.unbind(), strict=True))  # every rank's from here on: checkpoints hold one
        losses = {f"train/{name}": s / self.counts[name] for name, s in zip(self.sums, sums.tolist(), strict=True)}
        if not all(map(math.isfinite, losses.values())):
            raise runs.RunError(
                f"{self.context.folder}: a loss is not finite around step {self.step} ({losses}); the last checkpoint "
                "is of before: lower optim.lr or raise optim.warmup"
            )
        return losses

    def write_losses(self, log: Log | None) -> None:
        losses = self.mean_losses()
        self.sums, self.counts = {}, {}
        rates = {
            "lr" if len(self.raw_optimizers) == 1 else f"lr/{name}": optimizer.param_groups[0]["lr"]
            for name, optimizer in self.raw_optimizers.items()
        }
        if log:
            log.write(self.progress() | losses | rates)

    def evaluate(self, log: Log | None) -> None:
        student = self.student
        student.eval()
        with torch.no_grad(), self.fabric.autocast(), runs.signals_blocked():
            metrics = self.training.evaluate(student)
        self.model.train()
        found = {f"eval/{name}": value for name, value in metrics.items()}
        found |= {f"diagnostics/{name}": value for name, value in self.training.diagnostics().items()}
        self.evaluations.append({"step": self.step, **found})
        if log:
            log.write(self.progress() | found)

    def draw(self) -> None:
        student = self.student
        student.eval()
        with torch.no_grad(), self.fabric.autocast():
            self.training.pictures(student, self.context.folder / "figures")
        self.model.train()

    def progress(self) -> dict[str, float]:
        return {"step": self.step, "images": self.step * self.training.images_per_step, "seconds": self.seconds}

    def finish(self, log: Log | None) -> dict[str, Any]:
        """Weights first, the result last: a folder with a result.json is complete."""
        last = self.evaluations[-1]
        result = {
            **self.context.about, "steps": self.step,
            **{name[5:]: value for name, value in last.items() if name.startswith("eval/")},
            "diagnostics": {name[12:]: value for name, value in last.items() if name.startswith("diagnostics/")},
            "seconds": self.seconds, "cpu_seconds": self.cpu_seconds,
            "images_per_second": self.step * self.training.images_per_step / self.seconds,
            "evaluations": self.evaluations,
        }  # fmt: skip
        if log:
            log.close()
            runs.save_safetensors(self.weights, self.student.state_dict())
            runs.save_json(self.context.folder / "result.json", result)
            self.checkpoint.unlink(missing_ok=True)
        self.fabric.barrier()
        return result

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Any]:
        parts = {"model": self.training.model, "precision": self.fabric.strategy.precision}
        parts |= {f"optimizers/{name}": optimizer for name, optimizer in self.raw_optimizers.items()}
        parts |= {f"state/{name}": part for name, part in self.training.state.items()}
        return parts | ({"ema": self.ema.average} if self.ema else {})

    COUNTERS = ("step", "sums", "counts", "seconds", "cpu_seconds", "evaluations")

    def save(self, log: Log | None) -> None:
        """Everything that must continue; nothing random is in it, because every step is seeded."""
        self.mean_losses()  # no checkpoint of a training that has gone wrong
        if log:
            log.flush()
            saved: dict[str, Any] = {name: part.state_dict() for name, part in self.parts().items()}
            runs.save_tensors(self.checkpoint, saved | {"counters": {n: getattr(self, n) for n in self.COUNTERS}})
            runs.save_safetensors(self.weights, self.student.state_dict())  # for vkd evaluate in between
        self.fabric.barrier()

    def load(self) -> None:
        saved = runs.load_tensors(self.checkpoint)
        for name, part in self.parts().items():
            runs.load_state(part, saved.get(name), f"{self.checkpoint}: {name}")
        for name in self.COUNTERS:
            setattr(self, name, saved["counters"][name])
        self.sums = {name: value.to(self.fabric.device) for name, value in self.sums.items()}


class Ema:
    """Moving average of a student's parameters; its buffers are the student's. It rises to its decay in early steps."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.average, self.decay = copy.deepcopy(student).requires_grad_(False).eval(), decay

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), [p.detach() for p in student.parameters()], weight)
        for kept, new in zip(self.average.buffers(), student.buffers(), strict=True):
            kept.copy_(new)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay; then biases, 1-D ones, and what `no_weight_decay()` of a submodule names (projections)."""
    spared = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()  # type: ignore[operator]
    }
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim < 2 or name.endswith("bias") or name in spared].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def split(batch: Any, parts: int) -> list[Any]:
    """A batch in equal parts: its tensors and lists are cut along their first dimension, tuples, dicts and dataclasses
    keep their form, and anything else goes into every part."""
    if parts == 1:
        return [batch]
    if isinstance(batch, (Tensor, list)):
        if len(batch) % parts:
            raise OptionError(f"optim.accumulate: {parts} parts of a batch of {len(batch)} on this rank")
        size = len(batch) // parts
        return [batch[i * size : (i + 1) * size] for i in range(parts)]
    if isinstance(batch, dict):
        cut = {name: split(value, parts) for name, value in batch.items()}
        return [{name: values[i] for name, values in cut.items()} for i in range(parts)]
    if isinstance(batch, tuple):
        columns = list(zip(*(split(value, parts) for value in batch), strict=True))
        return [type(batch)(*c) if hasattr(batch, "_fields") else c for c in columns]  # a named one keeps its names
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        cut = {f.name: split(getattr(batch, f.name), parts) for f in dataclasses.fields(batch)}
        return [dataclasses.replace(batch, **{name: values[i] for name, values in cut.items()}) for i in range(parts)]
    return [batch] * parts


def check_batch(optim: Optim, fabric: Fabric) -> None:
    if optim.batch_size % (fabric.world_size * optim.accumulate):
        raise OptionError(
            f"optim.batch_size: {optim.batch_size} images are not equal parts for {fabric.world_size} ranks "
            f"x optim.accumulate={optim.accumulate}"
        )


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def mixed_seed(*numbers: int) -> int:
    """One seed of several numbers, such as (seed, step, rank), unlike that of any others."""
    return int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)[0] >> 1)


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on the numbers alone, such as (seed, step): for batches and augmentation."""
    return torch.Generator().manual_seed(mixed_seed(*numbers))


def seed_all(*numbers: int) -> None:
    seed = mixed_seed(*numbers)
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)
