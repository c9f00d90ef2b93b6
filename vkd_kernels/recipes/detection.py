"""Object detection: a student learns from boxes and from a teacher's features of maps and queries (V_kD).

    vkd distill detection                                       scenes of digits, small FCOS detectors
    vkd distill detection --recipe fashion-mnist scenes.root=...    scenes of garments
    vkd distill detection --recipe vkd-deformable-detr-coco data.root=... teacher.weights=...

    L = the detector's losses + weight * sum over features of smooth_l1(norm(X P^T), norm(Y))

`batch_norm` standardizes both sides per channel over all rows of the batch. Rows are the locations of a map, inside
ground-truth boxes or in all of the image but never in its padding; and queries, of one layer or of all layers together.

Without options: for every seed new scenes, a teacher trained on 1500 of them, and one student per arm, all from the
same initial weights and on the same batches of the first 300 scenes: the teacher has seen five times as many labels. Of
one's own images the student sees all.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from . import coco, engine, images, runs, scenes
from .config import Channels, Floats, Ints, OptionError, Section, UserPath, option, section
from .detectors import FCOS, Detector, convolutions
from .loading import Key, Views, epochs, read
from .models import put_weights
from .runs import RunError
from .task import Arm, DistillConfig, Metric, Optim, Run, Task, as_teacher, check_enough, check_parts

TRIED = "tried on seeds 100-103"
LABELED_SCENES = 300
WITHOUT_OBJECTS = "{}: without any object there is no average precision"
BUNDLED_AT_ONCE = 50  # scenes in an evaluation batch; a user's own images differ in size and come one by one


class Data(Section):
    root: UserPath = option("", "folder in COCO's layout; none: the composed scenes")
    train: str = option("train2017", "training part: root/NAME/*, and root/annotations/instances_NAME.json")
    val: str = option("val2017", "evaluation part")
    labeled: Annotated[int, Field(ge=0)] | Literal["auto"] = option(
        "auto",
        f"training images that a student sees, the first ones; 0: all; auto: {LABELED_SCENES} scenes, all of data.root",
    )
    classes: int = option(0, "number of categories; 0: as the data say", ge=0)
    channels: Channels = option(1, "channels of the images: 3 for color")
    mean: Floats = option((0.35,), "mean of each channel, as the teacher was trained with")
    std: Floats = option((0.2,), "standard deviation of each channel")


class Scenes(images.Source):
    """The composed scenes (scenes.py), and whose pictures they show."""

    train: int = option(1500, "training scenes; the teacher sees all of them", ge=16, le=10**6)
    val: int = option(300, "evaluation scenes, of held-out pictures", ge=1, le=10**6)


class Augment(Section):
    flip: float = option(0.0, "probability of a horizontal flip", ge=0, le=1)
    short_sides: Ints = option((), "shorter sides to draw from; evaluation takes the largest; none: no resizing")
    crop: float = option(0.0, "probability of a random crop of 384 to 600 pixels, before it is resized", ge=0, le=1)


class DetectorConfig(Section):
    side: ClassVar[str] = "student"  # the section, for errors
    name: UserPath = option("fcos", "fcos (bundled), deformable-detr, or a folder or hub name of one of transformers")
    weights: UserPath = option("", "weights to begin with: student.safetensors of a run, or another state dict")
    widths: Ints = option((12, 24, 32), "fcos: channels before the map", source=TRIED, min_length=1)
    channels: int = option(32, "fcos: channels of the map and the heads", source=TRIED, multiple_of=32, ge=32)
    backbone: str = option("swin-nano", "deformable-detr: swin-nano, -tiny, -small or -base", source="the paper")
    backbone_weights: UserPath = option("", "a folder or hub name of transformers' Swin with the backbone's weights")


class Teacher(DetectorConfig):
    side: ClassVar[str] = "teacher"
    steps: int = option(400, "training steps, where it is trained here; 0: its weights are given", ge=0)
    batch_size: int = option(16, "images per training step", ge=1)
    lr: float = option(4e-3, "peak learning rate", source=TRIED, gt=0)


class Distill(DistillConfig):
    where: Literal["boxes", "image"] = option("boxes", "compared locations: in ground-truth boxes, or in all of it")


class Config(Section):
    data: Data = section(Data)
    scenes: Scenes = section(Scenes)
    augment: Augment = section(Augment)
    teacher: Teacher = section(Teacher, source=TRIED, widths=(16, 32, 48), channels=96)
    student: DetectorConfig = section(DetectorConfig)
    distill: Distill = section(Distill, source="the paper, section 4.2", normalization="batch_norm", weight=4.0)
    optim: Optim = section(Optim, source=TRIED, lr=4e-3, steps=600, batch_size=16, warmup=0.25, weight_decay=0.05)
    run: Run = section(Run, accelerator="cpu", eval_every=300, save_every=100)

    @model_validator(mode="after")
    def _checked(self) -> Config:
        d = self.data
        if not len(d.mean) == len(d.std) == d.channels:
            raise OptionError(f"data.mean, data.std: one per channel, {d.channels}; got {d.mean} and {d.std}")
        if not d.root and self.labeled > self.scenes.train:
            raise OptionError(f"data.labeled: {self.labeled} of scenes.train={self.scenes.train}")
        if ignored := [key for key, value in Scenes() if d.root and getattr(self.scenes, key) != value]:
            raise OptionError(f"scenes.{ignored[0]}: it has no effect on the images of data.root; leave it out")
        images.check_bundled(self.scenes, "scenes")
        return self

    @property
    def labeled(self) -> int:
        """Training images that the student sees; 0: all."""
        if isinstance(self.data.labeled, int):
            return self.data.labeled
        return 0 if self.data.root else LABELED_SCENES


class DistilledDetector(nn.Module):
    """What is trained: the student, and a projection for every feature beside it. `forward(batch)` -> losses.

    Both are in one module so that data-parallel wrapping reduces the gradients of both. Ranks hold different numbers of
    objects: each divides by the number of all, so that the mean of the ranks is the loss of the global batch.
    """

    def __init__(self, student: Any, distill: Distill, teacher_dims: dict[str, int], group: Any = None) -> None:
        super().__init__()
        self.student, self.distill, self.group = student, distill, group
        self.feature_losses = nn.ModuleDict()
        if teacher_dims:
            check_features(student.dims, teacher_dims)
        for name, dim in teacher_dims.items():
            self.feature_losses[name] = distill.feature_loss(student.dims[name], dim, group)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        targets = [without_crowds(target) for target in batch["targets"]]
        prediction = self.student.predict(batch["images"], batch["inside"], targets)
        weight = weight_of_rank(prediction.objects, self.group)
        losses = {name: loss * weight for name, loss in prediction.losses.items()}
        total = torch.stack([*losses.values()]).sum()
        features: dict[str, Tensor] = {}
        for name, feature_loss in self.feature_losses.items():
            ours, theirs, mask = prediction.features[name], batch["teacher"][name], None
            if name.startswith("map"):
                mask = coco.at_map(batch["inside"], ours.shape[1], ours.shape[2])
                if self.distill.where == "boxes":
                    mask = mask & in_boxes([target["boxes"] for target in targets], batch["inside"], mask)
            features[name] = feature_loss(ours, theirs, mask=mask)
        if features:
            losses["features"] = torch.stack([*features.values()]).sum()
            total = total + self.distill.weight * losses["features"]
            losses |= {f"features/{name}": x for name, x in features.items()} if len(features) > 1 else {}
        return {**losses, "total": total}


def check_features(ours: dict[str, int], theirs: dict[str, int]) -> None:
    if ours.keys() != theirs.keys():
        raise OptionError(
            f"teacher.name, student.name: their features differ: {', '.join(theirs)} of the teacher, "
            f"{', '.join(ours)} of the student"
        )


def without_crowds(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is trained on: crowds count in evaluation alone."""
    return {name: target[name][target["iscrowd"] == 0] for name in ("boxes", "labels")}


