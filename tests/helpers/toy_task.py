"""A task of `vkd distill` that takes a second: random vectors, a wide teacher, a narrow student. For the tests."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import vkd_kernels as vk
from vkd_kernels.recipes import runs
from vkd_kernels.recipes.config import OptionError, option, section
from vkd_kernels.recipes.engine import Optim, Run, Training, generator
from vkd_kernels.recipes.tasks import Arm, Defaults, Metric

TITLE = "A toy: vectors, a linear teacher, a narrow student."
PRIMARY = Metric("error", "test error", higher_is_better=False, digits=3)
DEFAULTS = Defaults(arms=("alone", "linear", "vkd"), seeds=2, baseline="alone")
ARMS = {
    "alone": Arm("student alone", {"distill.weight": 0.0}),
    "longer": Arm("student alone, equal time", {"distill.weight": 0.0}, longer=1.5),
    "linear": Arm("linear projection", {"distill.projection": "linear"}),
    "vkd": Arm("V_kD"),
}


@dataclass(frozen=True)
class Data:
    rows: int = option(64, "training rows", minimum=1)
    missing: str = option("", "a folder that the training needs")


@dataclass(frozen=True)
class Teacher:
    width: int = option(12, "channels", minimum=1, source="as wide as it needs to be")


@dataclass(frozen=True)
class Student:
    width: int = option(5, "channels", minimum=1)
    dropout: float = option(0.1, "share of channels dropped", minimum=0, below=1)
    batch_norm: bool = option(False, "normalise the hidden channels over the batch")


@dataclass(frozen=True)
class Distill:
    projection: str = option("orthogonal", "kind", choices=("orthogonal", "linear", "none"))
    normalization: str = option("layer_norm", "of the teacher", choices=("layer_norm", "batch_norm", "whiten", "none"))
    weight: float = option(1.0, "of the feature loss", minimum=0)
    scale: float | str = option(1.0, "of the projected student", choices=("match", "learned"))


@dataclass(frozen=True)
class Slow(Run):
    slow: float = option(0.0, "seconds that a step waits", minimum=0)


@dataclass(frozen=True)
class Config:
    data: Data = section(Data)
    teacher: Teacher = section(Teacher)
    student: Student = section(Student)
    distill: Distill = section(Distill)
    optim: Optim = section(Optim, steps=30, batch_size=8, lr=1e-2, warmup=0.1, ema=0.9, sources={"lr": "a guess"})
    run: Slow = section(Slow, accelerator="cpu", log_every=7, eval_every=10, save_every=9, tensorboard=False)

    def __post_init__(self):
        if self.teacher.width > 100:
            raise OptionError(f"teacher.width: at most 100, got {self.teacher.width}")


class Net(nn.Module):
    def __init__(self, width, dropout=0.0, batch_norm=False):
        super().__init__()
        self.body = nn.Linear(6, width, bias=not batch_norm)  # which would have no gradient but rounding's
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)
        self.dropout, self.standard = nn.Dropout(dropout), nn.BatchNorm1d(width) if batch_norm else nn.Identity()

    def features(self, x):
        return self.norm(self.standard(self.body(x)).tanh())

    def forward(self, x):
        return self.head(self.dropout(self.features(x)))


class Distiller(nn.Module):
    def __init__(self, student, teacher, config, group):
        super().__init__()
        self.student, self.weight, self.frozen = student, config.distill.weight, (teacher,)
        self.projection = None
        if config.distill.projection == "orthogonal":
            self.projection = vk.OrthoProjLoss(
                config.student.width, config.teacher.width, normalization=config.distill.normalization,
                scale=config.distill.scale, process_group=group,
            )  # fmt: skip
        elif config.distill.projection == "linear":
            self.projection = nn.Linear(config.student.width, config.teacher.width, bias=False)

    def forward(self, batch):
        x, y = batch
        losses = {"task": F.mse_loss(self.student(x), y)}
        losses["total"] = losses["task"]
        if self.weight and self.projection is not None:
            with torch.no_grad():
                target = self.frozen[0].features(x)
            features = self.student.features(x)
            if isinstance(self.projection, nn.Linear):
                losses["features"] = F.smooth_l1_loss(self.projection(features), target)
            else:
                losses["features"] = self.projection(features, target)
            losses["total"] = losses["task"] + self.weight * losses["features"]
        elif self.projection is not None:
            losses["total"] = losses["task"] + 0 * sum(p.sum() for p in self.projection.parameters())
        return losses


class Toy(Training):
    def __init__(self, config, seed, teacher_folder, context):
        self.config, self.seed, self.fabric = config, seed, context.fabric
        student = Net(config.student.width, config.student.dropout, config.student.batch_norm)
        if teacher_folder is None:
            super().__init__(student, student, config.optim, config.optim.total_steps(config.data.rows))
        else:
            teacher = Net(config.teacher.width)
            teacher.load_state_dict(runs.load_safetensors(teacher_folder / "teacher.safetensors"))
            model = Distiller(student, teacher, config, context.process_group)
            super().__init__(model, student, config.optim, config.optim.total_steps(config.data.rows))
        g = generator(seed)
        truth = torch.randn(6, 3, generator=g)
        self.x, self.test = torch.randn(config.data.rows, 6, generator=g), torch.randn(200, 6, generator=g)
        self.y, self.test_y = (self.x @ truth).tanh(), (self.test @ truth).tanh()

    def batches(self, start):
        step = start
        while True:
            if self.config.run.slow:
                time.sleep(self.config.run.slow)
            rows = torch.randint(len(self.x), (self.optim.batch_size,), generator=generator(self.seed, step))
            mine = rows[self.fabric.global_rank :: self.fabric.world_size]
            yield self.x[mine], self.y[mine]
            step += 1

    def evaluate(self, student):
        return {"error": F.mse_loss(student(self.test).float(), self.test_y).item()}

    def diagnostics(self):
        projection = getattr(self.model, "projection", None)
        if not isinstance(projection, vk.OrthoProjLoss):
            return {}
        gram = projection.projection.weight.T @ projection.projection.weight
        return {"max |PᵀP - I|": (gram - torch.eye(len(gram))).abs().max().item()}

    def pictures(self, student, folder):
        runs.write_text(folder / "outputs.txt", str(student(self.test[:3]).tolist()))

    def example(self):
        return (self.test[:2],)


def build(config, seed, teacher_folder, context):
    if config.data.missing and not Path(config.data.missing).is_dir():
        raise runs.RunError(f"data.missing: there is no folder {config.data.missing}")
    return Toy(config, seed, teacher_folder, context)


def train_teacher(config, seed, folder, context):
    teacher = Net(config.teacher.width)
    runs.save_safetensors(folder / "teacher.safetensors", teacher.state_dict())
    return {"error": math.pi}


def describe(config):
    size = sum(p.numel() for p in Net(config.student.width).parameters())
    return {"student": f"{size} parameters", "features": [config.student.width, config.teacher.width],
            "steps": config.optim.total_steps(config.data.rows)}  # fmt: skip
