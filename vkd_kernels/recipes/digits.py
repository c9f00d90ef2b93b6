"""scikit-learn's handwritten digits: 1797 real 8x8 images that ship with the package, split anew for every seed.

Only a few images per class have labels a student may use; the others of the pool reach it through the teacher. Every
image of the pool has a fixed number of augmented views, so that what the teacher says of each is computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import OptionError
from .task import generator

CLASSES, IMAGES, POOL = 10, 1797, 1000  # POOL: to train on; the others are the test set
ROTATION, SCALING, SHIFT, SHEAR = 15.0, 0.15, 0.2, 0.15  # of a view, at most: degrees, share, half widths, share
PIXEL_MEAN, PIXEL_STD = 0.3, 0.38
VIEWS, TEACHER, STUDENT = range(3)  # what a draw is for, beside the seed and the step


def read_digits() -> tuple[Tensor, Tensor]:  # (1797, 1, 8, 8) from 0 to 1; (1797,)
    from sklearn.datasets import load_digits  # here: only this function needs scikit-learn

    raw = load_digits()
    return torch.from_numpy(raw.images).float().unsqueeze(1) / 16, torch.from_numpy(raw.target).long()


class Digits:
    """One seed's split. The first `labeled` images of the pool are those whose labels a student may see."""

    classes, size, channels, images = CLASSES, 8, 1, POOL

    def __init__(self, config: Any, seed: int) -> None:
        self.seed, self.smoothing, self.labeled_share = seed, config.distill.label_smoothing, config.labeled_share
        self.views = config.digits.views
        images, labels = read_digits()
        images = (images - PIXEL_MEAN) / PIXEL_STD
        order = torch.randperm(IMAGES, generator=generator(seed))
        inside, outside = order[:POOL], order[POOL:]
        chosen = torch.zeros(POOL, dtype=torch.bool)
        for digit in range(CLASSES):
            chosen[(labels[inside] == digit).nonzero().flatten()[: config.digits.labels_per_class]] = True
        inside, self.labeled = torch.cat([inside[chosen], inside[~chosen]]), int(chosen.sum())
        self.pool, self.pool_labels = images[inside], labels[inside]
        self.test, self.test_labels = images[outside], labels[outside]
        draw = generator(seed, VIEWS)
        self.pool_views = torch.cat([random_affine(self.pool, draw) for _ in range(self.views)])

    def batches(
        self, learner: str, start: int, batch_size: int, rank: int, ranks: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(images, targets, rows among all fixed views): this rank's share of the batches start, start + 1, ...

        `learner`: "distilled" (from labels where there are any, and from a teacher), "alone" (from the labeled images
        of the same batches), or "teacher" (the teacher itself, with the labels of all images).
        """
        size = round(batch_size * self.labeled_share) if learner == "alone" else batch_size
        if size % ranks:
            raise OptionError(f"data.labeled_share: {size} labeled images are not equal parts for {ranks} ranks")
        mine = slice(rank, size, ranks)
        for step in itertools.count(start):
            if learner == "teacher":  # images of the whole pool, each in a new view
                draw = generator(self.seed, step, TEACHER)
                chosen = torch.randint(self.images, (batch_size,), generator=draw)
                images = random_affine(self.pool[chosen], draw)
                yield images[mine], self.targets(chosen)[mine], None
                continue
            draw, labeled = generator(self.seed, step, STUDENT), round(batch_size * self.labeled_share)
            seen = torch.randint(self.labeled, (labeled,), generator=draw)
            unseen = torch.randint(self.labeled, self.images, (batch_size - labeled,), generator=draw)
            chosen = torch.cat([seen, unseen])
            rows = torch.randint(self.views, (batch_size,), generator=draw) * self.images + chosen
            targets = self.targets(chosen)
            targets[labeled:] = 0
            yield self.pool_views[rows[mine]], targets[mine], rows[mine]

    def targets(self, rows: Tensor) -> Tensor:  # (N,) -> (N, classes)
        return F.one_hot(self.pool_labels[rows], CLASSES) * (1 - self.smoothing) + self.smoothing / CLASSES

    def every_view(self) -> Tensor:
        return self.pool_views

    def held_out(self, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.test[rank::ranks], self.test_labels[rank::ranks]


def random_affine(images: Tensor, draw: torch.Generator) -> Tensor:  # (N, 1, H, W)
    """Rotate, scale, shear and shift every image by its own random amount; what enters at the border is background."""

    def drawn(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=draw) * 2 - 1) * limit

    angle, size = torch.deg2rad(drawn(ROTATION)), 1 + drawn(SCALING)
    cos, sin, slant = angle.cos() * size, angle.sin() * size, drawn(SHEAR)
    first_row = torch.stack([cos, slant * cos - sin, drawn(SHIFT)], dim=1)
    second_row = torch.stack([sin, slant * sin + cos, drawn(SHIFT)], dim=1)
    grid = F.affine_grid(torch.stack([first_row, second_row], dim=1), list(images.shape), align_corners=False)
    background = -PIXEL_MEAN / PIXEL_STD  # grid_sample pads with zeros: make zero mean background
    return F.grid_sample(images - background, grid, align_corners=False) + background
