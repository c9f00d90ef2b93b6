"""scikit-learn's handwritten digits: 1797 real 8x8 images that ship with the package, split anew for every seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from .loading import Key
from .task import generator

POOL = 1000  # to train on; the others are the test set
ROTATION, SCALING, SHIFT, SHEAR = 15.0, 0.15, 0.2, 0.15  # of a view, at most: degrees, share, half widths, share
MEAN, STD = 0.3, 0.38  # of the pixels
SPLIT, VIEWS = range(2)  # what a draw is for, beside the seed


def read_digits() -> tuple[Tensor, Tensor]:  # (1797, 1, 8, 8) from 0 to 1; (1797,)
    from sklearn.datasets import load_digits  # here: only this function needs scikit-learn

    raw = load_digits()
    return torch.from_numpy(raw.images).float().unsqueeze(1) / 16, torch.from_numpy(raw.target).long()


class Digits:
    """A seed's training or held-out images, as a data set of torchvision has them."""

    classes = tuple("0123456789")

    def __init__(self, seed: int, *, training: bool) -> None:
        images, labels = read_digits()
        order = torch.randperm(len(labels), generator=generator(seed, SPLIT))
        rows = order[:POOL] if training else order[POOL:]
        self.seed, self.pixels, self.targets = seed, images[rows], labels[rows].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return to_pil_image(self.pixels[index]), self.targets[index]


class DigitViews:
    """`loading.Views` of digits: their fixed views, or without `views` the images themselves. All are made at
    once, because one by one they would take longer than the steps that learn from them."""

    def __init__(self, digits: Digits, views: int) -> None:
        draw, pixels = generator(digits.seed, VIEWS), digits.pixels
        if views:
            pixels = torch.cat([random_affine(pixels, draw) for _ in range(views)])
        self.pixels = (pixels - MEAN) / STD
        self.views, self.targets = views, digits.targets

    def __getitem__(self, key: Key) -> tuple[tuple[Tensor, int], Key]:
        return (self.pixels[key.row if self.views else key.image], self.targets[key.image]), key


def random_affine(images: Tensor, draw: torch.Generator) -> Tensor:  # (N, 1, H, W)
    """Rotate, scale, shear and shift every image by its own random amount; what enters at the border is 0."""

    def drawn(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=draw) * 2 - 1) * limit

    angle, size = torch.deg2rad(drawn(ROTATION)), 1 + drawn(SCALING)
    cos, sin, slant = angle.cos() * size, angle.sin() * size, drawn(SHEAR)
    first_row = torch.stack([cos, slant * cos - sin, drawn(SHIFT)], dim=1)
    second_row = torch.stack([sin, slant * sin + cos, drawn(SHIFT)], dim=1)
    grid = F.affine_grid(torch.stack([first_row, second_row], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
