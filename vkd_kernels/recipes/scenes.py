"""Scenes composed from scikit-learn's handwritten digits, in COCO's format: the data that detection brings along.

Real strokes at random places and scales: every canvas holds a few digits with tight boxes, fragments of other digits as
clutter, and noise. Training scenes use one part of the 1797 digits, evaluation scenes the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .coco import CocoImages
from .digits import read_digits
from .task import generator

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


Scene = tuple[Tensor, list[list[int]], list[int]]  # an image (CANVAS, CANVAS) uint8; boxes x, y, width, height; labels


def compose(digits: Tensor, labels: Tensor, draw: torch.Generator) -> Scene:
    """One canvas from digits (N, 8, 8) in [0, 1] and their labels (N,)."""

    def whole(low: int, high: int) -> int:  # both included
        return int(torch.randint(low, high + 1, (), generator=draw))

    canvas = torch.zeros(CANVAS, CANVAS)

    def paste(ink: Tensor, x: int, y: int) -> None:
        region = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
        contrast = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * float(torch.rand((), generator=draw))
        torch.maximum(region, ink * contrast, out=region)

    for _ in range(FRAGMENTS):
        digit, row, column = digits[whole(0, len(digits) - 1)], whole(0, 4), whole(0, 4)
        ink = resized(digit[row : row + 4, column : column + 4], whole(*FRAGMENT_SIZES))
        paste(ink, whole(0, CANVAS - ink.shape[1]), whole(0, CANVAS - ink.shape[0]))

    boxes: list[list[int]] = []
    shown: list[int] = []
    for _ in range(whole(*DIGITS)):
        index = whole(0, len(digits) - 1)
        ink = tight(resized(digits[index], whole(*SIZES)))
        height, width = ink.shape
        for _ in range(50):  # places; a canvas that is too full gets one digit less
            x, y = whole(0, CANVAS - width), whole(0, CANVAS - height)
            if all(overlap([x, y, width, height], box) <= OVERLAP for box in boxes):
                paste(ink, x, y)
                boxes.append([x, y, width, height])
                shown.append(int(labels[index]))
                break
    noisy = canvas + NOISE * torch.randn(canvas.shape, generator=draw)
    return (255 * (BLACK + GAIN * noisy)).round().clamp(0, 255).to(torch.uint8), boxes, shown


def resized(ink: Tensor, size: int) -> Tensor:
    return F.interpolate(ink[None, None], (size, size), mode="bilinear")[0, 0]


def tight(ink: Tensor) -> Tensor:
    """Without the rows and columns around it that hold no ink to speak of."""
    inked = ink > INK * ink.max()
    rows, columns = inked.any(dim=1).nonzero().flatten(), inked.any(dim=0).nonzero().flatten()
    return ink[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def overlap(a: list[int], b: list[int]) -> int:
    """Pixels by which two boxes overlap in the direction in which they overlap less; at most 0: not at all."""
    return min(min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))


def composed(seed: int, train: int, val: int) -> tuple[list[Scene], list[Scene]]:
    """The first `train` training scenes of a seed, and its `val` evaluation scenes, of other digits."""
    images, labels = read_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    inside, outside = order[HELD_OUT:], order[:HELD_OUT]
    return (
        [compose(images[inside, 0], labels[inside], generator(seed, 0, number)) for number in range(train)],
        [compose(images[outside, 0], labels[outside], generator(seed, 1, number)) for number in range(val)],
    )


def in_memory(scenes: list[Scene], where: str) -> CocoImages:
    """As if read from a folder."""
    images = [Image.fromarray(image.numpy()) for image, _, _ in scenes]
    content = {
        "images": [{"id": n, "file_name": str(n)} for n in range(len(scenes))],
        "annotations": [
            {"image_id": n, "category_id": label, "bbox": box}
            for n, (_, boxes, labels) in enumerate(scenes)
            for box, label in zip(boxes, labels, strict=True)
        ],
        "categories": [{"id": digit, "name": str(digit)} for digit in range(CLASSES)],
    }
    return CocoImages(content, where, lambda name: images[int(name)].copy(), channels=1, keep=True)
