"""Every value of a classification run, with its default and where that comes from. The defaults are the bundled run."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import OptionError, option, section
from ..engine import Optim, Run
from .models import DIGITS_STUDENT, DIGITS_TEACHER, STUDENTS

RELEASED = "released code"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataConfig:
    name: str = option("digits", "digits (bundled), folder, or the name of a data set of torchvision: CIFAR100, ...")
    root: str = option("", "where the images are; of a folder: root/train/<class>/*, root/val/<class>/*")
    download: bool = option(False, "let torchvision fetch what is missing")
    train_split: str = option("", "folder or split to train on; default: train")
    test_split: str = option("", "folder or split to evaluate on; default: val in a folder, test in torchvision")
    classes: int = option(0, "number of classes; 0: what the data say", minimum=0)
    size: int = option(224, "side of the images in pixels; digits have 8", source=RELEASED, minimum=8)
    crop: float = option(
        0.875, "evaluation: share of the shorter side that is seen (256 -> 224)", source=RELEASED, above=0, maximum=1
    )
    mean: tuple[float, ...] = option(IMAGENET_MEAN, "of the channels: what the teacher was trained with", source="timm")
    std: tuple[float, ...] = option(IMAGENET_STD, "of the channels", source="timm", above=0)


@dataclass(frozen=True)
class AugmentConfig:
    """Of real images; the digits have their own."""

    enabled: bool = option(True, "false: train on what evaluation sees, and mix nothing")
    views: int = option(
        0, "fixed views of every image, which the teacher may answer in advance; 0: new ones each step", minimum=0
    )
    crop_min: float = option(0.08, "smallest area of a random crop", source=RELEASED, above=0, maximum=1)
    flip: float = option(0.5, "probability of a horizontal flip", source=RELEASED, minimum=0, maximum=1)
    three_augment: bool = option(True, "one of grayscale, solarise, Gaussian blur", source="DeiT III")
    color_jitter: float = option(0.3, "change of brightness, contrast, saturation", source=RELEASED, minimum=0)
    mixup: float = option(0.8, "alpha of mixup; 0: none", source=RELEASED, minimum=0)
    cutmix: float = option(1.0, "alpha of CutMix; 0: none", source=RELEASED, minimum=0)
    mix_switch: float = option(0.5, "probability of CutMix where both are on", source=RELEASED, minimum=0, maximum=1)


@dataclass(frozen=True)
class DigitsConfig:
    pool: int = option(1000, "training images of the 1797; the others are the test set", minimum=100, maximum=1700)
    labels_per_class: int = option(10, "labelled training images per digit, for the students", minimum=1)
    labelled_share: float = option(0.5, "labelled images of a batch, as a share", above=0, maximum=1)
    views: int = option(16, "fixed augmented views of every image", minimum=1)
    rotation: float = option(15.0, "largest rotation of a view, in degrees", minimum=0)
    scaling: float = option(0.15, "largest change of size of a view", minimum=0)
    shift: float = option(0.2, "largest shift of a view, in half widths", minimum=0)
    shear: float = option(0.15, "largest shear of a view", minimum=0)


@dataclass(frozen=True)
class TeacherConfig:
    name: str = option(DIGITS_TEACHER, f"{DIGITS_TEACHER} (bundled), or any model of timm")
    weights: str = option("", "its weights, a .safetensors or .pth file; default: it is trained here")
    pretrained: bool = option(False, "let timm fetch its weights")
    classes: int = option(0, "classes of its head; 0: the data's. Others only without logit distillation", minimum=0)
    cache: str | None = option("auto", "folder for its answers to fixed views; auto: in the run folder; none: never")
    widths: tuple[int, ...] = option((24, 48, 96, 192), f"channels of {DIGITS_TEACHER}'s convolutions", minimum=1)
    steps: int = option(300, "training steps, where it is trained here", minimum=0)
    batch_size: int = option(64, "images per training step", minimum=2)
    lr: float = option(2e-3, "peak learning rate", above=0)


@dataclass(frozen=True)
class StudentConfig:
    name: str = option(
        DIGITS_STUDENT, f"{', '.join(STUDENTS)} (the paper's), {DIGITS_STUDENT} (bundled), or any model of timm"
    )
    weights: str = option("", "weights to begin with, a .safetensors or .pth file")
    drop_path: float = option(0.0, "stochastic depth", source="released code", minimum=0, below=1)
    width: int = option(48, f"channels of {DIGITS_STUDENT}", minimum=1)
    depth: int = option(3, f"blocks of {DIGITS_STUDENT}", minimum=1)
    heads: int = option(4, f"attention heads of {DIGITS_STUDENT}", minimum=1)
    mlp_ratio: int = option(2, f"hidden channels of {DIGITS_STUDENT}'s MLPs, in widths", minimum=1)
    patch: int = option(2, f"patch size of {DIGITS_STUDENT}", minimum=1)


@dataclass(frozen=True)
class DistillConfig:
    features: str = option(
        "pooled", "compared features: means over the positions, or every position", choices=("pooled", "tokens")
    )
    projection: str = option(
        "orthogonal", "from the student's channels to the teacher's; none: the teacher's first ones",
        source="the paper", choices=("orthogonal", "linear", "none"),
    )  # fmt: skip
    normalization: str = option(
        "layer_norm", "of the teacher's features", source="the paper, section 4.1",
        choices=("layer_norm", "batch_norm", "whiten", "none"),
    )  # fmt: skip
    scale: float | str = option(
        1.0, "of the projected features: a number, match (sqrt(T/S)) or learned", source="the paper",
        choices=("match", "learned"),
    )  # fmt: skip
    weight: float = option(10.0, "weight of the feature loss", minimum=0)
    beta: float = option(1.0, "where smooth L1 turns linear", source="released code", above=0)
    eps: float = option(0.0, "of the normalisation; 0: 1e-5, for whiten 1e-3", source="released code", minimum=0)
    logit_weight: float = option(1.0, "weight of the logit loss", source="released code", minimum=0)
    temperature: float = option(1.0, "of the logit loss", source="released code", above=0)
    label_smoothing: float = option(0.1, "of the labels", source="released code", minimum=0, below=1)


@dataclass(frozen=True)
class Config:
    data: DataConfig = section(DataConfig)
    augment: AugmentConfig = section(AugmentConfig)
    digits: DigitsConfig = section(DigitsConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    student: StudentConfig = section(StudentConfig)
    distill: DistillConfig = section(DistillConfig)
    optim: Optim = section(Optim, lr=3e-3, warmup=0.1, steps=600, batch_size=64)
    run: Run = section(Run, eval_every=60, save_every=100)

    def __post_init__(self) -> None:
        if self.digits.labels_per_class * 10 >= self.digits.pool:
            raise OptionError(
                f"digits.labels_per_class: {self.digits.labels_per_class} leave nothing unlabelled of a pool of "
                f"{self.digits.pool} images"
            )
        labelled = self.optim.batch_size * self.digits.labelled_share
        if self.data.name == "digits" and (labelled < 1 or labelled != round(labelled)):
            raise OptionError(
                f"digits.labelled_share: {labelled:g} of {self.optim.batch_size} images are no whole number"
            )
        if self.teacher.classes and self.distill.logit_weight:
            raise OptionError(
                f"teacher.classes: logits of {self.teacher.classes} classes teach only with distill.logit_weight=0"
            )
