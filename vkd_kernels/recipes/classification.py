"""Image classification: a student learns from labels, a teacher's logits and a teacher's features (V_kD).

    vkd distill classification                                          digits, a CNN teacher, tiny transformers
    vkd distill classification --recipe fashion-mnist data.root=...     28x28 images of which few have labels
    vkd distill classification --recipe vkd-deit-ti-imagenet data.root=... teacher.weights=...

    L = CE(class head, labels) + logit_weight * KL(teacher || distillation head) + weight * smooth_l1(X P^T, norm(Y))

Bundled: for every seed a new split, a teacher trained on it, and one student per arm, all from the same initial weights
and on the same batches. Only a hundred training images have labels a student may use; the others reach it through the
teacher. The same program takes any data set of torchvision or folder of images and any model of timm.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from . import engine, models, runs
from .config import Channels, Floats, Ints, OptionError, Section, option, section
from .digits import Digits
from .images import Images, open_images
from .task import Arm, Context, DistillConfig, Metric, Optim, Run, Task

RELEASED = "released code"
CONFIGS = Path(__file__).parent / "configs"


class Data(Section):
    name: str = option("digits", "digits (bundled), folder, or the name of a data set of torchvision: CIFAR100, ...")
    root: str = option("", "where the images are; of a folder: root/train/<class>/*, root/val/<class>/*")
    download: bool = option(False, "let torchvision fetch what is missing")
    train_split: str = option("", "folder or split to train on; default: train")
    test_split: str = option("", "folder or split to evaluate on; default: val in a folder, test in torchvision")
    classes: int = option(0, "number of classes; 0: what the data say", ge=0)
    labels: float = option(1.0, "share of the training images whose labels a student may see", gt=0, le=1)
    labeled_share: float = option(0.5, "labeled images of a batch, as a share, where not all are", gt=0, le=1)
    size: int = option(224, "side of the images in pixels; digits have 8", source=RELEASED, ge=8)
    channels: Channels = option(3, "of the images: 1 for gray")
    crop: float = option(0.875, "evaluation: share of the shorter side that is seen", source=RELEASED, gt=0, le=1)
    mean: Floats = option((0.485, 0.456, 0.406), "of the channels: what the teacher was trained with", source="timm")
    std: Floats = option((0.229, 0.224, 0.225), "of the channels", source="timm")


class Augment(Section):
    """Of real images; the digits have their own."""

    enabled: bool = option(True, "false: train on what evaluation sees, and mix nothing")
    views: int = option(0, "fixed views of every image, whose answers are stored; 0: new ones each step", ge=0)
    pad: int = option(0, "small images: shifts by up to so many pixels instead of all but the flip", ge=0)
    crop_min: float = option(0.08, "smallest area of a random crop", source=RELEASED, gt=0, le=1)
    flip: float = option(0.5, "probability of a horizontal flip", source=RELEASED, ge=0, le=1)
    three_augment: bool = option(True, "one of grayscale, solarize, Gaussian blur", source="DeiT III")
    color_jitter: float = option(0.3, "change of brightness, contrast, saturation", source=RELEASED, ge=0)
    mixup: float = option(0.8, "alpha of mixup; 0: none", source=RELEASED, ge=0)
    cutmix: float = option(1.0, "alpha of CutMix; 0: none", source=RELEASED, ge=0)
    mix_switch: float = option(0.5, "probability of CutMix where both are on", source=RELEASED, ge=0, le=1)


class DigitsConfig(Section):
    pool: int = option(1000, "training images of the 1797; the others are the test set", ge=100, le=1700)
    labels_per_class: int = option(10, "labeled training images per digit, for the students", ge=1)
    labeled_share: float = option(0.5, "labeled images of a batch, as a share", gt=0, le=1)
    views: int = option(16, "fixed augmented views of every image", ge=1)
    rotation: float = option(15.0, "largest rotation of a view, in degrees", ge=0)
    scaling: float = option(0.15, "largest change of size of a view", ge=0)
    shift: float = option(0.2, "largest shift of a view, in half widths", ge=0)
    shear: float = option(0.15, "largest shear of a view", ge=0)


class Teacher(Section):
    name: str = option("small_cnn", "small_cnn (bundled), or any model of timm")
    weights: str = option("", "its weights, a .safetensors or .pth file; default: it is trained here")
    pretrained: bool = option(False, "let timm fetch its weights")
    classes: int = option(0, "classes of its head; 0: the data's. Others only without logit distillation", ge=0)
    cache: str = option("auto", "folder for its answers to fixed views; auto: in the run folder; none: never")
    widths: Ints = option((24, 48, 96, 192), "channels of small_cnn's convolutions", min_length=1)
    pools: Ints = option((2,), "after which of them small_cnn halves its maps")
    steps: int = option(300, "training steps, where it is trained here", ge=0)
    batch_size: int = option(64, "images per training step", ge=2)
    lr: float = option(2e-3, "peak learning rate", gt=0)


class Student(Section):
    name: str = option("small_vit", f"{', '.join(models.STUDENTS)} (the paper's), small_vit (bundled), any of timm")
    weights: str = option("", "weights to begin with, a .safetensors or .pth file")
    drop_path: float = option(0.0, "stochastic depth", source=RELEASED, ge=0, lt=1)
    width: int = option(48, "channels of small_vit", ge=1)
    depth: int = option(3, "blocks of small_vit", ge=1)
    heads: int = option(4, "attention heads of small_vit", ge=1)
    mlp_ratio: int = option(2, "hidden channels of small_vit's MLPs, in widths", ge=1)
    patch: int = option(2, "patch size of small_vit", ge=1)


class Distill(DistillConfig):
    features: Literal["pooled", "tokens"] = option("pooled", "compared: means over the positions, or every position")
    logit_weight: float = option(1.0, "weight of the logit loss", source=RELEASED, ge=0)
    temperature: float = option(1.0, "of the logit loss", source=RELEASED, gt=0)
    label_smoothing: float = option(0.1, "of the labels", source=RELEASED, ge=0, lt=1)


class Config(Section):
    data: Data = section(Data)
    augment: Augment = section(Augment)
    digits: DigitsConfig = section(DigitsConfig)
    teacher: Teacher = section(Teacher)
    student: Student = section(Student)
    distill: Distill = section(Distill, weight=10.0)
    optim: Optim = section(Optim, lr=3e-3, warmup=0.1, steps=600, batch_size=64)
    run: Run = section(Run, eval_every=60, save_every=100)

    @model_validator(mode="after")
    def _checked(self) -> Config:
        data, pool = self.data, self.digits.pool
        if self.digits.labels_per_class * 10 >= pool:
            raise OptionError(
                f"digits.labels_per_class: {self.digits.labels_per_class} leave nothing unlabeled of a pool of "
                f"{pool} images"
            )
        labeled = self.optim.batch_size * self.labeled_share
        if labeled < 1 or labeled != round(labeled):
            raise OptionError(
                f"{'digits' if data.name == 'digits' else 'data'}.labeled_share: {labeled:g} of "
                f"{self.optim.batch_size} images are no whole number"
            )
        if self.teacher.classes and self.distill.logit_weight:
            raise OptionError(
                f"teacher.classes: logits of {self.teacher.classes} classes teach only with distill.logit_weight=0"
            )
        t = self.teacher
        if self.needs_teacher and t.classes not in (0, data.classes) and t.steps and not (t.weights or t.pretrained):
            raise OptionError(
                f"teacher.classes: {t.classes}, but a teacher that is trained here learns the data's classes: leave "
                "teacher.classes out, or give teacher.weights or teacher.pretrained=true"
            )
        if not len(data.mean) == len(data.std) == data.channels:
            raise OptionError(f"data.mean, data.std: one per channel, {data.channels}; got {data.mean} and {data.std}")
        if data.name != "digits" and not Path(data.root).is_dir() and not data.download and data.root:
            raise OptionError(f"data.root: there is no folder {data.root}")
        return self

    @property
    def labeled_share(self) -> float:
        """Of a batch."""
        if self.data.name == "digits":
            return self.digits.labeled_share
        return self.data.labeled_share if self.data.labels < 1 else 1.0

    @property
    def needs_teacher(self) -> bool:
        return bool(self.distill.weight or self.distill.logit_weight)


class DistilledStudent(nn.Module):
    """What is trained: the student, and the projection of the feature loss beside it. `forward(batch)` -> losses.

    Both are in one module so that data-parallel wrapping reduces the gradients of both. Every rank holds as many images
    as any other, so the mean of the ranks' losses is the loss of the global batch.
    """

    def __init__(
        self, student: models.Model, distill: Distill, teacher_dim: int, *, labeled_share: float, group: Any = None
    ) -> None:
        super().__init__()
        self.student, self.distill, self.labeled_share = student, distill, labeled_share
        self.feature_loss = None
        if distill.weight and teacher_dim:
            self.feature_loss = distill.feature_loss(student.num_features, teacher_dim, group)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens, logits, distilled = models.run(self.student, batch["images"])
        losses = {"labels": self.label_loss(logits, batch["targets"])}
        total = losses["labels"]
        if "logits" in batch:
            t = self.distill.temperature
            ours, theirs = (F.log_softmax(x.float() / t, dim=1) for x in (distilled, batch["logits"]))
            losses["logits"] = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * t**2
            total = total + self.distill.logit_weight * losses["logits"]
        elif distilled is not logits:  # nobody else teaches the second head, and its logits count in evaluation
            losses["labels"] = total = (total + self.label_loss(distilled, batch["targets"])) / 2
        if self.feature_loss is not None:
            losses["features"] = self.feature_loss(*same_positions(tokens, batch["features"]))
            total = total + self.distill.weight * losses["features"]
        return {**losses, "total": total}

    def label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, mean over the global batch's labeled images: that of a target of zeros is zero."""
        return F.cross_entropy(logits.float(), targets) / self.labeled_share


