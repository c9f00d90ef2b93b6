"""Scenes composed from scikit-learn's handwritten digits, in COCO's format: the data that detection brings along.

Real strokes at random places and scales: every canvas holds a few digits with tight boxes, fragments of other digits as
clutter, and noise. Training scenes use one part of the 1797 digits, evaluation scenes the others.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from PIL import Image

from ..engine import generator
from ..runs import save_json, write_atomically
from .coco import CocoImages

CLASSES = 10
HELD_OUT = 497  # of the 1797 digits, for the evaluation scenes
CANVAS = 64
SIZES = (12, 28)  # pixels, of a digit before its box is made tight
DIGITS = (1, 4)
OVERLAP = 2  # pixels by which two boxes may overlap in width or in height
CONTRAST = (0.6, 1.0)
FRAGMENTS, FRAGMENT_SIZES = 3, (4, 9)
NOISE = 0.15
INK = 0.3  # of a digit's own maximum: what belongs to its box
BLACK, GAIN = 0.25, 0.5  # of the 8-bit range: what background and full ink become, so that noise is not cut off


@dataclass
class Scene:
    image: torch.Tensor  # (CANVAS, CANVAS) uint8
    boxes: list[list[int]]  # x, y, width, height
    labels: list[int]


def compose(digits: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> Scene:
    """One canvas from digits (N, 8, 8) in [0, 1] and their labels (N,)."""

    def whole(low: int, high: int) -> int:  # both included
        return int(torch.randint(low, high + 1, (), generator=generator))

    def contrast() -> float:
        return CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * float(torch.rand((), generator=generator))

    canvas = torch.zeros(CANVAS, CANVAS)

    def paste(ink: torch.Tensor, x: int, y: int) -> None:
        region = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
        torch.maximum(region, ink * contrast(), out=region)

    for _ in range(FRAGMENTS):
        digit, row, column = digits[whole(0, len(digits) - 1)], whole(0, 4), whole(0, 4)
        ink = resized(digit[row : row + 4, column : column + 4], whole(*FRAGMENT_SIZES))
        paste(ink, whole(0, CANVAS - ink.shape[1]), whole(0, CANVAS - ink.shape[0]))

    scene = Scene(canvas, [], [])
    for _ in range(whole(*DIGITS)):
        index = whole(0, len(digits) - 1)
        ink = tight(resized(digits[index], whole(*SIZES)))
        height, width = ink.shape
        for _ in range(50):  # places; a canvas that is too full gets one digit less
            x, y = whole(0, CANVAS - width), whole(0, CANVAS - height)
            if all(overlap([x, y, width, height], box) <= OVERLAP for box in scene.boxes):
                paste(ink, x, y)
                scene.boxes.append([x, y, width, height])
                scene.labels.append(int(labels[index]))
                break
    noisy = canvas + NOISE * torch.randn(canvas.shape, generator=generator)
    scene.image = (255 * (BLACK + GAIN * noisy)).round().clamp(0, 255).to(torch.uint8)
    return scene


def resized(ink: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(ink[None, None], (size, size), mode="bilinear")[0, 0]


def tight(ink: torch.Tensor) -> torch.Tensor:
    """Without the rows and columns around it that hold no ink to speak of."""
    inked = ink > INK * ink.max()
    rows, columns = inked.any(dim=1).nonzero().flatten(), inked.any(dim=0).nonzero().flatten()
    return ink[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def overlap(a: list[int], b: list[int]) -> int:
    """Pixels by which two boxes overlap in the direction in which they overlap less; at most 0: not at all."""
    return min(min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))


def split_digits(seed: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(images (N, 8, 8) in [0, 1], labels (N,)) of the digits to train on, and of the HELD_OUT others."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images, labels = torch.from_numpy(raw.images).float() / 16, torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    inside, outside = order[HELD_OUT:], order[:HELD_OUT]
    return (images[inside], labels[inside]), (images[outside], labels[outside])


def compose_data(seed: int, train: int, val: int) -> tuple[CocoImages, CocoImages]:
    """The first `train` training scenes of a seed, and its `val` evaluation scenes: as if read from folders."""
    parts = composed(seed, train, val)
    return in_memory(parts[0], f"training scenes of seed {seed}"), in_memory(
        parts[1], f"evaluation scenes of seed {seed}"
    )


def composed(seed: int, train: int, val: int) -> tuple[list[Scene], list[Scene]]:
    inside, outside = split_digits(seed)
    return (
        [compose(*inside, generator(seed, 0, number)) for number in range(train)],
        [compose(*outside, generator(seed, 1, number)) for number in range(val)],
    )


def in_memory(scenes: list[Scene], where: str) -> CocoImages:
    images = {file_name(number): scene.image for number, scene in enumerate(scenes, start=1)}
    return CocoImages(coco_annotations(scenes), where, partial(from_memory, images), bad_boxes="error")


def from_memory(images: dict[str, torch.Tensor], name: str) -> Image.Image:
    return Image.fromarray(images[name].numpy())


def write_coco(folder: Path, scenes: list[Scene]) -> None:
    """`folder`/annotations.json and `folder`/images/*.png."""
    for number, scene in enumerate(scenes, start=1):
        write_atomically(folder / "images" / file_name(number), partial(png, scene.image))
    save_json(folder / "annotations.json", coco_annotations(scenes))


def png(image: torch.Tensor, file: BinaryIO) -> None:
    Image.fromarray(image.numpy()).save(file, format="PNG")


def file_name(number: int) -> str:
    return f"{number:06d}.png"


def coco_annotations(scenes: list[Scene]) -> dict[str, Any]:
    """As COCO's instances_*.json."""
    images = [
        {"id": n, "file_name": file_name(n), "width": CANVAS, "height": CANVAS} for n in range(1, len(scenes) + 1)
    ]
    objects = [
        {"image_id": number, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, scene in enumerate(scenes, start=1)
        for box, label in zip(scene.boxes, scene.labels, strict=True)
    ]
    return {
        "images": images, "annotations": [{"id": n, **each} for n, each in enumerate(objects, start=1)],
        "categories": [{"id": digit, "name": str(digit)} for digit in range(CLASSES)],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m vkd_kernels.recipes.detection.scenes", description="Write a seed's scenes as COCO folders."
    )
    parser.add_argument("folder", type=Path, help="becomes train/ and val/, each with annotations.json and images/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=1500, help="training scenes")
    parser.add_argument("--val", type=int, default=300, help="evaluation scenes")
    a = parser.parse_args(argv)
    for name, found in zip(("train", "val"), composed(a.seed, a.train, a.val), strict=True):
        write_coco(a.folder / name, found)


if __name__ == "__main__":
    main()
