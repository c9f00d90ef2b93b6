"""Image classification: a student learns from labels, a teacher's logits and a teacher's features (V_kD).

    vkd distill classification                                          digits, a CNN teacher, tiny transformers
    vkd distill classification --recipe vkd-deit-ti-imagenet data.root=... teacher.weights=...

Bundled: for every seed a new split, a teacher trained on it, and one student per arm, all from the same initial weights
and on the same batches. Only a hundred training images have labels a student may use; the others reach it through the
teacher. The same program takes any data set of torchvision or folder of images and any model of timm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vkd_kernels as vk

from ..engine import Context, Training, fit
from ..tasks import Arm, Defaults, Metric
from . import losses, models
from .data import Data, open_data
from .options import Config
from .teachers import Teacher, trained_here

TITLE = (__doc__ or "").splitlines()[0]
PRIMARY = Metric("accuracy", "accuracy %")

ARMS = {
    "alone": Arm("student alone", {"distill.logit_weight": 0.0, "distill.weight": 0.0}),
    "logits": Arm("logit distillation", {"distill.weight": 0.0}),
    "logits-longer": Arm("logit distillation, equal time", {"distill.weight": 0.0}, longer=1.15),
    "linear": Arm("logits + linear projection", {"distill.projection": "linear"}),
    "vkd": Arm("V_kD as published (scale 1)", {"distill.projection": "orthogonal", "distill.scale": 1.0}),
    "vkd-match": Arm('V_kD, scale="match"', {"distill.projection": "orthogonal", "distill.scale": "match"}),
}
DEFAULTS = Defaults(arms=tuple(ARMS), seeds=3, baseline="logits", focus=("vkd", "vkd-match"))


class Classification(Training):
    """One student of one seed, in one arm."""

    def __init__(self, config: Config, data: Data, teacher: Teacher | None, steps: int, context: Context) -> None:
        self.config, self.data, self.teacher, self.fabric = config, data, teacher, context.fabric
        distill, shape = config.distill, models.shape_of(data)
        student = models.make_student(config.student, shape)
        share = data.labelled_share if needs_teacher(config) else 1.0
        width = models.teacher_width(config.teacher, shape) if distill.weight else 0
        model = losses.DistilledStudent(student, distill, width, share, context.process_group)
        self.feature_loss = model.feature_loss
        super().__init__(model, student, config.optim, steps)
        if not needs_teacher(config):
            self.images_per_step = round(config.optim.batch_size * data.labelled_share)

    def batches(self, start: int) -> Iterator[losses.Batch]:
        f, distill, learner = self.fabric, self.config.distill, "distilled" if self.teacher else "alone"
        for samples in self.data.batches(learner, start, self.optim.batch_size, f.global_rank, f.world_size):
            logits, features = self.teacher(samples) if self.teacher else (None, None)
            images, targets = f.to_device((samples.images, samples.targets))
            yield losses.Batch(
                images, targets, logits if distill.logit_weight else None, features if distill.weight else None
            )

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        return accuracy(student, self.data, self.fabric)

    def diagnostics(self) -> dict[str, float]:
        """max |PᵀP - I| of the projection, also of the linear one."""
        if self.feature_loss is None:
            return {}
        weight = self.feature_loss.projection.weight.detach()
        return {"max |PᵀP - I|": vk.diagnostics.orthogonality_error(weight).item()}

    def example(self) -> tuple[torch.Tensor]:
        return (torch.zeros(2, self.data.channels, self.data.size, self.data.size),)


class TeacherTraining(Training):
    """A teacher learns from the labels of all training images."""

    def __init__(self, config: Config, data: Data, context: Context) -> None:
        self.config, self.data, self.fabric, t = config, data, context.fabric, config.teacher
        teacher = models.make_teacher(t, models.shape_of(data))
        optim = dataclasses.replace(
            config.optim, lr=t.lr, min_lr=0.0, steps=t.steps, epochs=0.0, batch_size=t.batch_size, accumulate=1, ema=0.0
        )
        no_distillation = dataclasses.replace(config.distill, weight=0.0, logit_weight=0.0)
        super().__init__(losses.DistilledStudent(teacher, no_distillation, 0), teacher, optim, t.steps)

    def batches(self, start: int) -> Iterator[losses.Batch]:
        f = self.fabric
        for samples in self.data.batches("teacher", start, self.optim.batch_size, f.global_rank, f.world_size):
            yield losses.Batch(*f.to_device((samples.images, samples.targets)))

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        return accuracy(student, self.data, self.fabric)


def needs_teacher(config: Config) -> bool:
    return bool(config.distill.weight or config.distill.logit_weight)


def accuracy(model: nn.Module, data: Data, fabric: Any) -> dict[str, float]:
    """Of the held-out images of all ranks, in per cent; for many classes also whether it is among the first five."""
    first = 5 if data.classes > 10 else 1
    counts = torch.zeros(3)  # right, among the first, all
    for images, labels in data.held_out(fabric.global_rank, fabric.world_size):
        logits = model(fabric.to_device(images))
        right = (logits.topk(first, dim=1).indices.cpu() == labels.unsqueeze(1)) & (labels >= 0).unsqueeze(1)
        counts += torch.stack([right[:, 0].sum(), right.sum(), (labels >= 0).sum()])
    right, among, count = fabric.all_reduce(fabric.to_device(counts), reduce_op="sum").tolist()
    found = {"accuracy": 100 * right / max(1, count)}
    return found | ({"accuracy_top5": 100 * among / max(1, count)} if first > 1 else {})


# ---- what the engine calls -------------------------------------------------------------------------------------------


def train_teacher(config: Config, seed: int, folder: Path, context: Context) -> dict[str, Any]:
    """Train the seed's teacher or read its weights, measure it, and store its answers to fixed views."""
    found: dict[str, Any] = {}
    if not needs_teacher(config):
        return found
    data = open_data(config, seed)
    teacher = Teacher(config, data, folder, context)
    if trained_here(config):
        result = fit(TeacherTraining(config, data, context), config.run, context, weights="teacher.safetensors")
        found = {name: result[name] for name in ("accuracy", "seconds", "cpu_seconds")}
    elif config.teacher.classes in (0, data.classes):
        with torch.no_grad(), context.fabric.autocast():
            found = accuracy(teacher.model, data, context.fabric)
    if teacher.cache:
        _ = teacher.stored
    return found


