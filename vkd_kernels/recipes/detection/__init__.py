"""Object detection: a student learns from boxes and from a teacher's features of maps and queries (V_kD).

    vkd distill detection                                       scenes of digits, small FCOS detectors
    vkd distill detection --recipe vkd-deformable-detr-coco data.train=... teacher.weights=...

Bundled: for every seed new scenes, a teacher trained on 1500 of them, and one student per arm, all from the same
initial weights and on the same batches of the first 300 scenes: the teacher saw five times more labels than a student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vkd_kernels as vk

from ..config import OptionError
from ..engine import Context, Training, fit
from ..runs import RunError
from ..tasks import Arm, Defaults, Metric
from . import metrics, scenes
from .coco import Batch, Loader, open_coco
from .losses import DistilledDetector
from .models import Detections, Detector, has_weights, load_weights, make_detector
from .options import Config, DetectorConfig

TITLE = (__doc__ or "").splitlines()[0]
PRIMARY = Metric("AP", "AP")

ARMS = {
    "alone": Arm("student alone", {"distill.weight": 0.0}),
    "alone-longer": Arm("student alone, equal time", {"distill.weight": 0.0}, longer=1.7),
    "linear": Arm("linear projection", {"distill.projection": "linear"}),
    "vkd": Arm("V_kD", {"distill.projection": "orthogonal"}),
}
DEFAULTS = Defaults(arms=tuple(ARMS), seeds=3, baseline="alone")
SHOWN = 8  # images in a picture


class Data:
    """Training and evaluation images of a configuration; the scenes of a seed where there are none of one's own."""

    def __init__(self, config: Config, seed: int, *, labelled: int = 0) -> None:
        d = config.data
        if d.train:
            self.train = open_coco(d.train, d.train_annotations, "data.train", d.bad_boxes)
            self.val = open_coco(d.val, d.val_annotations, "data.val", d.bad_boxes)
        elif d.channels != 1:
            raise OptionError("data.train: missing; without it the data are grey scenes (data.channels=1)")
        else:
            self.train, self.val = scenes.compose_data(seed, labelled or config.scenes.train, config.scenes.val)
        if self.train.names != self.val.names:
            different = sorted({*self.train.names.items()} ^ {*self.val.names.items()})
            raise RunError(
                f"{self.train.where} and {self.val.where}: their categories differ, in {different[0][1]!r} "
                f"(id {different[0][0]}) and {len(different) - 1} more"
            )
        if d.classes not in (0, len(self.train.names)):
            raise RunError(
                f"data.classes is {d.classes}, but {self.train.where} has {len(self.train.names)} categories"
            )
        if labelled > len(self.train):
            raise OptionError(f"data.labelled: {labelled}, but there are only {len(self.train)} training images")
        self.images, self.classes, self.channels = labelled or len(self.train), len(self.train.names), d.channels


class Detection(Training):
    """A student of one seed in one arm, or a teacher that learns from labels alone."""

    def __init__(
        self, model: nn.Module, student: nn.Module, config: Config, optim: Any, data: Data, seed: int, context: Context
    ) -> None:
        super().__init__(model, student, optim, optim.total_steps(data.images))
        self.data, self.seed, self.fabric = data, seed, context.fabric
        self.loader = Loader(data.train, config, context.fabric, images=data.images, train=True)
        self.held_out = Loader(data.val, config, context.fabric, images=len(data.val), train=False)
        self.teacher: Teacher | None = None

    def batches(self, start: int) -> Iterator[Batch]:
        for batch in self.loader.training(self.optim.batch_size, self.seed, start):
            if self.teacher is not None:
                batch.teacher = self.teacher(batch)
            yield batch

    def detect(self, student: Any, indices: list[int]) -> Iterator[tuple[int, Tensor, tuple[int, int], Detections]]:
        """(index, image (C, H, W), its height and width, detections in its pixels)."""
        for batch in self.held_out.in_order(indices):
            found = student.detections(student.predict(batch.images, batch.inside), batch.inside)
            for index, image, inside, each in zip(batch.index.tolist(), batch.images, batch.inside, found, strict=True):
                height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
                yield index, image[:, :height, :width].cpu(), (height, width), each

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        f, seen, rows = self.fabric, list[int](), list[metrics.Row]()
        for index, _, size, found in self.detect(student, [*range(len(self.data.val))][f.global_rank :: f.world_size]):
            seen.append(index)
            rows += metrics.coco_rows(self.data.val, index, found, size)
        if f.world_size > 1:
            parts: list[Any] = [None] * f.world_size
            torch.distributed.all_gather_object(parts, (seen, rows))
            seen, rows = [i for part in parts for i in part[0]], [row for part in parts for row in part[1]]
        return metrics.average_precision(self.data.val, seen, rows)

    def diagnostics(self) -> dict[str, float]:
        """max |P^T P - I| of the projections, also of linear ones; how many images could not be read."""
        found: dict[str, float] = {}
        loss: Any = getattr(self.model, "feature_loss", None)
        if loss is not None:
            errors = [
                vk.diagnostics.orthogonality_error(p) for shape in loss.projections.values() for p in shape.weight
            ]
            found["max |PᵀP - I|"] = float(torch.stack(errors).max())
        broken = len(self.loader.unreadable | self.held_out.unreadable)
        return found | ({"unreadable images": float(broken)} if broken else {})

    def pictures(self, student: nn.Module, folder: Path) -> None:
        data, pairs = self.data.val, []
        mean, std = self.held_out.mean, self.held_out.std
        for index, image, size, found in self.detect(student, [*range(min(SHOWN, len(data)))]):
            width, height = data.sizes[index]
            scale = torch.tensor([size[1] / width, size[0] / height] * 2)
            boxes, labels = torch.from_numpy(data.boxes[index]), torch.from_numpy(data.labels[index])
            truth = Detections(boxes * scale, torch.ones(len(labels)), labels)
            pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            pairs.append((pixels, truth, Detections(*(x.cpu() for x in found))))
        if pairs:
            metrics.save_pictures(folder / "detections.png", pairs, [data.names[id] for id in data.categories])

    def example(self) -> tuple[Tensor, Tensor]:
        side = scenes.CANVAS if self.data.channels == 1 else 256
        return torch.zeros(1, self.data.channels, side, side), torch.ones(1, side, side, dtype=torch.bool)


