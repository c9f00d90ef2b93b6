"""A task of `vkd distill` that takes a second: random vectors, a wide teacher, a narrow student. For the tests."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from vkd_kernels.recipes import runs
from vkd_kernels.recipes.config import OptionError, Section, option, section
from vkd_kernels.recipes.task import Arm, DistillConfig, Metric, Optim, Run, Task, generator


class Data(Section):
    rows: int = option(64, "training rows", ge=1)
    missing: str = option("", "a folder that the training needs")


class Teacher(Section):
    width: int = option(12, "channels", ge=1, source="as wide as it needs to be")


class Student(Section):
    width: int = option(5, "channels", ge=1)
    dropout: float = option(0.1, "share of channels dropped", ge=0, lt=1)
    weights: str = option("", "weights to begin with")


class Slow(Run):
    slow: float = option(0.0, "seconds that a step waits", ge=0)


class Config(Section):
    data: Data = section(Data)
    teacher: Teacher = section(Teacher)
    student: Student = section(Student)
    distill: DistillConfig = section(DistillConfig)
    optim: Optim = section(Optim, source="a guess", steps=30, batch_size=8, lr=1e-2, warmup=0.1, ema=0.9)
    run: Slow = section(Slow, accelerator="cpu", log_every=7, eval_every=10, save_every=9)

    @model_validator(mode="after")
    def _checked(self) -> "Config":
        if self.teacher.width > 100:
            raise OptionError(f"teacher.width: at most 100, got {self.teacher.width}")
        return self


class Net(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 3)
        self.dropout = nn.Dropout(dropout)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))


class Distiller(nn.Module):
    def __init__(self, student: nn.Module, teacher: nn.Module | None, config: Any, group: Any) -> None:
        super().__init__()
        self.student, self.weight, self.frozen = student, config.distill.weight, (teacher,)
        self.feature_loss = None
        if teacher is not None:
            self.feature_loss = config.distill.feature_loss(config.student.width, config.teacher.width, group)

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        student: Any = self.student
        losses = {"task": F.mse_loss(student(x), y)}
        total = losses["task"]
        if self.feature_loss is not None:
            with torch.no_grad():
                target = self.frozen[0].features(x)
            losses["features"] = self.feature_loss(student.features(x), target)
            total = total + self.weight * losses["features"]
        return {**losses, "total": total}


class Toy(Task):
    title = "A toy: vectors, a linear teacher, a narrow student."
    Config = Config
    metric = Metric("error", "test error", higher_is_better=False, digits=3)
    compared, baseline, seeds = ("alone", "linear", "vkd"), "alone", 2
    arms = {
        "alone": Arm("student alone", {"distill.weight": 0.0}),
        "longer": Arm("student alone, equal time", {"distill.weight": 0.0}, longer=1.5),
        "linear": Arm("linear projection", {"distill.projection": "linear"}),
        "vkd": Arm("V_kD", {"distill.projection": "orthogonal", "distill.scale": 1.0}),
    }

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__(config, context)
        g = generator(self.seed)
        truth = torch.randn(6, 3, generator=g)
        self.x, self.test = torch.randn(config.data.rows, 6, generator=g), torch.randn(200, 6, generator=g)
        self.y, self.test_y = (self.x @ truth).tanh(), (self.test @ truth).tanh()

    @property
    def images(self) -> int:
        return len(self.x)

    def train_teacher(self) -> dict[str, Any]:
        if self.config.data.missing and not Path(self.config.data.missing).is_dir():
            raise runs.RunError(f"data.missing: there is no folder {self.config.data.missing}")
        teacher = Net(self.config.teacher.width)
        runs.save_safetensors(self.context.folder / "teacher.safetensors", teacher.state_dict())
        return {"error": math.pi}

    def make_student(self) -> nn.Module:
        student = Net(self.config.student.width, self.config.student.dropout)
        if self.config.student.weights:
            student.load_state_dict(runs.load_weights(Path(self.config.student.weights), "student.weights"))
        return student

    def make_model(self, student: nn.Module) -> nn.Module:
        teacher = None
        if self.config.distill.weight:
            teacher = Net(self.config.teacher.width)
            teacher.load_state_dict(runs.load_weights(self.context.teacher / "teacher.safetensors"))
        return Distiller(student, teacher, self.config, self.context.process_group)

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        step = start
        while True:
            time.sleep(self.config.run.slow)
            rows = torch.randint(len(self.x), (self.optim.batch_size,), generator=generator(self.seed, step))
            yield self.x[rows[self.mine]], self.y[rows[self.mine]]
            step += 1

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        return {"error": F.mse_loss(student(self.test).float(), self.test_y).item()}

    def pictures(self, student: nn.Module, folder: Path) -> None:
        runs.write_text(folder / "outputs.txt", str(student(self.test[:3]).tolist()))
