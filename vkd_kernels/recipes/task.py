"""What a task is, and what all tasks share: options of training, running and distilling, arms, metrics, seeds.

Whatever is drawn depends on (seed, step, rank) alone, so that an interrupted training continues bit for bit.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy
import torch
from pydantic import model_validator
from torch import Tensor, nn

import vkd_kernels as vk

from .config import OptionError, Section, Shares, flatten, option, replace
from .runs import RunError

RELEASED, PAPER = "released code", "the paper"
Projection = Literal["orthogonal", "linear", "identity"]
Normalization = Literal["layer_norm", "batch_norm", "whiten", "l2", "none"]
Loss = Literal["smooth_l1", "mse", "cosine"]
Scale = float | Literal["match", "learned"]
WEIGHTS = ("distill.weight", "distill.logit_weight")


class Optim(Section):
    """How a student is optimized."""

    lr: float = option(5e-4, "peak learning rate", source=RELEASED, gt=0)
    min_lr: float = option(0.0, "learning rate at the end of the cosine", ge=0)
    betas: Shares = option((0.9, 0.999), "AdamW's betas", source="PyTorch", min_length=2, max_length=2)
    weight_decay: float = option(0.05, "not of 1-D parameters, tokens, the projection", source=RELEASED, ge=0)
    schedule: Literal["cosine", "constant"] = option("cosine", "learning rate after the warm-up")
    warmup: float = option(
        0.0,
        "steps in which the learning rate rises; below 1: a share of all. Of a teacher's steps the same share",
        ge=0,
    )
    steps: int = option(0, "optimizer steps; 0: optim.epochs says how many", ge=0, le=10**9)
    epochs: float = option(0.0, "passes over the training data; 0: optim.steps counts", ge=0, le=10**6)
    batch_size: int = option(64, "images per optimizer step, of all ranks together", ge=1, le=10**6)
    clip_norm: float = option(0.0, "largest norm of the gradient; 0: no clipping", ge=0)
    ema: float = option(0.0, "decay of the moving average of the student, at most; 0: no average", ge=0, lt=1)
    ema_start: int = option(
        0,
        "steps in which the moving average is a copy of the student, before its decay is optim.ema; 0: the decay "
        "rises with the steps, at step n to 1 - n^(-2/3): 0.99 at 1000, 0.9996 at 125,000",
        source="timm",
        ge=0,
    )
    precision: Literal["32-true", "bf16-mixed"] = option("32-true", "of activations; not of the orthogonal matrix")

    @model_validator(mode="after")
    def _checked(self) -> Optim:
        if (self.steps > 0) == (self.epochs > 0):
            raise OptionError(f"optim.steps={self.steps} and optim.epochs={self.epochs:g}: exactly one must be above 0")
        if self.ema_start and not self.ema:
            raise OptionError(f"optim.ema_start: {self.ema_start}, but there is no average: give optim.ema, or 0 here")
        return self

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, as a share of the peak: rises in a line, then falls in half a cosine."""
        rise = round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)
        if step < rise:
            return (step + 1) / rise
        if self.schedule == "constant":
            return 1.0
        low = self.min_lr / self.lr
        return low + (1 - low) * (0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise)))


class Run(Section):
    """How a training is run. Nothing here changes what a training gives; `--resume` may change it."""

    accelerator: Literal["auto", "cpu", "cuda"] = option("auto", "device; auto: a GPU where there is one")
    workers: int = option(0, "processes that load data, per rank", ge=0, le=1024)
    log_every: int = option(50, "steps between two lines of losses in metrics.jsonl", ge=1)
    eval_every: int = option(0, "steps between two evaluations; 0: only at the end", ge=0)
    save_every: int = option(500, "steps between two checkpoints", ge=1)


class DistillConfig(Section):
    """The feature loss, as `OrthoProjLoss` takes it."""

    projection: Projection = option("orthogonal", "from the student's channels to the teacher's", source=PAPER)
    normalization: Normalization = option("layer_norm", "of the teacher's features", source=PAPER)
    loss: Loss = option("smooth_l1", "between projected features and the target", source=PAPER)
    beta: float = option(1.0, "where smooth L1 turns linear", source=RELEASED, gt=0)
    scale: Scale = option(1.0, "of projected features; match: sqrt(T/S), at least 1; learned: from there", source=PAPER)
    eps: float = option(0.0, "eps of the normalization; 0: 1e-5, or 1e-3 for whiten", ge=0, lt=1)
    weight: float = option(1.0, "weight of the feature loss; 0: none. An arm's own 0 stays 0", ge=0)

    def feature_loss(self, student_dim: int, teacher_dim: int, process_group: Any = None, **options: Any) -> nn.Module:
        settings = self.model_dump(include={"projection", "normalization", "loss", "beta", "scale"})
        settings["eps"] = self.eps or (1e-3 if self.normalization == "whiten" else 1e-5)
        return vk.OrthoProjLoss(student_dim, teacher_dim, process_group=process_group, **settings | options)


