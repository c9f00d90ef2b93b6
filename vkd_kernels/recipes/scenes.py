"""Scenes composed from scikit-learn's handwritten digits: the data that detection brings along.

Real strokes at random places and scales: every canvas holds a few digits with tight boxes, fragments of other digits as
clutter, and noise. Training scenes use one part of the 1797 digits, evaluation scenes the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, masks_to_boxes

from . import coco
from .digits import read_digits
from .task import generator

HELD_OUT = 497  # of the 1797 digits, for the evaluation scenes
CANVAS = 64
SIZES = (12, 28)  # pixels, of a digit before its box is made tight
DIGITS = (1, 4)
OVERLAP = 0.05  # of two boxes, at most: intersection over union
CONTRAST = (0.6, 1.0)
FRAGMENTS, FRAGMENT_SIZES = 3, (4, 9)
NOISE = 0.15
INK = 0.3  # of a digit's own maximum: what belongs to its box
BLACK, GAIN = 0.25, 0.5  # of the 8-bit range: what background and full ink become, so that noise is not cut off

Scene = tuple[Tensor, Tensor]  # an image (1, CANVAS, CANVAS) uint8; objects (M, 6) as coco.item takes them


def compose(digits: Tensor, labels: Tensor, draw: torch.Generator) -> Scene:
    """One canvas from digits (N, 8, 8) in [0, 1] and their labels (N,)."""

    def whole(low: int, high: int) -> int:  # both included
        return int(torch.randint(low, high + 1, (), generator=draw))

    def resized(ink: Tensor, size: int) -> Tensor:
        contrast = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * torch.rand((), generator=draw)
        return contrast * F.interpolate(ink[None, None], (size, size), mode="bilinear")[0, 0]

    def paste(ink: Tensor, x: int, y: int) -> None:
        region = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
        torch.maximum(region, ink, out=region)

    canvas, objects = torch.zeros(CANVAS, CANVAS), torch.zeros(0, 6)
    for _ in range(FRAGMENTS):
        digit, row, column, size = digits[whole(0, len(digits) - 1)], whole(0, 4), whole(0, 4), whole(*FRAGMENT_SIZES)
        fragment = resized(digit[row : row + 4, column : column + 4], size)
        paste(fragment, whole(0, CANVAS - size), whole(0, CANVAS - size))
    for _ in range(whole(*DIGITS)):
        index = whole(0, len(digits) - 1)
        ink = resized(digits[index], whole(*SIZES))
        left, top, right, bottom = masks_to_boxes((ink > INK * ink.max())[None])[0].int().tolist()
        ink = ink[top : bottom + 1, left : right + 1]
        for _ in range(50):  # places; a canvas that is too full gets one digit less
            x, y = whole(0, CANVAS - ink.shape[1]), whole(0, CANVAS - ink.shape[0])
            place = torch.tensor([[x, y, x + ink.shape[1], y + ink.shape[0], int(labels[index]), 0.0]])
            if (box_iou(place[:, :4], objects[:, :4]) <= OVERLAP).all():
                paste(ink, x, y)
                objects = torch.cat([objects, place])
                break
    noisy = canvas + NOISE * torch.randn(canvas.shape, generator=draw)
    return (255 * (BLACK + GAIN * noisy)).round().clamp(0, 255).to(torch.uint8)[None], objects


class Scenes:
    """The first `count` training scenes of a seed, or its evaluation scenes, of other digits."""

    names = {digit: str(digit) for digit in range(10)}

    def __init__(self, seed: int, count: int, *, training: bool) -> None:
        images, labels = read_digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        rows = order[HELD_OUT:] if training else order[:HELD_OUT]
        digits, labels, self.where = images[rows, 0], labels[rows], f"scenes of seed {seed}"
        draws = (generator(seed, 0 if training else 1, number) for number in range(count))
        self.items = [coco.item(*compose(digits, labels, draw)) for draw in draws]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, object]:
        return self.items[index]
