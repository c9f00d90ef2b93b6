"""Scenes composed from small gray pictures, handwritten digits or garments: the data that detection brings along.

Real strokes at random places and scales: every canvas holds a few pictures with tight boxes, fragments of others as
clutter, and noise. Training scenes are made of a data set's training images, evaluation scenes of its held-out ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, masks_to_boxes
from torchvision.transforms.functional import to_tensor

from . import coco, images
from .task import generator

CANVAS = 64
SIZES = (12, 28)  # pixels, of a picture before its box is made tight
PICTURES = (1, 4)
OVERLAP = 0.05  # of two boxes, at most: intersection over union
CONTRAST = (0.6, 1.0)
FRAGMENTS, FRAGMENT_SIZES = 3, (4, 9)
NOISE = 0.15
INK = 0.3  # of a picture's own maximum: what belongs to its box
BLACK, GAIN = 0.25, 0.5  # of the 8-bit range: what background and full ink become, so that noise is not cut off

Scene = tuple[Tensor, Tensor]  # an image (1, CANVAS, CANVAS) uint8; objects (M, 6) as coco.item takes them


def compose(pictures: Any, draw: torch.Generator) -> Scene:
    """One canvas from a data set of (square picture, label)."""

    def whole(low: int, high: int) -> int:  # both included
        return int(torch.randint(low, high + 1, (), generator=draw))

    def some_picture() -> tuple[Tensor, int]:  # (H, W) from 0 to 1
        picture, label = pictures[whole(0, len(pictures) - 1)]
        return to_tensor(picture.convert("L"))[0], label

    def resized(ink: Tensor, size: int) -> Tensor:
        contrast = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * torch.rand((), generator=draw)
        return contrast * F.interpolate(ink[None, None], (size, size), mode="bilinear")[0, 0]

    def paste(ink: Tensor, x: int, y: int) -> None:
        region = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
        torch.maximum(region, ink, out=region)

    canvas, objects = torch.zeros(CANVAS, CANVAS), torch.zeros(0, 6)
    for _ in range(FRAGMENTS):
        picture, size = some_picture()[0], whole(*FRAGMENT_SIZES)
        half = len(picture) // 2
        row, column = whole(0, half), whole(0, half)
        fragment = resized(picture[row : row + half, column : column + half], size)
        paste(fragment, whole(0, CANVAS - size), whole(0, CANVAS - size))
    for _ in range(whole(*PICTURES)):
        picture, label = some_picture()
        ink = resized(picture, whole(*SIZES))
        inked = ink > INK * ink.max()
        if not inked.any():  # a black picture
            continue
        left, top, right, bottom = masks_to_boxes(inked[None])[0].int().tolist()
        ink = ink[top : bottom + 1, left : right + 1]
        for _ in range(50):  # tries to place it; a canvas that is too full gets fewer pictures
            x, y = whole(0, CANVAS - ink.shape[1]), whole(0, CANVAS - ink.shape[0])
            place = torch.tensor([[x, y, x + ink.shape[1], y + ink.shape[0], label, 0.0]])
            if (box_iou(place[:, :4], objects[:, :4]) <= OVERLAP).all():
                paste(ink, x, y)
                objects = torch.cat([objects, place])
                break
    noisy = canvas + NOISE * torch.randn(canvas.shape, generator=draw)
    return (255 * (BLACK + GAIN * noisy)).round().clamp(0, 255).to(torch.uint8)[None], objects


class Scenes:
    """The first `count` training scenes of a seed, or its evaluation scenes, of other pictures of `source`."""

    def __init__(self, source: images.Source, seed: int, count: int, *, training: bool) -> None:
        train, held_out, classes = images.open_images(source, seed, "scenes")
        self.names = dict(enumerate(getattr(train, "classes", range(classes))))  # some data sets name none
        self.where = f"scenes of seed {seed}"
        draws = (generator(seed, 0 if training else 1, number) for number in range(count))
        composed = (compose(train if training else held_out, draw) for draw in draws)
        self.items = [(image.numpy(), objects.numpy()) for image, objects in composed]  # as CocoImages has them

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, object]:
        image, objects = map(torch.from_numpy, self.items[index])
        return coco.item(image, objects)  # whose boxes have an area, and lie inside