@dataclass(frozen=True)
class Arm:
    """One way to train the student: what it changes in the configuration, and how much longer it trains."""

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    longer: float = 1.0  # times as many steps: to take at least as long as the arm it is compared with

    def values(self, typed: Mapping[str, Any]) -> dict[str, Any]:
        """What it changes; `typed` are the command line's values, which stand above the arm's, except that a student
        that the arm does not distill (a weight of 0) stays one."""
        absent = {key: value for key, value in self.changes.items() if key in WEIGHTS and not value}
        return {**self.changes, **typed, **absent}

    def apply(self, config: Any, typed: Mapping[str, Any]) -> Any:
        changed = replace(config, self.values(typed))
        o = changed.optim
        longer = {"optim.steps": round(o.steps * self.longer)} if o.steps else {"optim.epochs": o.epochs * self.longer}
        return replace(changed, longer)


@dataclass(frozen=True)
class Metric:
    key: str  # in what evaluate() returns
    label: str
    higher_is_better: bool = True
    digits: int = 1


@dataclass
class Context:
    """What a task is told of the place it runs in."""

    fabric: Any  # of lightning_fabric, launched
    folder: Path  # of this training: ARM/seed-NN
    seed: int
    teacher: Path | None = None  # the folder in which train_teacher() left what it made for this seed
    quiet: bool = True  # no progress bar

    @property
    def process_group(self) -> Any:
        """For OrthoProjLoss and FeatureDistiller: all ranks, or None where there is one."""
        return torch.distributed.group.WORLD if self.fabric.world_size > 1 else None


class Task:
    """One training of one seed in one arm; the class says which arms there are. `vkd distill my_module:MyTask` runs a
    subclass of one's own; `make_student`, `make_model`, `batches` and `evaluate` are what it must have."""

    title: ClassVar[str] = ""
    Config: ClassVar[type[Section]]  # with sections optim, run, distill, and whatever else it needs
    arms: ClassVar[Mapping[str, Arm]]
    compared: ClassVar[tuple[str, ...]]  # the arms that the bundled recipe trains
    baseline: ClassVar[str]
    seeds: ClassVar[int] = 3
    metric: ClassVar[Metric]
    recipes: ClassVar[Path | None] = None  # folder of named recipes, NAME.yaml
    rate_option: ClassVar[str] = "optim.lr"  # what to lower where a training diverges
    unused_parameters: ClassVar[bool] = False  # do some parameters get no gradient in some backward passes?

    student: nn.Module
    model: nn.Module

    def __init__(self, config: Any, context: Context) -> None:
        self.config, self.context, self.fabric, self.seed = config, context, context.fabric, context.seed
        self.optim: Optim = config.optim
        self.mine = slice(self.fabric.global_rank, None, self.fabric.world_size)  # this rank's share of a batch

    @classmethod
    def check(cls, config: Any) -> None:
        """An error about whatever can be known to be wrong before anything is trained."""
        for key, value in flatten(config).items():
            if key.endswith(".weights") and value and not Path(value).is_file():
                raise OptionError(f"{key}: there is no file {value}")
        o = config.optim
        check_parts("optim.batch_size", o.batch_size)
        if o.steps:
            check_schedule(o, o.steps)
        try:
            if config.distill.weight:
                config.distill.feature_loss(1, 1)
        except ValueError as error:  # values that do not go together
            raise OptionError(f"distill: {error}") from error

    @classmethod
    def needs_teacher(cls, config: Any) -> bool:
        """Whether a training of this configuration needs what `train_teacher` makes."""
        return True

    def train_teacher(self) -> dict[str, Any]:
        """Make the seed's teacher, in `context.folder`; returns numbers to show."""
        return {}

    def make_student(self) -> nn.Module:
        """What is evaluated and stored: no projection in it."""
        raise NotImplementedError

    def make_model(self, student: nn.Module) -> nn.Module:
        """Student and losses in one module, which torchrun's ranks wrap: `model(batch) -> {"total": scalar, ...}`,
        means over this rank's share of the batch, or global ones (`process_group`). A frozen teacher stays out."""
        raise NotImplementedError

    @property
    def images(self) -> int:
        """Training images of an epoch."""
        raise NotImplementedError

    @property
    def per_epoch(self) -> float:
        """Steps of an epoch. An incomplete last batch is left out; tasks that draw with replacement have none."""
        check_enough("optim.batch_size", self.optim.batch_size, self.images)
        return self.images // self.optim.batch_size

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.optim.steps or max(1, round(self.optim.epochs * self.per_epoch))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        o, groups = self.optim, parameter_groups(self.model, self.optim.weight_decay)
        return {"optimizer": torch.optim.AdamW(groups, lr=o.lr, betas=(o.betas[0], o.betas[1]), fused=True)}

    def batches(self, start: int) -> Iterator[Any]:
        """This rank's share of the batches start, start + 1, ...: each depends on (seed, step, rank, ranks) alone."""
        raise NotImplementedError

    def step(self, loop: Any, batch: Any) -> dict[str, Tensor]:
        """One optimizer step; returns the losses to be logged. Tasks with several optimizers write their own."""
        losses = loop.model(batch)
        self.fabric.backward(losses["total"])
        loop.apply("optimizer")
        return losses

    def renew_buffers(self, average: nn.Module) -> None:
        """Put right what a moving average of the student gets wrong, before it is evaluated and stored: buffers that
        belong to weights, say. It may depend on the parameters alone, or --resume gives other bits."""

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        """Metrics on held-out data, {"accuracy": 97.1}; every rank calls it and returns the same."""
        raise NotImplementedError

    def diagnostics(self) -> dict[str, float]:
        """Further numbers for the log: here of every projection in the model, also of linear ones."""
        losses = [module for module in self.model.modules() if isinstance(module, vk.OrthoProjLoss)]
        errors = [vk.diagnostics.orthogonality_error(loss.projection.weight.detach()).max() for loss in losses]
        return {"max |PᵀP - I|": float(torch.stack(errors).max())} if errors else {}

    def pictures(self, student: nn.Module, folder: Path) -> None:
        """Draw what the student does at the end; only the first rank calls it."""


