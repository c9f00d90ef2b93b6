"""Every value of a detection run, with its default and where that comes from. The defaults are the bundled run."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import OptionError, option, section
from ..engine import Optim, Run

FCOS, DEFORMABLE = "fcos", "deformable-detr"
DETR = "Deformable DETR"
TRIED = "tried on seeds 100-103"


@dataclass(frozen=True)
class DataConfig:
    train: str = option("", "folder of training images; default: scenes composed from scikit-learn's digits")
    train_annotations: str = option("", "their COCO annotations, instances_*.json")
    val: str = option("", "folder of evaluation images")
    val_annotations: str = option("", "their COCO annotations")
    labelled: int = option(300, "only the first so many training images are the student's; 0: all", minimum=0)
    classes: int = option(0, "number of categories; 0: what the data say", minimum=0)
    channels: int = option(1, "of the images: 3 for colour", choices=(1, 3))
    mean: tuple[float, ...] = option((0.35,), "of the channels: what the teacher was trained with")
    std: tuple[float, ...] = option((0.2,), "of the channels", above=0)
    bad_boxes: str = option(
        "error", "boxes that are degenerate, or outside their image: an error, or leave them out",
        choices=("error", "drop"),
    )  # fmt: skip
    in_memory: bool = option(True, "keep the decoded images: of small data sets")

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise OptionError(f"data.{name}: one per channel, {self.channels}; got {getattr(self, name)}")
        given = {n: getattr(self, n) for n in ("train", "train_annotations", "val", "val_annotations")}
        if missing := [name for name, value in given.items() if not value]:
            if len(missing) < 4:
                raise OptionError(f"data.{missing[0]}: missing; own data need all of {', '.join(given)}")


@dataclass(frozen=True)
class ScenesConfig:
    """The composed scenes (scenes.py)."""

    train: int = option(1500, "training scenes; the teacher sees all of them", minimum=16)
    val: int = option(300, "evaluation scenes, of other digits", minimum=1)


@dataclass(frozen=True)
class AugmentConfig:
    flip: float = option(0.0, "probability of a horizontal flip", minimum=0, maximum=1)
    short_sides: tuple[int, ...] = option((), "shorter side in pixels, drawn from these; none: as it is", minimum=8)
    longest: int = option(1333, "longer side in pixels, at most", source=DETR, minimum=8)
    crop: float = option(0.0, "probability of a random crop, before it is resized", minimum=0, maximum=1)
    crop_short_sides: tuple[int, ...] = option((400, 500, 600), "shorter side before the crop", source=DETR, minimum=8)
    crop_sizes: tuple[int, ...] = option((384, 600), "smallest and largest side of a crop", source=DETR, minimum=8)
    val_short_side: int = option(0, "shorter side in evaluation; 0: as it is", minimum=0)

    def __post_init__(self) -> None:
        if len(self.crop_sizes) != 2 or self.crop_sizes[0] > self.crop_sizes[1]:
            raise OptionError(f"augment.crop_sizes: must be smallest and largest, got {self.crop_sizes}")

    @property
    def fixed(self) -> bool:
        """Is an image the same every time?"""
        return not self.flip and not self.crop and len(self.short_sides) <= 1


@dataclass(frozen=True)
class DetectorConfig:
    name: str = option(
        FCOS,
        f"{FCOS} (bundled), {DEFORMABLE}, a folder or hub name of a Deformable DETR of transformers, or your own: "
        "package.module:Class",
    )
    weights: str = option("", "weights to begin with: student.safetensors of a run, or another state dict")
    widths: tuple[int, ...] = option((12, 24, 32), f"{FCOS}: channels before the map", source=TRIED, minimum=1)
    channels: int = option(32, f"{FCOS}: channels of the map and the heads", source=TRIED, minimum=1)
    backbone: str = option(
        "swin-nano", f"{DEFORMABLE}: swin-nano, -tiny, -small, -base, or a name of timm", source="the paper"
    )
    backbone_weights: str = option(
        "", "pretrained weights of the backbone: a file; a folder or hub name of transformers; or timm, to fetch them"
    )
    queries: int = option(100, f"{DEFORMABLE}: object queries", source="the paper", minimum=1)
    dim: int = option(256, f"{DEFORMABLE}: channels of maps and queries", source="the paper", minimum=64)
    heads: int = option(8, f"{DEFORMABLE}: attention heads", source=DETR, minimum=1)
    encoder_layers: int = option(6, f"{DEFORMABLE}: layers of the encoder", source=DETR, minimum=1)
    decoder_layers: int = option(6, f"{DEFORMABLE}: layers of the decoder", source="the paper", minimum=1)
    dropout: float = option(0.1, f"{DEFORMABLE}: dropout of its transformer", source=DETR, minimum=0, below=1)

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads) or self.dim % 32:
            raise OptionError(f"dim: {self.dim} must be a multiple of 32 and of twice the heads, {self.heads}")


@dataclass(frozen=True)
class TeacherConfig(DetectorConfig):
    classes: int = option(0, "classes of its weights; 0: the data's", minimum=0)
    cache: bool = option(True, "keep its features of every training image: without augmentation")
    steps: int = option(400, "training steps, where it is trained here; 0: its weights are given", minimum=0)
    batch_size: int = option(16, "images per training step", minimum=1)
    lr: float = option(4e-3, "peak learning rate", source=TRIED, above=0)


@dataclass(frozen=True)
class DistillConfig:
    where: str = option(
        "boxes", "locations of the maps that are compared: inside ground-truth boxes, or of the whole image",
        choices=("boxes", "image"),
    )  # fmt: skip
    projection: str = option(
        "orthogonal", "from the student's channels to the teacher's; none: the teacher's first ones",
        source="the paper", choices=("orthogonal", "linear", "none"),
    )  # fmt: skip
    normalization: str = option(
        "batch_norm", "of the teacher's features", source="the paper, section 4.2",
        choices=("layer_norm", "batch_norm", "whiten", "none"),
    )  # fmt: skip
    scale: float | str = option(
        1.0, "of the projected features: a number, or match (sqrt(T/S))", source="the paper: 1", choices=("match",)
    )
    weight: float = option(4.0, "weight of the sum of the feature losses", source="released code", minimum=0)
    beta: float = option(1.0, "where smooth L1 turns linear", source="released code", above=0)
    eps: float = option(0.0, "of the normalisation; 0: 1e-5, for whiten 1e-3", minimum=0)


@dataclass(frozen=True)
class Config:
    data: DataConfig = section(DataConfig)
    scenes: ScenesConfig = section(ScenesConfig)
    augment: AugmentConfig = section(AugmentConfig)
    teacher: TeacherConfig = section(
        TeacherConfig, widths=(16, 32, 48), channels=96, sources=dict.fromkeys(("widths", "channels"), TRIED)
    )
    student: DetectorConfig = section(DetectorConfig)
    distill: DistillConfig = section(DistillConfig)
    optim: Optim = section(
        Optim, lr=4e-3, steps=600, batch_size=16, warmup=0.25, weight_decay=0.05,
        sources=dict.fromkeys(("lr", "steps", "batch_size", "warmup", "weight_decay"), TRIED),
    )  # fmt: skip
    run: Run = section(Run, accelerator="cpu", eval_every=300, save_every=100)

    def __post_init__(self) -> None:
        if self.teacher.cache and not self.augment.fixed:
            raise OptionError("teacher.cache: features of an image can't be kept where augment changes it every time")
        if not self.data.train and self.data.labelled > self.scenes.train:
            raise OptionError(f"data.labelled: {self.data.labelled} of scenes.train={self.scenes.train}")