class Teacher:
    """A frozen detector's features of a batch, from memory where an image is always the same."""

    def __init__(self, model: Detector, config: Config, data: Data, context: Context) -> None:
        self.fabric = context.fabric
        self.model: Any = self.fabric.to_device(model.requires_grad_(False).eval())
        self.stored: dict[str, Tensor] = {}
        if config.teacher.cache:
            self.store(Loader(data.train, config, context.fabric, images=data.images, train=True), data)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        if self.stored:
            return {name: stored[batch.index] for name, stored in self.stored.items()}
        with torch.no_grad(), self.fabric.autocast():
            return self.model.predict(batch.images, batch.inside).features

    def store(self, loader: Loader, data: Data) -> None:
        if len(sizes := {*data.train.sizes}) > 1:
            raise OptionError(f"teacher.cache: the images have {len(sizes)} sizes; teacher.cache=false")
        parts: dict[str, list[Tensor]] = {name: [] for name in self.model.dims}
        for batch in loader.in_order([*range(data.images)]):
            for name, features in self(batch).items():
                parts[name].append(features)
        self.stored = {name: torch.cat(found) for name, found in parts.items()}


# ---- what the engine calls -------------------------------------------------------------------------------------------


def trained_here(config: Config) -> bool:
    t = config.teacher
    return t.steps > 0 and not t.weights and not has_weights(t.name)


def new_teacher(config: Config, data: Data) -> Detector:
    """The teacher with its weights, or an untrained one where it is trained here."""
    t = config.teacher
    classes = t.classes or data.classes
    teacher = make_detector(t, classes, data.channels)
    if t.weights:
        load_weights(teacher, Path(t.weights), classes, "teacher.weights")
    elif not trained_here(config) and not has_weights(t.name):
        raise OptionError("teacher.weights: give a file, or teacher.steps > 0 to train the teacher here")
    return teacher


def train_teacher(config: Config, seed: int, folder: Path, context: Context) -> dict[str, Any]:
    """Train the seed's teacher on all training images, or check that its weights fit."""
    if not config.distill.weight:
        return {}
    data, t = Data(config, seed), config.teacher
    teacher = new_teacher(config, data)
    if not trained_here(config):
        return {}
    optim = dataclasses.replace(
        config.optim, lr=t.lr, min_lr=0.0, steps=t.steps, epochs=0.0, batch_size=t.batch_size, accumulate=1, ema=0.0
    )
    no_distillation = dataclasses.replace(config.distill, weight=0.0)
    model = DistilledDetector(teacher, no_distillation, {}, context.process_group)
    run = dataclasses.replace(config.run, eval_every=0)
    result = fit(
        Detection(model, teacher, config, optim, data, seed, context), run, context, weights="teacher.safetensors"
    )
    return {name: result[name] for name in ("AP", "AP50", "AP75", "seconds", "cpu_seconds")}


def build(config: Config, seed: int, teacher_folder: Path | None, context: Context) -> Detection:
    data = Data(config, seed, labelled=config.data.labelled)
    student = make_detector(config.student, data.classes, data.channels)
    if config.student.weights:
        load_weights(student, Path(config.student.weights), data.classes, "student.weights")
    if teacher_folder is None:  # to evaluate it
        return Detection(student, student, config, config.optim, data, seed, context)
    if not config.distill.weight:
        model = DistilledDetector(student, config.distill, {}, context.process_group)
        return Detection(model, student, config, config.optim, data, seed, context)
    teacher = new_teacher(config, data)
    if trained_here(config):
        load_weights(teacher, teacher_folder / "teacher.safetensors", teacher.classes, "teacher")
    model = DistilledDetector(student, config.distill, teacher.dims, context.process_group)
    training = Detection(model, student, config, config.optim, data, seed, context)
    training.teacher = Teacher(teacher, config, data, context)
    return training


def describe(config: Config) -> dict[str, Any]:
    """Sizes and shapes of the models; reads own data only to learn the number of classes."""
    d = config.data
    classes = d.classes or (Data(config, 0).classes if d.train else scenes.CLASSES)
    found: dict[str, Any] = {}
    sides: dict[str, DetectorConfig] = {"student": config.student}
    if config.distill.weight:
        sides["teacher"] = config.teacher
    dims = {}
    for side, detector in sides.items():
        model = make_detector(detector, classes, config.data.channels, empty=True)
        dims[side] = model.dims
        found[side] = {
            "model": detector.name, "parameters": sum(p.numel() for p in model.parameters()), "classes": model.classes,
            "features (channels)": model.dims,
        }  # fmt: skip
    if config.distill.weight:
        found["projections (teacher, student)"] = {
            name: [dims["teacher"][name], s] for name, s in dims["student"].items() if name in dims["teacher"]
        }
    o = config.optim
    return found | {"steps": o.steps or f"{o.epochs:g} epochs", "images per step": o.batch_size}
