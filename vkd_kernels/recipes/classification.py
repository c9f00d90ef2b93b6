"""Image classification: a student learns from labels, a teacher's logits and a teacher's features (V_kD).

    vkd distill classification                                          digits, a CNN teacher, tiny transformers
    vkd distill classification --recipe fashion-mnist data.root=...     28x28 images of which few have labels
    vkd distill classification --recipe vkd-deit-ti-imagenet data.root=... teacher.weights=...

    L = CE(class head, labels) + logit_weight * KL(teacher || distillation head) + weight * smooth_l1(X P^T, norm(Y))

Without options: for every seed a new split of the digits, a teacher trained on it, and one student per arm, all from
the same initial weights and on the same batches. A student sees the labels of a hundred training images; the others
reach it through the teacher. The same program takes a folder of images or a data set of torchvision, and any model of
timm.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

import vkd_kernels as vk

from . import engine, models
from .config import Channels, Floats, Ints, OptionError, Section, UserPath, flatten, option, section, show
from .images import Images, Source
from .task import RELEASED, Arm, DistillConfig, Metric, Optim, Run, Task, as_teacher, check_enough, check_parts, ranks


class Data(Source):
    labels: float = option(1.0, "share of the training images whose labels the student sees", gt=0, le=1)
    labeled_share: float = option(0.5, "share of a batch that has labels, if data.labels is below 1", gt=0, le=1)
    size: int = option(224, "side of the images in pixels; digits have 8", source=RELEASED, ge=8)
    channels: Channels = option(3, "channels of the images: 1 for gray; digits have 1")
    crop: float = option(0.875, "share of the shorter side that evaluation sees", source=RELEASED, gt=0, le=1)
    mean: Floats = option(
        (0.485, 0.456, 0.406),
        "mean of each channel, as the teacher was trained with; digits have their own",
        source="timm",
    )
    std: Floats = option((0.229, 0.224, 0.225), "standard deviation of each channel", source="timm")


class Augment(Section):
    """Augmentation of real images; the digits have their own."""

    views: int = option(0, "fixed views of an image, to which answers are stored; 0: new views each time", ge=0)
    pad: int = option(0, "for small images: only flips, and shifts by so many pixels; 0: what follows", ge=0)
    crop_min: float = option(0.08, "smallest share of the area in a random crop", source=RELEASED, gt=0, le=1)
    flip: float = option(0.5, "probability of a horizontal flip", source=RELEASED, ge=0, le=1)
    three_augment: bool = option(True, "apply grayscale, solarize or Gaussian blur", source="DeiT III")
    color_jitter: float = option(0.3, "largest change of brightness, contrast, saturation", source=RELEASED, ge=0)
    mixup: float = option(0.0, "alpha of mixup; 0: none. With CutMix, each for half of the batches", ge=0)
    cutmix: float = option(0.0, "alpha of CutMix; 0: none", ge=0)


class DigitsConfig(Section):
    labels: float = option(0.1, "share of the training images whose labels the student sees", gt=0, le=1)
    views: int = option(16, "fixed augmented views of every image", ge=1)


class Teacher(Section):
    name: str = option("small_cnn", "small_cnn (bundled), or any model of timm")
    weights: UserPath = option("", "its weights, a .safetensors or .pth file; default: it is trained here")
    pretrained: bool = option(False, "let timm download its weights")
    widths: Ints = option((24, 48, 96, 192), "channels of small_cnn's convolutions", min_length=1)
    pools: Ints = option((2,), "numbers of the convolutions after which small_cnn halves its maps")
    steps: int = option(300, "training steps, where it is trained here", ge=0)
    batch_size: int = option(64, "images per training step", ge=2)
    lr: float = option(2e-3, "peak learning rate", gt=0)

    @model_validator(mode="after")
    def _checked(self) -> Teacher:
        if self.name == "small_cnn" and (most := max(self.pools, default=0)) > len(self.widths):
            raise OptionError(f"teacher.pools: {most}, but there are only {len(self.widths)} convolutions")
        return self


class Student(Section):
    name: str = option("small_vit", f"{', '.join(models.STUDENTS)} (the paper's), small_vit (bundled), any of timm")
    weights: UserPath = option("", "weights to begin with, a .safetensors or .pth file")
    drop_path: float = option(0.0, "rate of stochastic depth", source=RELEASED, ge=0, lt=1)
    width: int = option(48, "channels of small_vit", ge=1)
    depth: int = option(3, "blocks of small_vit", ge=1)
    heads: int = option(4, "attention heads of small_vit", ge=1)
    mlp_ratio: int = option(2, "hidden channels of small_vit's MLPs, in widths", ge=1)
    patch: int = option(2, "patch size of small_vit", ge=1)


class Distill(DistillConfig):
    features: Literal["pooled", "tokens"] = option("pooled", "compared: the mean over the positions, or each position")
    logit_weight: float = option(1.0, "weight of the logit loss; an arm's own 0 stays 0", source=RELEASED, ge=0)
    temperature: float = option(1.0, "temperature of the logit loss", source=RELEASED, gt=0)
    label_smoothing: float = option(0.1, "smoothing of the labels", source=RELEASED, ge=0, lt=1)


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
        data, augment = self.data, self.augment
        if not len(data.mean) == len(data.std) == data.channels:
            raise OptionError(f"data.mean, data.std: one per channel, {data.channels}; got {data.mean} and {data.std}")
        check_ignored(flatten(self))
        if (augment.mixup or augment.cutmix) and (self.views or self.labels < 1):
            raise OptionError("augment.mixup, augment.cutmix: 0 with fixed augment.views, or data.labels below 1")
        return self

    @property
    def size(self) -> int:
        return 8 if self.data.name == "digits" else self.data.size

    @property
    def channels(self) -> int:
        return 1 if self.data.name == "digits" else self.data.channels

    @property
    def views(self) -> int:
        return self.digits.views if self.data.name == "digits" else self.augment.views

    @property
    def labels(self) -> float:
        return self.digits.labels if self.data.name == "digits" else self.data.labels

    @property
    def labeled_share(self) -> float:
        """Of a batch."""
        size = self.optim.batch_size
        return round(self.data.labeled_share * size) / size if self.labels < 1 else 1.0

    @property
    def needs_teacher(self) -> bool:
        return bool(self.distill.weight or self.distill.logit_weight)


def check_ignored(values: dict[str, Any]) -> None:
    """An error about what the images would ignore, by its key: the digits have options of their own."""
    name, of_digits = values["data.name"], {"digits": DigitsConfig().model_dump()}
    of_others = {"data": Data().model_dump(exclude={"name", "labeled_share"}), "augment": Augment().model_dump()}
    ignored, own = (of_others, of_digits) if name == "digits" else (of_digits, of_others)
    for key, default in flatten(ignored).items():
        if values[key] != default:
            same = [other for other in flatten(own) if other.partition(".")[2] == key.partition(".")[2]]
            remedy = f"give {same[0]}" if same else "leave it out, or name other images by data.name"
            where = "the bundled digits" if name == "digits" else f"data.name={name}"
            raise OptionError(f"{key}: {show(values[key])} has no effect on {where}; {remedy}")


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
            ours = tokens.mean(dim=1) if self.distill.features == "pooled" else tokens
            losses["features"] = self.feature_loss(ours, batch["features"])
            total = total + self.distill.weight * losses["features"]
        return {**losses, "total": total}

    def label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, mean over the global batch's labeled images: that of a target of zeros is zero."""
        return F.cross_entropy(logits.float(), targets) / self.labeled_share


