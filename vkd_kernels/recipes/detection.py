"""Object detection: a student learns from boxes and from a teacher's features of maps and queries (V_kD).

    vkd distill detection                                       scenes of digits, small FCOS detectors
    vkd distill detection --recipe vkd-deformable-detr-coco data.train=... teacher.weights=...

    L = the detector's losses + weight * sum over features of smooth_l1(norm(X P^T), norm(Y))

`batch_norm` standardizes both sides per channel over all rows of the batch. Rows are the locations of a map, inside
ground-truth boxes or in all of the image but never in its padding; and queries, of one layer or of all layers together.

Bundled: for every seed new scenes, a teacher trained on 1500 of them, and one student per arm, all from the same
initial weights and on the same batches of the first 300 scenes: the teacher saw five times more labels than a student.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, make_grid

from . import coco, engine, runs, scenes
from .config import Channels, Floats, Ints, OptionError, Section, option, section
from .detectors import Detections, Detector, load_weights, make_detector
from .loading import Key, Views, epochs, read
from .runs import RunError
from .task import Arm, Context, DistillConfig, Metric, Optim, Run, Task

DETR, RELEASED, PAPER = "Deformable DETR", "released code", "the paper"
TRIED = "tried on seeds 100-103"
READ_AT_ONCE, SMALL = 50, 256  # images of an evaluation batch, if none has more pixels a side than that; else one
SHOWN, SHOWN_SCORE, SHOWN_SIDE = 8, 0.5, 320  # of a picture


class Data(Section):
    train: str = option("", "folder of training images; default: scenes composed from scikit-learn's digits")
    train_annotations: str = option("", "their COCO annotations, instances_*.json")
    val: str = option("", "folder of evaluation images")
    val_annotations: str = option("", "their COCO annotations")
    labeled: int = option(300, "only the first so many training images are the student's; 0: all", ge=0)
    classes: int = option(0, "number of categories; 0: what the data say", ge=0)
    channels: Channels = option(1, "of the images: 3 for color")
    mean: Floats = option((0.35,), "of the channels: what the teacher was trained with")
    std: Floats = option((0.2,), "of the channels")
    bad_boxes: Literal["error", "drop"] = option("error", "boxes that are degenerate or outside: or leave them out")
    in_memory: bool = option(True, "keep the decoded images: of small data sets")


class Scenes(Section):
    """The composed scenes (scenes.py)."""

    train: int = option(1500, "training scenes; the teacher sees all of them", ge=16, le=10**6)
    val: int = option(300, "evaluation scenes, of other digits", ge=1, le=10**6)


class Augment(Section):
    flip: float = option(0.0, "probability of a horizontal flip", ge=0, le=1)
    short_sides: Ints = option((), "shorter side in pixels, drawn from these; none: as it is")
    longest: int = option(1333, "longer side in pixels, at most", source=DETR, ge=8)
    crop: float = option(0.0, "probability of a random crop, before it is resized", ge=0, le=1)
    crop_short_sides: Ints = option((400, 500, 600), "shorter side before the crop", source=DETR, min_length=1)
    crop_sizes: Ints = option((384, 600), "least and largest side of a crop", source=DETR, min_length=2, max_length=2)
    val_short_side: int = option(0, "shorter side in evaluation; 0: as it is", ge=0)


class DetectorConfig(Section):
    name: str = option("fcos", "fcos (bundled), deformable-detr, or a folder or hub name of one of transformers")
    weights: str = option("", "weights to begin with: student.safetensors of a run, or another state dict")
    widths: Ints = option((12, 24, 32), "fcos: channels before the map", source=TRIED)
    channels: int = option(32, "fcos: channels of the map and the heads", source=TRIED, ge=1)
    backbone: str = option("swin-nano", "deformable-detr: swin-nano, -tiny, -small, -base, or of timm", source=PAPER)
    backbone_weights: str = option("", "of the backbone: a file; a folder or hub name of transformers; timm: fetch")
    queries: int = option(100, "deformable-detr: object queries", source=PAPER, ge=1)
    dim: int = option(256, "deformable-detr: channels of maps and queries", source=PAPER, ge=64, multiple_of=32)
    heads: int = option(8, "deformable-detr: attention heads", source=DETR, ge=1)
    encoder_layers: int = option(6, "deformable-detr: layers of the encoder", source=DETR, ge=1)
    decoder_layers: int = option(6, "deformable-detr: layers of the decoder", source=PAPER, ge=1)
    dropout: float = option(0.1, "deformable-detr: dropout of its transformer", source=DETR, ge=0, lt=1)


class Teacher(DetectorConfig):
    classes: int = option(0, "classes of its weights; 0: the data's", ge=0)
    cache: bool = option(True, "keep its features of every training image: without augmentation")
    steps: int = option(400, "training steps, where it is trained here; 0: its weights are given", ge=0)
    batch_size: int = option(16, "images per training step", ge=1)
    lr: float = option(4e-3, "peak learning rate", source=TRIED, gt=0)


class Distill(DistillConfig):
    where: Literal["boxes", "image"] = option("boxes", "compared locations: in ground-truth boxes, or of all the image")


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
        d, a = self.data, self.augment
        if not len(d.mean) == len(d.std) == d.channels:
            raise OptionError(f"data.mean, data.std: one per channel, {d.channels}; got {d.mean} and {d.std}")
        paths = {n: getattr(d, n) for n in ("train", "train_annotations", "val", "val_annotations")}
        missing = [name for name, value in paths.items() if not value]
        if missing and len(missing) < 4:
            raise OptionError(f"data.{missing[0]}: missing; own data need all of {', '.join(paths)}")
        if self.teacher.cache and (a.flip or a.crop or len(a.short_sides) > 1):
            raise OptionError("teacher.cache: features of an image can't be kept where augment changes it every time")
        if not d.train and d.labeled > self.scenes.train:
            raise OptionError(f"data.labeled: {d.labeled} of scenes.train={self.scenes.train}")
        if a.crop_sizes[0] > a.crop_sizes[1]:
            raise OptionError(f"augment.crop_sizes: must be least and largest, got {a.crop_sizes}")
        return self


class DistilledDetector(nn.Module):
    """What is trained: the student, and a projection for every feature beside it. `forward(batch)` -> losses.

    Both are in one module so that data-parallel wrapping reduces the gradients of both. Ranks hold different numbers of
    objects: each divides by the number of all, so that the mean of the ranks is the loss of the global batch.
    """

    def __init__(self, student: Any, distill: Distill, teacher_dims: dict[str, int], group: Any = None) -> None:
        super().__init__()
        self.student, self.distill, self.group = student, distill, group
        self.feature_losses = nn.ModuleDict()
        if teacher_dims and student.dims.keys() != teacher_dims.keys():
            raise OptionError(
                f"teacher.name, student.name: their features differ: {', '.join(teacher_dims)} of the teacher, "
                f"{', '.join(student.dims)} of the student"
            )
        for name, dim in teacher_dims.items():
            self.feature_losses[name] = distill.feature_loss(student.dims[name], dim, group)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        prediction = self.student.predict(*(batch[name] for name in ("images", "inside", "boxes", "labels")))
        share = share_of_ranks(prediction.objects, self.group)
        losses = {name: loss / share for name, loss in prediction.losses.items()}
        total = torch.stack([*losses.values()]).sum()
        features: dict[str, Tensor] = {}
        for name, feature_loss in self.feature_losses.items():
            ours, theirs = prediction.features[name], batch["teacher"][name]
            if ours.shape[:-1] != theirs.shape[:-1]:
                raise RunError(
                    f"teacher and student must have the same positions and queries; {name} is {(*theirs.shape,)} of "
                    f"the teacher and {(*ours.shape,)} of the student"
                )
            mask = None
            if name.startswith("map"):
                mask = compared(batch, ours.shape[1], ours.shape[2], self.distill.where)
            features[name] = feature_loss(ours, theirs, mask=mask)
        if features:
            losses["features"] = torch.stack([*features.values()]).sum()
            total = total + self.distill.weight * losses["features"]
            losses |= {f"features/{name}": x for name, x in features.items()} if len(features) > 1 else {}
        return {**losses, "total": total}


def share_of_ranks(count: Tensor, group: Any) -> Tensor:
    """The number of objects of all ranks by the number of ranks: what a rank's sum is to be divided by. At least 1."""
    total, ranks = count.detach().float(), 1
    if group is not None:
        ranks = torch.distributed.get_world_size(group)
        torch.distributed.all_reduce(total, group=group)
    return total.clamp(min=1) / ranks


