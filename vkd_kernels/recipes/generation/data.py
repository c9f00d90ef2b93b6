"""The images of the generation task, all in memory: scikit-learn's digits, CIFAR, or folders of images per class.

A seed's split: the pool is for training, and of it the GAN sees `data.fraction` of every class; held-out images are
what generated ones are compared with.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import OptionError
from ..engine import generator
from ..runs import RunError
from .models import Shape

DIGITS, DIGITS_SIZE, DEFAULT_SIZE, CLASSES = 1797, 8, 32, {"digits": 10, "cifar10": 10, "cifar100": 100}
SPLIT = 0  # what a draw is for, beside the seed


@dataclass
class Images:
    """Images are uint8, or float from -1 to 1."""

    pool: Tensor  # (N, C, H, W)
    pool_labels: Tensor  # (N,)
    held_out: Tensor  # (M, C, H, W)
    held_out_labels: Tensor  # (M,)
    seen: Tensor  # rows of the pool that the GAN sees
    shape: Shape


def as_float(images: Tensor) -> Tensor:
    """From -1 to 1."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def as_bytes(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()


def open_images(data: Any, seed: int) -> Images:
    if data.name != "digits" and not Path(data.root).is_dir():
        raise OptionError(
            f"data.root: there is no folder {data.root!r}; it must hold the images of data.name={data.name}"
        )
    if data.name == "digits":
        parts, classes = read_digits(data.pool, seed), CLASSES["digits"]
    elif data.name == "folder":
        parts, classes = read_folder(data)
    else:
        parts, classes = read_cifar(data), CLASSES[data.name]
    pool, labels, held_out, held_out_labels = parts
    seen = choose(labels, classes, data.fraction, seed)
    return Images(pool, labels, held_out, held_out_labels, seen, Shape(pool.shape[1], pool.shape[2], classes))


def choose(labels: Tensor, classes: int, fraction: float, seed: int) -> Tensor:
    """Rows of a random share of every class, at least one of each."""
    order = torch.randperm(len(labels), generator=generator(seed, SPLIT, 1))
    rows = [order[labels[order] == label] for label in range(classes)]
    return torch.cat([found[: max(1, round(fraction * len(found)))] for found in rows])


def shape_of(data: Any) -> Shape:
    """The images' shape and the number of classes; looks into a folder, reads no image."""
    if data.name == "digits":
        return Shape(1, DIGITS_SIZE, CLASSES["digits"])
    classes = len(open_folder(data, "train").classes) if data.name == "folder" else CLASSES[data.name]
    return Shape(3, (data.size or DEFAULT_SIZE) if data.name == "folder" else DEFAULT_SIZE, classes)


# ---- reading ---------------------------------------------------------------------------------------------------------

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def read_digits(pool: int, seed: int) -> Parts:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = (torch.from_numpy(raw.images).float() / 8 - 1).unsqueeze(1)  # 0 to 16 in the files
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(DIGITS, generator=generator(seed, SPLIT))
    inside, outside = order[:pool], order[pool:]
    return images[inside], labels[inside], images[outside], labels[outside]


def read_cifar(data: Any) -> Parts:
    import torchvision

    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[data.name]
    found: list[Tensor] = []
    for train in (True, False):
        try:
            part = kind(data.root, train=train, download=data.download)
        except Exception as error:  # missing or damaged files, no network: as many types as ways to fail
            hint = "" if data.download else "; data.download=true fetches them"
            raise RunError(f"data.root: cannot read {data.name} in {data.root} ({error}){hint}") from error
        found += [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)]
    return found[0], found[1], found[2], found[3]


def open_folder(data: Any, split: str) -> Any:
    from torchvision.datasets import ImageFolder

    folder = Path(data.root) / split
    if not folder.is_dir():
        raise OptionError(f"data.root: there is no folder {folder}; it must hold one folder of images per class")
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class, or classes without images, which it names
        raise RunError(f"{folder}: {error}") from error


def read_folder(data: Any) -> tuple[Parts, int]:
    train, test = (open_folder(data, split) for split in ("train", "test"))
    if train.classes != test.classes:
        different = ", ".join(sorted({*train.classes} ^ {*test.classes})[:5])
        raise RunError(f"{data.root}: train and test have different classes; only in one of them: {different}")
    return (*read_images(train, data.size), *read_images(test, data.size)), len(train.classes)


def read_images(folder: Any, size: int) -> tuple[Tensor, Tensor]:
    """All images of a folder as RGB, cropped to a square in the middle and resized; warns of what cannot be read."""
    import numpy
    from PIL import Image, ImageOps

    side = size or DEFAULT_SIZE
    images, labels, broken = [], [], 0
    for path, label in folder.samples:
        try:
            with Image.open(path) as image:
                pixels = numpy.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC))
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            broken += 1
            print(f"warning: cannot read {path} ({error}): left out; {broken} so far", file=sys.stderr)
            continue
        images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        labels.append(label)
    if empty := set(range(len(folder.classes))) - set(labels):
        raise RunError(f"{folder.root}: no image of the class {folder.classes[min(empty)]!r} can be read")
    return torch.stack(images), torch.tensor(labels)