def same_positions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Student's (N, P, S) against the teacher's (N, T): the mean; against (N, P', T): the finer grid resampled."""
    if teacher.dim() == 2:
        return student.mean(dim=1), teacher
    count = min(student.shape[1], teacher.shape[1])
    return resampled(student, count), resampled(teacher, count)


def resampled(tokens: Tensor, count: int) -> Tensor:  # (N, P, C) -> (N, count, C)
    before, after = math.isqrt(tokens.shape[1]), math.isqrt(count)
    if tokens.shape[1] == count:
        return tokens
    if (before**2, after**2) != (tokens.shape[1], count):
        raise OptionError(
            f"distill.features: tokens can be compared on square grids only, got {tokens.shape[1]} and {count} "
            "positions; use distill.features=pooled"
        )
    grid = tokens.float().transpose(1, 2).unflatten(2, (before, before))
    return F.interpolate(grid, (after, after), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


class Classification(Task):
    title = "Image classification: a student learns from labels, a teacher's logits and a teacher's features (V_kD)."
    Config = Config
    metric = Metric("accuracy", "accuracy %")
    arms = {
        "alone": Arm("student alone", {"distill.logit_weight": 0.0, "distill.weight": 0.0}),
        "logits": Arm("logit distillation", {"distill.weight": 0.0}),
        "logits-longer": Arm("logit distillation, equal time", {"distill.weight": 0.0}, longer=1.15),
        "linear": Arm("logits + linear projection", {"distill.projection": "linear"}),
        "vkd": Arm("V_kD as published (scale 1)", {"distill.projection": "orthogonal", "distill.scale": 1.0}),
        "vkd-match": Arm('V_kD, scale="match"', {"distill.projection": "orthogonal", "distill.scale": "match"}),
    }
    compared, baseline = tuple(arms), "logits"
    recipes = CONFIGS / "classification"

    @cached_property
    def data(self) -> Digits | Images:
        return (Digits if self.config.data.name == "digits" else Images)(self.config, self.seed)

    # ---- the teacher -------------------------------------------------------------------------------------------------

    def train_teacher(self) -> dict[str, Any]:
        """Train the seed's teacher or read its weights, measure it, and store its answers to fixed views."""
        if not self.config.needs_teacher:
            return {}
        numbers: dict[str, Any] = {}
        if trained_here(self.config):
            result = engine.train(TeacherTraining(self.config, self.context), weights="teacher.safetensors")
            numbers = {name: result[name] for name in ("accuracy", "seconds", "cpu_seconds")}
        elif self.config.teacher.classes in (0, self.data.classes):
            with torch.no_grad(), self.fabric.autocast():
                numbers = self.evaluate(self.teacher)
        if self.cache:
            _ = self.answers
        return numbers

    @cached_property
    def teacher(self) -> models.Model:
        """Frozen, on this rank's device."""
        weights = self.config.teacher.weights
        if trained_here(self.config):
            assert self.context.teacher is not None
            weights = str(self.context.teacher / "teacher.safetensors")
        model = models.make_teacher(self.config.teacher, models.shape_of(self.data), weights)
        return self.fabric.to_device(model.requires_grad_(False).eval())

    @torch.no_grad()
    def ask(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits (N, classes) and features, (N, T) or (N, positions, T)."""
        with self.fabric.autocast():
            tokens, logits, _ = models.run(self.teacher, self.fabric.to_device(images))
        return logits, tokens.mean(dim=1) if self.config.distill.features == "pooled" else tokens

    @cached_property
    def cache(self) -> Path | None:
        """Where answers to fixed views are stored."""
        cache, fresh = self.config.teacher.cache, self.data.fresh
        if cache not in ("auto", "none") and fresh:
            raise OptionError(f"teacher.cache: {cache} would hold answers to other images than are shown: {fresh}")
        if cache == "none" or fresh:
            return None
        return self.context.teacher if cache == "auto" else Path(cache)

    @cached_property
    def answers(self) -> numpy.ndarray:  # (views x images,), a record of logits and features each; read page by page
        """To every fixed view. Their file is named after all that they depend on."""
        assert self.cache is not None
        t, folder = self.config.teacher, self.context.teacher
        digest = hashlib.sha256(repr((t.name, t.classes, self.config.distill.features, self.optim.precision)).encode())
        weights = Path(t.weights) if t.weights else folder / "teacher.safetensors" if folder else Path()
        if weights.is_file():
            digest.update(weights.read_bytes())
        digest.update(self.data.fingerprint().encode())
        path = self.cache / f"answers-{digest.hexdigest()[:16]}.npy"
        if not path.exists() and self.fabric.is_global_zero:
            runs.write_atomically(path, self.write_answers)
        self.fabric.barrier()
        try:
            return numpy.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise runs.RunError(f"cannot read {path} ({error}): delete this file to have it made again") from error

    def write_answers(self, file: Any) -> None:
        for number, images in enumerate(self.data.every_view()):
            logits, features = (x.float().cpu().numpy() for x in self.ask(images))
            kind = numpy.dtype([("logits", "f4", logits.shape[1:]), ("features", "f4", features.shape[1:])])
            if number == 0:
                shape = (self.data.views * self.data.images,)
                header = {"descr": numpy.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
                numpy.lib.format.write_array_header_1_0(file, header)
            records = numpy.empty(len(images), kind)
            records["logits"], records["features"] = logits, features
            file.write(records.tobytes())

    # ---- the student -------------------------------------------------------------------------------------------------

    def make_student(self) -> nn.Module:
        return models.make_student(self.config.student, models.shape_of(self.data))

    def make_model(self, student: nn.Module) -> nn.Module:
        c = self.config
        width = models.teacher_width(c.teacher, models.shape_of(self.data)) if c.distill.weight else 0
        share = c.labeled_share if c.needs_teacher else 1.0  # a student alone sees labeled images only
        return DistilledStudent(student, c.distill, width, labeled_share=share, group=self.context.process_group)

    @property
    def images(self) -> int:
        return self.data.images

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        learner, distill = "distilled" if self.config.needs_teacher else "alone", self.config.distill
        f = self.fabric
        for images, targets, rows in self.data.batches(
            learner, start, self.optim.batch_size, f.global_rank, f.world_size
        ):
            batch = {"images": images, "targets": targets}
            if self.config.needs_teacher:
                if self.cache and rows is not None:
                    record = self.answers[rows.numpy()]
                    logits, features = (torch.from_numpy(record[name].copy()) for name in ("logits", "features"))
                else:
                    logits, features = self.ask(images)
                batch |= {"logits": logits} if distill.logit_weight else {}
                batch |= {"features": features} if distill.weight else {}
            yield f.to_device(batch)

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        """Accuracy on the held-out images of all ranks; for many classes also whether it is among the first five."""
        first = 5 if self.data.classes > 10 else 1
        counts = torch.zeros(3)  # right, among the first, all
        for images, labels in self.data.held_out(self.fabric.global_rank, self.fabric.world_size):
            top = student(self.fabric.to_device(images)).topk(first, dim=1).indices.cpu()
            right = top == labels.unsqueeze(1)
            counts += torch.stack([right[:, 0].sum(), right.sum(), torch.tensor(len(labels))])
        right, among, count = self.fabric.all_reduce(self.fabric.to_device(counts), reduce_op="sum").tolist()
        if not count:
            raise runs.RunError(f"data.root: no held-out image of {self.config.data.root} can be read")
        return {"accuracy": 100 * right / count} | ({"accuracy_top5": 100 * among / count} if first > 1 else {})

    @classmethod
    def describe(cls, config: Any) -> dict[str, Any]:
        """Opens a data set only to learn its number of classes, or to see whether it is there."""
        data = config.data
        shape = models.Shape(data.classes, data.size, data.channels)
        if data.name == "digits":
            shape = models.Shape(10, 8, 1)
        elif not data.classes or data.root:
            shape = models.shape_of(Images(config, 0))
        sides: dict[str, models.Model] = {"student": models.make_student(config.student, shape, empty=True)}
        if config.needs_teacher:
            sides["teacher"] = models.make_teacher(config.teacher, shape, empty=True)
        about: dict[str, Any] = {}
        for side, model in sides.items():
            tokens = models.run(model, torch.empty(2, shape.channels, shape.size, shape.size, device="meta")).tokens
            about[side] = {
                "model": getattr(config, side).name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "images": [shape.channels, shape.size, shape.size],
                "classes": model.num_classes,
                "features (positions, channels)": list(tokens.shape[1:]),
            }
        if config.distill.weight:
            about["projection (teacher, student)"] = [m.num_features for m in (sides["teacher"], sides["student"])]
        o = config.optim
        return about | {"steps": o.steps or f"{o.epochs:g} epochs", "images per step": o.batch_size}

    @classmethod
    def check(cls, config: Any) -> None:
        if config.data.name != "digits":
            open_images(config.data)
        trains_teacher = config.needs_teacher and trained_here(config)
        for option_, path in (("teacher.weights", config.teacher.weights), ("student.weights", config.student.weights)):
            if path and not trains_teacher and not Path(path).is_file():
                raise OptionError(f"{option_}: there is no file {path}")
        cls.describe(config)


class TeacherTraining(Classification):
    """The same with the teacher in the student's place: it learns from the labels of all training images."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        t = config.teacher
        changes = {"lr": t.lr, "min_lr": 0.0, "steps": t.steps, "epochs": 0.0, "batch_size": t.batch_size}
        self.optim = config.optim.model_copy(update={**changes, "ema": 0.0})

    def make_student(self) -> nn.Module:
        return models.make_teacher(self.config.teacher, models.shape_of(self.data))

    def make_model(self, student: nn.Module) -> nn.Module:
        return DistilledStudent(student, self.config.distill, 0, labeled_share=1.0)

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        f = self.fabric
        for images, targets, _ in self.data.batches(
            "teacher", start, self.optim.batch_size, f.global_rank, f.world_size
        ):
            yield f.to_device({"images": images, "targets": targets})


def trained_here(config: Any) -> bool:
    """Whether the teacher is trained by this run; an error where its weights come from nowhere."""
    t = config.teacher
    if t.weights or t.pretrained:
        return False
    if not t.steps:
        raise OptionError(
            "teacher.weights: give a file with the teacher's weights, or teacher.pretrained=true to have timm fetch "
            "them, or teacher.steps=N to train it here"
        )
    return True