# ---- ranks -----------------------------------------------------------------------------------------------------------


def rank() -> int:
    """This process's number among those that torchrun started; 0 where it started none."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def check_ranks() -> None:
    """An error where a part of what torchrun sets is missing: ranks would take themselves for single processes."""
    needed = ["WORLD_SIZE"] + ["LOCAL_WORLD_SIZE"] * (ranks() > 1)
    if missing := [name for name in needed if "RANK" in os.environ and name not in os.environ]:
        raise RunError(
            f"{missing[0]} is missing, but RANK is {os.environ['RANK']}: start ranks by torchrun, or unset RANK to "
            "train in one process"
        )


def check_parts(key: str, images: int) -> None:
    """An error if the ranks can't have equal parts of so many images."""
    if images % ranks():
        raise OptionError(f"{key}: {images} images for {ranks()} equal ranks")


def check_enough(key: str, batch_size: int, images: int) -> None:
    """An error if there are fewer images than a batch, or another number of them, needs."""
    if batch_size > images:
        raise OptionError(f"{key}: {batch_size}, but there are only {images} training images; lower it, or use more")


def check_schedule(optim: Optim, steps: int) -> None:
    """An error if the warm-up, or the average's start, lasts as long as the training."""
    said = f"optim.steps={steps}" if optim.steps else f"{steps} steps, of optim.epochs={optim.epochs:g}"
    for key in ("warmup", "ema_start"):
        if steps <= (value := getattr(optim, key)):
            raise OptionError(f"optim.{key}: {value:g}, but there are only {said}; lower it")


# ---- pieces ----------------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay; and biases, 1-D ones, what `no_weight_decay()` of a submodule names, and all projections:
    arms with a linear one differ in that alone."""
    from timm.optim import param_groups_weight_decay

    spared = []
    for prefix, module in model.named_modules():
        names = [*module.no_weight_decay()] if hasattr(module, "no_weight_decay") else []  # type: ignore[operator]
        if isinstance(module, vk.OrthoProjLoss):
            names = [name for name, _ in module.named_parameters()]
        spared += [f"{prefix}.{name}".lstrip(".") for name in names]
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=spared)


def as_teacher(role: type[Task], task: Task) -> Task:
    """The training of the task's teacher: `role` stands before the task's own class, whose data and networks stay. It
    has `teacher.steps`, `.batch_size` and `.lr`, warms up in the same share of its steps, and is taught by nobody."""
    config, t, warmup = task.config, task.config.teacher, task.optim.warmup
    check_schedule(task.optim, task.steps)
    if warmup >= 1:  # in steps
        warmup = min(round(warmup / task.steps * t.steps), t.steps - 1)
    optim = {"lr": t.lr, "steps": t.steps, "batch_size": t.batch_size, "epochs": 0.0, "min_lr": 0.0}
    optim |= {"warmup": warmup, "ema": 0.0, "ema_start": 0}
    changes = {"optim": optim, "distill": {"weight": 0.0}, "run": {"eval_every": 0}}
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    kind = type(role.__name__, (role, type(task)), {})
    return kind(config.model_copy(update=sections), task.context)


def mixed_seed(*numbers: int) -> int:
    """One seed of several numbers, such as (seed, step, rank). Zeros at the end do not count: 5 is as (5, 0)."""
    return int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)[0] >> 1)


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on the numbers alone, such as (seed, step): for batches and augmentation."""
    return torch.Generator().manual_seed(mixed_seed(*numbers))


def seed_all(*numbers: int) -> None:
    seed = mixed_seed(*numbers)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # otherwise torch.manual_seed takes a traceback at each call, for later
        torch.cuda.manual_seed_all(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)
