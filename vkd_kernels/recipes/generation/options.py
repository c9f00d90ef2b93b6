"""Every value of a generation run, with its default and where that comes from; the defaults are the bundled run."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import OptionError, option, section
from ..engine import Optim as EngineOptim
from ..engine import Run
from .augment import POLICIES

TRIAL = "tried on the digits"
PAPER = "the paper, section 4.3"
DIFFAUGMENT = "DiffAugment"
BIGGAN = "BigGAN at 32x32"


@dataclass(frozen=True)
class Data:
    name: str = option(
        "digits", "digits (bundled), cifar10, cifar100, or folder", choices=("digits", "cifar10", "cifar100", "folder")
    )
    root: str = option("", "where the images are; of a folder: root/train/<class>/*, root/test/<class>/*")
    download: bool = option(False, "let torchvision fetch CIFAR into data.root")
    fraction: float = option(0.1, "share of the training images that the GAN sees", source=TRIAL, above=0, maximum=1)
    pool: int = option(
        1000, "training images of the 1797 digits; the others are held out", source=TRIAL, minimum=100, maximum=1700
    )
    size: int = option(0, "side of a folder's images in pixels; 0: 32. Digits have 8, CIFAR 32", minimum=0)


@dataclass(frozen=True)
class Augment:
    """DiffAugment, of real and generated images alike."""

    policy: tuple[str, ...] = option(("translation",), "what is done", source=TRIAL, choices=POLICIES)
    translation: float = option(0.125, "largest shift, as a share of the side", source=DIFFAUGMENT, minimum=0, below=1)
    cutout: float = option(
        0.5, "side of the square that is cut out, as a share", source=DIFFAUGMENT, minimum=0, maximum=1
    )


@dataclass(frozen=True)
class Teacher:
    name: str = option("classifier", "classifier (trained here), clip (of transformers), or an image encoder of timm")
    weights: str = option("", "its weights: a .safetensors or .pth file; of clip a folder; random: none (for tests)")
    pretrained: bool = option(False, "let timm or transformers fetch the weights")
    features: str = option(
        "pooled", "of timm's: pooled, or what its head gives (CLIP's embedding)", choices=("pooled", "head")
    )
    size: int = option(0, "side that images are enlarged to (nearest); 0: what it was trained on", minimum=0)
    widths: tuple[int, ...] = option((24, 48, 96), "channels of the classifier's convolutions", source=TRIAL, minimum=1)
    steps: int = option(300, "training steps of the classifier", minimum=1)
    batch_size: int = option(64, "images per training step of the classifier", minimum=2)
    lr: float = option(2e-3, "peak learning rate of the classifier", above=0)


@dataclass(frozen=True)
class Student:
    """The generator."""

    name: str = option("small", "small, or biggan: generator and discriminator", choices=("small", "biggan"))
    latent: int = option(32, "numbers an image is made from", minimum=1)
    widths: tuple[int, ...] = option((64, 48, 24), "channels of small", minimum=1)
    width: int = option(256, "channels of biggan", source=BIGGAN, minimum=8)
    attention: int = option(0, "side of biggan's map with self-attention; 0: none", source=BIGGAN, minimum=0)


@dataclass(frozen=True)
class Discriminator:
    widths: tuple[int, ...] = option(
        (16, 32, 48), "channels of small; the last is the distilled feature's", source=TRIAL, minimum=1
    )
    width: int = option(256, "channels of biggan", source=BIGGAN, minimum=8)
    attention: int = option(0, "side of biggan's map with self-attention; 0: none", source=BIGGAN, minimum=0)


@dataclass(frozen=True)
class Distill:
    projection: str = option(
        "orthogonal", "from the discriminator's channels to the teacher's; none: the teacher's first ones",
        source="the paper", choices=("orthogonal", "linear", "none"),
    )  # fmt: skip
    normalization: str = option(
        "whiten", "of the teacher's features", source=PAPER, choices=("layer_norm", "batch_norm", "whiten", "none")
    )
    statistics: str = option(
        "pool",
        "images that whitening's are of: all for training (pool), or the GAN's",
        source=TRIAL,
        choices=("pool", "gan"),
    )
    method: str = option("zca", "of whitening", source=TRIAL, choices=("zca", "cholesky", "pca"))
    eps: float = option(0.0, "of the normalisation; 0: 1e-5, for whiten 0.05", minimum=0)
    scale: float | str = option(
        1.0,
        "of the projected features: a number, match (sqrt(T/S)) or learned",
        source="the paper: 1",
        choices=("match", "learned"),
    )
    weight: float = option(5.0, "weight of the feature loss", source=TRIAL, minimum=0)
    beta: float = option(1.0, "where smooth L1 turns linear", above=0)
    images: str = option("both", "images that are distilled", source=TRIAL, choices=("both", "real"))


@dataclass(frozen=True)
class Metric:
    features: str = option(
        "classifier", "classifier (trained on held-out images), or inception: FID", choices=("classifier", "inception")
    )
    weights: str = option("", "file with torch-fidelity's weights of Inception")
    download: bool = option(False, "let torch-fidelity fetch them")
    samples: int = option(2000, "images to generate for it", source=TRIAL, minimum=2)
    batch_size: int = option(200, "of them at once", minimum=1)


@dataclass(frozen=True)
class Optim(EngineOptim):
    """Adam for both networks; `lr` is the generator's."""

    discriminator_lr: float = option(1e-3, "learning rate of discriminator and projection", source=TRIAL, above=0)
    discriminator_steps: int = option(1, "discriminator steps per generator step", source=TRIAL, minimum=1)
    loss: str = option("non_saturating", "adversarial loss", source=TRIAL, choices=("non_saturating", "hinge"))


@dataclass(frozen=True)
class Config:
    data: Data = section(Data)
    augment: Augment = section(Augment)
    teacher: Teacher = section(Teacher)
    student: Student = section(Student)
    discriminator: Discriminator = section(Discriminator)
    distill: Distill = section(Distill)
    metric: Metric = section(Metric)
    optim: Optim = section(
        Optim, lr=5e-4, betas=(0.5, 0.99), weight_decay=0.0, schedule="constant", steps=2500, batch_size=32, ema=0.99,
        sources=dict.fromkeys(("lr", "betas", "steps", "batch_size", "ema"), TRIAL),
    )  # fmt: skip
    run: Run = section(Run, accelerator="cpu", eval_every=250, picture_every=500, save_every=500)

    def __post_init__(self) -> None:
        if self.optim.clip_norm or self.optim.accumulate > 1:
            raise OptionError("optim.clip_norm, optim.accumulate: a GAN's steps know neither; leave them at 0 and 1")
        if self.data.name == "digits" and self.metric.features == "inception":
            raise OptionError("metric.features: inception needs images of three channels; the digits have one")
        if self.data.name == "digits" and "color" in self.augment.policy:
            raise OptionError("augment.policy: color is for images of three channels; the digits have one")