class Teaching(nn.Module):
    """A teacher's answers to images: logits (N, classes) and features, (N, T) or (N, positions, T)."""

    def __init__(self, model: models.Model, features: str) -> None:
        super().__init__()
        self.model, self.pooled = model, features == "pooled"
        self.logits, self.features = nn.Identity(), nn.Identity()  # the names by which a FeatureStore knows them

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens, logits, _ = models.run(self.model, images)
        features = tokens.mean(dim=1) if self.pooled else tokens
        return {"logits": self.logits(logits), "features": self.features(features)}


class Classification(Task):
    title = "Image classification: a student learns from labels, a teacher's logits and a teacher's features (V_kD)."
    Config = Config
    metric = Metric("accuracy", "accuracy %")
    arms = {
        "alone": Arm("student alone", {"distill.logit_weight": 0.0, "distill.weight": 0.0}),
        "logits": Arm("logit distillation", {"distill.weight": 0.0}),
        "logits-longer": Arm("logit distillation, equal time", {"distill.weight": 0.0}, longer=1.15),
        "linear": Arm("linear projection", {"distill.projection": "linear"}),
        "vkd": Arm("V_kD as published (scale 1)", {"distill.projection": "orthogonal", "distill.scale": 1.0}),
        "vkd-match": Arm('V_kD, scale="match"', {"distill.projection": "orthogonal", "distill.scale": "match"}),
    }
    compared, baseline = tuple(arms), "logits"
    recipes = Path(__file__).parent / "configs" / "classification"

    @cached_property
    def data(self) -> Images:
        return Images(self.config, self.seed)

    # ---- the teacher -------------------------------------------------------------------------------------------------

    @classmethod
    def needs_teacher(cls, config: Any) -> bool:
        return config.needs_teacher

    def train_teacher(self) -> dict[str, Any]:
        """Train the seed's teacher or read its weights, measure it, and store its answers to fixed views."""
        numbers: dict[str, Any] = {}
        if not self.config.needs_teacher:
            return numbers
        if trained_here(self.config):
            training = as_teacher(TeacherTraining, self)
            result = engine.train(training, weights="teacher.safetensors")
            numbers = {name: result[name] for name in ("accuracy", "seconds", "cpu_seconds")}
        elif self.config.distill.logit_weight:
            with torch.no_grad(), self.fabric.autocast():
                numbers = self.evaluate(self.teacher.model)
        if self.data.views:
            _ = self.answers
        return numbers

    @cached_property
    def teacher(self) -> Any:
        """Frozen, on this rank's device: images -> {"logits", "features"}."""
        c, here = self.config, trained_here(self.config)
        weights = str(self.teacher_folder / "teacher.safetensors") if here else c.teacher.weights
        logits = bool(here or c.distill.logit_weight)
        model = models.make_teacher(c.teacher, models.Shape.of(self.data), weights, logits=logits)
        return self.fabric.to_device(Teaching(model, self.config.distill.features).requires_grad_(False).eval())

    @property
    def teacher_folder(self) -> Path:
        assert self.context.teacher is not None
        return self.context.teacher

    @torch.no_grad()
    def ask(self, images: Tensor) -> dict[str, Tensor]:
        with self.fabric.autocast():
            return self.teacher(self.fabric.to_device(images))

    @cached_property
    def answers(self) -> vk.FeatureStore:
        """The teacher's to every fixed view, on disk; what is there already is not computed again."""
        kind = self.config.distill.features
        features = {"teacher": "features", "teacher_pool": "tokens" if kind == "tokens" else None}
        with self.fabric.autocast():
            return vk.FeatureStore.build(
                self.teacher_folder / f"answers-{kind}",
                self.teacher,
                self.data.every_view(),
                ["logits", features],
                dtype=torch.float32,
                num_workers=self.config.run.workers,
                progress=False,
            )

    # ---- the student -------------------------------------------------------------------------------------------------

    def make_student(self) -> nn.Module:
        return models.make_student(self.config.student, models.Shape.of(self.data))

    @property
    def learner(self) -> str:
        return "distilled" if self.config.needs_teacher else "alone"

    def make_model(self, student: nn.Module) -> nn.Module:
        c, shape, width, distilled = self.config, models.Shape.of(self.data), 0, self.learner == "distilled"
        if distilled and c.distill.weight:
            width = models.make_teacher(c.teacher, shape, logits=False, empty=True).num_features
        share = c.labeled_share if distilled else 1.0  # a student alone sees labeled images only
        return DistilledStudent(student, c.distill, width, labeled_share=share, group=self.context.process_group)

    @property
    def images(self) -> int:
        return self.data.images

    @property
    def per_epoch(self) -> float:
        drawn = self.config.labels < 1  # with replacement
        return self.images / self.optim.batch_size if drawn else super().per_epoch

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        if self.learner == "distilled" and self.data.views:
            _ = self.answers  # made now, where they are missing: the first step's time is the student's
        return self.answered(start)

    def answered(self, start: int) -> Iterator[dict[str, Tensor]]:
        f, distill, size = self.fabric, self.config.distill, self.optim.batch_size
        for images, targets, rows in self.data.batches(self.learner, start, size, f.global_rank, f.world_size):
            batch = {"images": images, "targets": targets}
            if self.learner == "distilled":
                answers = self.ask(images) if rows is None else self.answers[rows]
                batch |= {"logits": answers["logits"]} if distill.logit_weight else {}
                batch |= {"features": answers["features"]} if distill.weight else {}
            yield f.to_device(batch)

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        """Accuracy on the held-out images of all ranks."""
        counts = torch.zeros(2)
        for images, labels in self.data.held_out(self.fabric.global_rank, self.fabric.world_size):
            right = student(self.fabric.to_device(images)).argmax(dim=1).cpu() == labels
            counts += torch.stack([right.sum(), torch.tensor(len(labels))])
        right, count = self.fabric.all_reduce(self.fabric.to_device(counts), reduce_op="sum").tolist()
        return {"accuracy": 100 * right / count}

    @classmethod
    def check(cls, config: Any) -> None:
        super().check(config)
        data = Images(config, 0)
        shape, sizes = models.Shape.of(data), dict[str, int]()
        make_student = partial(models.make_student, config.student, shape)
        features = bool(config.distill.weight)
        ours = models.check_network("student", config.student.name, shape, make_student, features=features)
        if config.labels == 1:
            sizes["optim.batch_size"] = config.optim.batch_size
        else:
            check_share(config)
            data.check_unlabeled()
        if config.needs_teacher:
            here, logits = trained_here(config), bool(config.distill.logit_weight)
            if here:
                sizes["teacher.batch_size"] = config.teacher.batch_size
                check_parts("teacher.batch_size", config.teacher.batch_size)
            weights = "" if here else config.teacher.weights
            make_teacher = partial(models.make_teacher, config.teacher, shape, weights, logits=here or logits)
            theirs = models.check_network("teacher", config.teacher.name, shape, make_teacher, features=features)
            if config.teacher.pretrained and not weights:
                models.fetch(config.teacher.name)
            positions, wanted = ours.tokens.shape[1], theirs.tokens.shape[1]
            if features and config.distill.features == "tokens" and positions != wanted:
                raise OptionError(
                    f"distill.features: tokens, but the student has {positions} positions and the teacher {wanted}; "
                    "choose other models, or distill.features=pooled"
                )
        for name, size in sizes.items():
            check_enough(name, size, data.images)
            if (config.augment.mixup or config.augment.cutmix) and (size // ranks()) % 2:
                raise OptionError(
                    f"{name}: augment.mixup and augment.cutmix mix pairs, but {size} images for {ranks()} rank(s) are "
                    "an odd number for each; choose another size"
                )


class TeacherTraining(Classification):
    """The same with the teacher in the student's place: it learns from the labels of all training images."""

    learner = "teacher"
    rate_option = "teacher.lr"
    make_model = Classification.make_model  # not that of a subclass, which as_teacher puts behind this class

    def make_student(self) -> nn.Module:
        return models.make_teacher(self.config.teacher, models.Shape.of(self.data))


def check_share(config: Any) -> None:
    """Every rank needs labeled images in its share of a batch."""
    size = config.optim.batch_size
    labeled = round(config.labeled_share * size)
    if not labeled:
        share = config.data.labeled_share
        raise OptionError(f"data.labeled_share: {share} of {size} is no image; raise it, or optim.batch_size")
    check_parts("data.labeled_share", labeled)


def trained_here(config: Any) -> bool:
    """Whether the teacher is trained by this run; an error where its weights come from nowhere."""
    t = config.teacher
    if t.weights or t.pretrained:
        return False
    if not t.steps:
        raise OptionError("teacher.weights: give a file, or teacher.pretrained=true, or teacher.steps to train it here")
    return True