def compared(batch: dict[str, Any], height: int, width: int, where: str) -> Tensor:
    """Which locations of maps of this size are compared: (N, height, width) bool."""
    valid = coco.at_map(batch["inside"], height, width)
    if where == "image":
        return valid
    y, x = (
        (torch.arange(cells, device=valid.device) + 0.5) * (pixels / cells)
        for cells, pixels in zip((height, width), batch["images"].shape[-2:], strict=True)
    )
    x0, y0, x1, y1 = batch["boxes"].unbind(-1)  # each (N, M)
    in_x = (x > x0[..., None]) & (x < x1[..., None])  # (N, M, width)
    in_y = (y > y0[..., None]) & (y < y1[..., None])
    within = in_y[..., :, None] & in_x[..., None, :] & (batch["labels"] >= 0)[..., None, None]
    return valid & within.any(dim=1)


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
        return make_detector(config, classes, channels, empty=empty)

    def make_detector(self, config: Any) -> Detector:
        return self.detector(config, getattr(config, "classes", 0) or self.classes, self.config.data.channels)

    # ---- data --------------------------------------------------------------------------------------------------------

    @property
    def labeled(self) -> int:
        return self.config.data.labeled

    @cached_property
    def data(self) -> tuple[coco.CocoImages, coco.CocoImages]:
        """Training and evaluation images; the scenes of a seed where there are none of one's own."""
        d = self.config.data
        if d.train:
            train = coco.open_coco(d.train, d.train_annotations, "data.train", d)
            val = coco.open_coco(d.val, d.val_annotations, "data.val", d)
        elif d.channels != 1:
            raise OptionError("data.train: missing; without it the data are gray scenes (data.channels=1)")
        else:
            parts = scenes.composed(self.seed, self.labeled or self.config.scenes.train, self.config.scenes.val)
            names = (f"training scenes of seed {self.seed}", f"evaluation scenes of seed {self.seed}")
            train, val = (scenes.in_memory(part, name) for part, name in zip(parts, names, strict=True))
        if train.names != val.names:
            different = sorted({*train.names.items()} ^ {*val.names.items()})
            raise RunError(f"{train.where} and {val.where}: their categories differ, first in {different[0]}")
        if d.classes not in (0, len(train.names)):
            raise RunError(f"data.classes is {d.classes}, but {train.where} has {len(train.names)} categories")
        if self.labeled > len(train):
            raise OptionError(f"data.labeled: {self.labeled}, but there are only {len(train)} training images")
        return train, val

    @property
    def classes(self) -> int:
        return len(self.data[0].names)

    @property
    def images(self) -> int:
        return self.labeled or len(self.data[0])

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        d = self.config.data
        return torch.tensor(d.mean).view(-1, 1, 1), torch.tensor(d.std).view(-1, 1, 1)

    def read(self, views: Views, keys: Any, at_once: int = 0) -> Iterator[dict[str, Any]]:
        collate = partial(coco.collate, mean=self.pixels[0], std=self.pixels[1])
        for batch in read(views, keys, collate, workers=self.config.run.workers, at_once=at_once):
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

    def train_teacher(self) -> dict[str, Any]:
        """Train the seed's teacher on all training images, or check that its weights fit."""
        if not self.config.distill.weight:
            return {}
        if not trained_here(self.config):
            self.make_teacher()
            return {}
        result = engine.train(TeacherTraining(self.config, self.context), weights="teacher.safetensors")
        return {name: result[name] for name in ("AP", "AP50", "AP75", "seconds", "cpu_seconds")}

    def make_teacher(self) -> Detector:
        """With its weights."""
        t, teacher = self.config.teacher, self.make_detector(self.config.teacher)
        if trained_here(self.config) and self.context.teacher is not None:
            load_weights(teacher, self.context.teacher / "teacher.safetensors", "teacher")
        elif t.weights:
            load_weights(teacher, Path(t.weights), "teacher.weights")
        return teacher

    @cached_property
    def teacher(self) -> Any:
        """Frozen, on this rank's device."""
        return self.fabric.to_device(self.make_teacher().requires_grad_(False).eval())

    def teach(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The teacher's features of a batch, from memory where an image is always the same."""
        if self.config.teacher.cache:
            return {name: stored[batch["index"]] for name, stored in self.stored.items()}
        with torch.no_grad(), self.fabric.autocast():
            return self.teacher.predict(batch["images"], batch["inside"]).features

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        if len(sizes := {*self.data[0].sizes}) > 1:
            raise OptionError(f"teacher.cache: the images have {len(sizes)} sizes; teacher.cache=false")
        parts: dict[str, list[Tensor]] = {name: [] for name in self.teacher.dims}
        for batch in self.read(self.training_views, map(Key, range(self.images)), at_once=READ_AT_ONCE):
            with torch.no_grad(), self.fabric.autocast():
                for name, features in self.teacher.predict(batch["images"], batch["inside"]).features.items():
                    parts[name].append(features)
        return {name: torch.cat(part) for name, part in parts.items()}

    # ---- the student -------------------------------------------------------------------------------------------------

    def make_student(self) -> nn.Module:
        student = self.make_detector(self.config.student)
        if self.config.student.weights:
            load_weights(student, Path(self.config.student.weights), "student.weights")
        return student

    def make_model(self, student: nn.Module) -> nn.Module:
        distill = self.config.distill
        return DistilledDetector(
            student, distill, self.teacher.dims if distill.weight else {}, self.context.process_group
        )

    def detect(self, student: Any, indices: Any) -> Iterator[tuple[int, Tensor, tuple[int, int], Detections]]:
        """(index, image (C, H, W), its height and width, detections in its pixels)."""
        val = self.data[1]
        views = Views(val, coco.evaluation_transform(self.config.augment))
        at_once = READ_AT_ONCE if max(map(max, val.sizes)) <= SMALL else 1
        for batch in self.read(views, map(Key, indices), at_once):
            detected = student.detections(student.predict(batch["images"], batch["inside"]), batch["inside"])
            parts = zip(batch["index"].tolist(), batch["images"], batch["inside"], detected, strict=True)
            for index, image, inside, detections in parts:
                height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
                yield (
                    index,
                    image[:, :height, :width].cpu(),
                    (height, width),
                    Detections(*(x.cpu() for x in detections)),
                )

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        val, ranks = self.data[1], self.fabric.world_size
        seen, rows = list[int](), list[list[float]]()
        for index, _, size, detections in self.detect(student, range(len(val))[self.mine]):
            seen.append(index)
            scale = torch.tensor([val.sizes[index][0] / size[1], val.sizes[index][1] / size[0]] * 2)
            boxes = detections.boxes * scale  # in the original's pixels
            boxes[:, 2:] -= boxes[:, :2]
            parts = (boxes.tolist(), detections.scores.tolist(), detections.labels.tolist())
            rows += [
                [float(val.ids[index]), *box, score, float(val.categories[label])]
                for box, score, label in zip(*parts, strict=True)
            ]
        if ranks > 1:
            every: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(every, (seen, rows))
            seen, rows = [i for part in every for i in part[0]], [row for part in every for row in part[1]]
        metrics = coco.average_precision(val, seen, rows)
        if metrics["AP"] != metrics["AP"]:
            raise RunError(f"{val.where}: no image with an object can be read, so there is no average precision")
        return metrics

    def pictures(self, student: nn.Module, folder: Path) -> None:
        """For every image its ground truth and, to the right of it, what was detected: one PNG."""
        val, panels = self.data[1], list[Tensor]()
        names = [val.names[id] for id in val.categories]
        for index, image, size, detections in self.detect(student, range(min(SHOWN, len(val)))):
            scale = torch.tensor([size[1] / val.sizes[index][0], size[0] / val.sizes[index][1]] * 2)
            boxes, labels = torch.from_numpy(val.boxes[index]) * scale, val.labels[index].tolist()
            pixels = ((image * self.pixels[1] + self.pixels[0]) * 255).round().clamp(0, 255).to(torch.uint8)
            good = detections.scores > SHOWN_SCORE
            scored = zip(detections.labels[good].tolist(), detections.scores[good].tolist(), strict=True)
            panels.append(drawn(pixels, boxes, [names[label] for label in labels], "#30c030"))
            texts = [f"{names[label]} {score:.2f}" for label, score in scored]
            panels.append(drawn(pixels, detections.boxes[good], texts, "#f04040"))
        if panels:
            side = max(max(panel.shape[-2:]) for panel in panels)
            panels = [v2.functional.pad(p, [0, 0, side - p.shape[-1], side - p.shape[-2]]) for p in panels]
            file = io.BytesIO()
            v2.functional.to_pil_image(make_grid(panels, nrow=4, padding=6, pad_value=255)).save(file, format="PNG")
            runs.write_atomically(folder / "detections.png", lambda out: out.write(file.getvalue()))

    @classmethod
    def describe(cls, config: Any) -> dict[str, Any]:
        """Reads annotations only to learn the number of classes."""
        d, about = config.data, dict[str, Any]()
        for name in ("train", "val"):
            if getattr(d, name) and not (
                Path(getattr(d, name)).is_dir() and Path(getattr(d, f"{name}_annotations")).is_file()
            ):
                raise OptionError(
                    f"data.{name}: there is no folder {getattr(d, name)}, or no {getattr(d, f'{name}_annotations')}"
                )
        classes = d.classes or scenes.CLASSES
        if d.train and not d.classes:
            classes = len(coco.open_coco(d.train, d.train_annotations, "data.train", d).names)
        dims: dict[str, dict[str, int]] = {}
        for side in ("student", *(["teacher"] if config.distill.weight else [])):
            detector = getattr(config, side)
            model = cls.detector(detector, getattr(detector, "classes", 0) or classes, d.channels, empty=True)
            dims[side] = model.dims
            about[side] = {
                "model": detector.name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "classes": model.classes,
                "features (channels)": model.dims,
            }
        if config.distill.weight:
            about["projections (teacher, student)"] = {
                name: [dims["teacher"][name], s] for name, s in dims["student"].items() if name in dims["teacher"]
            }
        o = config.optim
        return about | {"steps": o.steps or f"{o.epochs:g} epochs", "images per step": o.batch_size}

    @classmethod
    def check(cls, config: Any) -> None:
        if config.distill.weight:
            trained_here(config)
        for side, detector in (("student", config.student), ("teacher", config.teacher)):
            if detector.weights and not Path(detector.weights).is_file():
                raise OptionError(f"{side}.weights: there is no file {detector.weights}")
        if not config.data.train and config.data.channels != 1:
            raise OptionError("data.train: missing; without it the data are gray scenes (data.channels=1)")
        cls.describe(config)


class TeacherTraining(Detection):
    """The same with the teacher in the student's place: it learns from the boxes of all training images."""

    labeled = 0  # all

    def __init__(self, config: Any, context: Context) -> None:
        t = config.teacher
        changes = {"lr": t.lr, "min_lr": 0.0, "steps": t.steps, "epochs": 0.0, "batch_size": t.batch_size}
        optim = config.optim.model_copy(update={**changes, "ema": 0.0})
        alone = config.distill.model_copy(update={"weight": 0.0})
        run = config.run.model_copy(update={"eval_every": 0})
        super().__init__(config.model_copy(update={"optim": optim, "distill": alone, "run": run}), context)

    def make_student(self) -> nn.Module:
        return self.make_detector(self.config.teacher)


def drawn(image: Tensor, boxes: Tensor, texts: list[str], color: str) -> Tensor:
    """An image (C, H, W) uint8 enlarged or reduced to be looked at, with boxes and their texts."""
    import matplotlib

    scale = SHOWN_SIDE / max(image.shape[-2:])
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    image = v2.functional.resize(image.expand(3, -1, -1), size, interpolation=v2.InterpolationMode.NEAREST)
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    return draw_bounding_boxes(image, boxes * scale, texts, color, width=2, font=font, font_size=15) if texts else image


def trained_here(config: Any) -> bool:
    """Whether the teacher is trained by this run; an error where its weights come from nowhere."""
    t = config.teacher
    if t.weights or t.name not in ("fcos", "deformable-detr"):  # a folder or a name of the hub has weights
        return False
    if not t.steps:
        raise OptionError("teacher.weights: give a file, or teacher.steps > 0 to train the teacher here")
    return True