def weight_of_rank(count: Tensor, group: Any) -> Tensor:
    """What this rank's means over `count` objects are multiplied by, so that the mean of the ranks is that of all."""
    count = count.detach().float()
    if group is None:
        return torch.ones_like(count)
    total = count.clone()
    torch.distributed.all_reduce(total, group=group)
    return count.clamp(min=1) * torch.distributed.get_world_size(group) / total.clamp(min=1)


def in_boxes(boxes: list[Tensor], pixels: Tensor, cells: Tensor) -> Tensor:
    """Which cells of a map have their center in a box: (N, height, width) bool, as `cells` is; `pixels` (N, H, W)."""
    y, x = (
        (torch.arange(cells.shape[side], device=cells.device) + 0.5) * (pixels.shape[side] / cells.shape[side])
        for side in (1, 2)
    )
    masks = []
    for x0, y0, x1, y1 in (of_image.T[..., None] for of_image in boxes):  # (M, 1) each
        in_y, in_x = (y > y0) & (y < y1), (x > x0) & (x < x1)
        masks.append((in_y[:, :, None] & in_x[:, None]).any(dim=0))
    return torch.stack(masks)


class Detection(Task):
    title = "Object detection: a student learns from boxes and from a teacher's features of maps and queries (V_kD)."
    Config = Config
    metric = Metric("AP", "AP")
    arms = {
        "alone": Arm("student alone", {"distill.weight": 0.0}),
        "alone-longer": Arm("student alone, equal time", {"distill.weight": 0.0}, longer=1.7),
        "linear": Arm("linear projection", {"distill.projection": "linear"}),
        "vkd": Arm("V_kD", {"distill.projection": "orthogonal"}),
    }
    compared, baseline = tuple(arms), "alone"
    recipes = Path(__file__).parent / "configs" / "detection"

    @classmethod
    def detector(cls, config: Any, classes: int, channels: int, *, empty: bool = False) -> Detector:
        """Of the `student` or the `teacher` section; `empty`: to look at its size. A subclass may have others."""
        if config.name == "fcos":
            with torch.device("meta" if empty else "cpu"):
                body = convolutions(channels, (*config.widths, config.channels))
                return FCOS(body, config.channels, classes)
        if channels != 3:
            raise OptionError(f"data.channels: {config.name} takes images of 3 channels, got {channels}")
        from .deformable import make_deformable  # needs transformers

        return make_deformable(config, classes, empty=empty)

    @classmethod
    def make_detector(cls, config: Any, classes: int, channels: int, *, empty: bool = False) -> Detector:
        """With the weights of its section."""
        detector, where = cls.detector(config, classes, channels, empty=empty), f"{config.side}.weights"
        if config.weights:
            put_weights(detector, runs.load_weights(Path(config.weights), where), f"{where}: {config.weights}")
        return detector

    # ---- data --------------------------------------------------------------------------------------------------------

    @property
    def labeled(self) -> int:
        return self.config.labeled

    @cached_property
    def data(self) -> tuple[Any, Any]:
        """Training and evaluation images; the scenes of a seed where there are none of one's own."""
        d = self.config.data
        train: Any
        val: Any
        if d.root:
            train, val = (coco.CocoImages(Path(d.root), name, d.channels) for name in (d.train, d.val))
        else:
            source = self.config.scenes
            train = scenes.Scenes(source, self.seed, self.labeled or source.train, training=True)
            val = scenes.Scenes(source, self.seed, source.val, training=False)
        if train.names != val.names or d.classes not in (0, len(train.names)):
            counts = f"{len(train.names)} in {train.where}, {len(val.names)} in {val.where}"
            raise RunError(f"data.classes: the categories differ: {counts}, data.classes={d.classes}")
        return train, val

    @property
    def classes(self) -> int:
        return len(self.data[0].names)

    @property
    def images(self) -> int:
        return self.labeled or len(self.data[0])

    def read(self, views: Views, keys: Any, at_once: int = 0) -> Iterator[dict[str, Any]]:
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (self.config.data.mean, self.config.data.std))
        collate = partial(coco.collate, mean=mean, std=std)
        for batch in read(views, keys, collate, run=self.config.run, at_once=at_once):
            yield self.fabric.to_device(batch)

    @cached_property
    def training_views(self) -> Views:
        return Views(self.data[0], coco.training_transform(self.config.augment))

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        keys = epochs(
            self.images,
            self.optim.batch_size,
            seed=self.seed,
            start=start,
            mine=self.mine,
            key=lambda epoch, index: Key(index, (self.seed, epoch, index)),
        )
        for batch in self.read(self.training_views, keys):
            yield {**batch, "teacher": self.teach(batch)} if self.config.distill.weight else batch

    # ---- the teacher -------------------------------------------------------------------------------------------------

    @classmethod
    def needs_teacher(cls, config: Any) -> bool:
        return bool(config.distill.weight)

    def train_teacher(self) -> dict[str, Any]:
        """Train the seed's teacher on all training images, or check that its weights fit."""
        if not self.config.distill.weight:
            return {}
        if not trained_here(self.config):
            self.make_detector(self.config.teacher, self.classes, self.config.data.channels)
            return {}
        training = as_teacher(TeacherTraining, self)
        result = engine.train(training, weights="teacher.safetensors")
        return {name: result[name] for name in ("AP", "AP50", "AP75", "seconds", "cpu_seconds")}

    @cached_property
    def teacher(self) -> Any:
        """Frozen, on this rank's device."""
        config = self.config.teacher
        if trained_here(self.config) and self.context.teacher:
            config = config.model_copy(update={"weights": str(self.context.teacher / "teacher.safetensors")})
        teacher = self.make_detector(config, self.classes, self.config.data.channels)
        return self.fabric.to_device(teacher.requires_grad_(False).eval())

    def teach(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The teacher's features of a batch, from memory where they are of scenes that are always the same."""
        a = self.config.augment
        if not (self.config.data.root or a.flip or a.crop or len(a.short_sides) > 1):
            return {name: stored[batch["index"]] for name, stored in self.stored.items()}
        return self.ask(batch)

    @torch.no_grad()
    def ask(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        with self.fabric.autocast():
            return self.teacher.predict(batch["images"], batch["inside"]).features

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        batches = self.read(self.training_views, map(Key, range(self.images)), BUNDLED_AT_ONCE)
        answers = [self.ask(batch) for batch in batches]
        return {name: torch.cat([answer[name] for answer in answers]) for name in self.teacher.dims}

    # ---- the student -------------------------------------------------------------------------------------------------

    def make_student(self) -> nn.Module:
        return self.make_detector(self.config.student, self.classes, self.config.data.channels)

    def make_model(self, student: nn.Module) -> nn.Module:
        distill = self.config.distill
        dims = self.teacher.dims if distill.weight else {}
        return DistilledDetector(student, distill, dims, self.context.process_group)

    def evaluate(self, student: Any) -> dict[str, float]:
        """COCO's average precision in percent, over the images of all ranks."""
        from torchmetrics.detection import MeanAveragePrecision

        val = self.data[1]
        views = Views(val, coco.evaluation_transform(self.config.augment))
        mine = map(Key, range(len(val))[self.mine])
        answers = list[tuple[Any, Any]]()
        for batch in self.read(views, mine, 1 if self.config.data.root else BUNDLED_AT_ONCE):
            detected = student.detections(student.predict(batch["images"], batch["inside"]), batch["inside"])
            answers += zip(on_cpu(detected), on_cpu(batch["targets"]), strict=True)
        # Gathered here: torchmetrics gathers tensor by tensor, and needs ranks with as many images each.
        metric = MeanAveragePrecision(sync_on_compute=False)
        for detections, targets in gathered(answers, self.fabric.world_size):
            metric.update([detections], [targets])
        values = {name: 100 * float(value) for name, value in metric.compute().items() if name[:3] == "map"}
        if values["map"] < 0:
            raise RunError(WITHOUT_OBJECTS.format(val.where))
        return {"AP": values["map"], "AP50": values["map_50"], "AP75": values["map_75"]}

    @classmethod
    def check(cls, config: Any) -> None:
        super().check(config)
        importlib.import_module("pycocotools")  # average precision needs it
        d = config.data
        here = config.distill.weight and trained_here(config)
        if here:
            check_parts("teacher.batch_size", config.teacher.batch_size)
        if not d.root and d.channels != 1:
            raise OptionError("data.root: missing; without it the data are gray scenes (data.channels=1)")
        if not d.root and (d.train, d.val) != (Data().train, Data().val):
            raise OptionError(f"data.root: missing; without it data.train={d.train} and data.val={d.val} name nothing")
        for path in [coco.annotation_file(Path(d.root), name) for name in (d.train, d.val)] if d.root else []:
            if not path.exists():
                raise OptionError(f"data.root: there is no {path}")
        if d.root:
            train, val = (coco.CocoImages(Path(d.root), name, d.channels) for name in (d.train, d.val))
            if not any(map(len, val.objects)):
                raise RunError(WITHOUT_OBJECTS.format(val.where))
            classes, count = d.classes or len(train.names), len(train)
        else:
            classes, count = images.open_images(config.scenes, 0, "scenes")[2], config.scenes.train
        check_enough("data.labeled", config.labeled, count)
        check_enough("optim.batch_size", config.optim.batch_size, config.labeled or count)
        if here:
            check_enough("teacher.batch_size", config.teacher.batch_size, count)
        student = cls.make_detector(config.student, classes, d.channels, empty=True)
        if config.distill.weight:
            teacher = cls.make_detector(config.teacher, classes, d.channels, empty=True)
            check_features(student.dims, teacher.dims)


def on_cpu(images: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Copies: what loader processes have sent is a file handle each, for as long as it is kept."""
    return [{name: value.to("cpu", copy=True) for name, value in image.items()} for image in images]


def gathered(answers: list[Any], ranks: int) -> list[Any]:
    """Those of all ranks, one rank's after another's."""
    if ranks == 1:
        return answers
    parts: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(parts, answers)
    return [answer for part in parts for answer in part]


class TeacherTraining(Detection):
    """The same with the teacher in the student's place: it learns from the boxes of all training images."""

    labeled = 0  # all
    rate_option = "teacher.lr"
    make_model = Detection.make_model  # not that of a subclass, which as_teacher puts behind this class

    def make_student(self) -> nn.Module:
        return self.make_detector(self.config.teacher, self.classes, self.config.data.channels)


def trained_here(config: Any) -> bool:
    """Whether the teacher is trained by this run; an error where its weights come from nowhere."""
    t = config.teacher
    if t.weights or t.name not in ("fcos", "deformable-detr"):  # a folder or a name of the hub has weights
        return False
    if not t.steps:
        raise OptionError("teacher.weights: give a file, or teacher.steps > 0 to train the teacher here")
    return True