def build(config: Config, seed: int, teacher_folder: Path | None, context: Context) -> Classification:
    """One student to be trained; without a teacher's folder, to be evaluated or exported."""
    data = open_data(config, seed)
    if teacher_folder is None:
        return Classification(config, data, None, 0, context)
    teacher = Teacher(config, data, teacher_folder, context) if needs_teacher(config) else None
    return Classification(config, data, teacher, config.optim.total_steps(data.images), context)


def describe(config: Config) -> dict[str, Any]:
    """Sizes and shapes of the models; reads the data set only to learn its number of classes."""
    shape = models.Shape(config.data.classes, config.data.size, 3)
    if config.data.name == "digits" or not config.data.classes:
        shape = models.shape_of(open_data(config, 0))
    sides: dict[str, models.Model] = {"student": models.make_student(config.student, shape, empty=True)}
    if needs_teacher(config):
        sides["teacher"] = models.make_teacher(config.teacher, shape, empty=True)
    optim, found = config.optim, dict[str, Any]()
    for side, model in sides.items():
        tokens = models.run(model, torch.empty(2, shape.channels, shape.size, shape.size, device="meta")).tokens
        found[side] = {
            "model": getattr(config, side).name, "parameters": sum(p.numel() for p in model.parameters()),
            "images": [shape.channels, shape.size, shape.size], "classes": model.num_classes,
            "features (positions, channels)": list(tokens.shape[1:]),
        }  # fmt: skip
    if config.distill.weight:
        found["projection (teacher, student)"] = [model.num_features for model in (sides["teacher"], sides["student"])]
    return found | {"steps": optim.steps or f"{optim.epochs:g} epochs", "images per step": optim.batch_size}
