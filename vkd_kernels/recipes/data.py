"""scikit-learn's handwritten digits: 1797 real 8x8 images that ship with the package, split anew for every seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .options import OptionError

CLASSES = 10
PIXEL_MEAN, PIXEL_STD = 0.3, 0.38


@dataclass
class Digits:
    """One seed's split. The first `labelled` images of the pool are those whose labels a student may see."""

    pool: torch.Tensor  # (N, 1, 8, 8)
    pool_labels: torch.Tensor  # (N,)
    test: torch.Tensor  # (M, 1, 8, 8)
    test_labels: torch.Tensor  # (M,)
    labelled: int


@dataclass
class Views:
    """Augmented views of the pool and what the teacher says about each: features belong to a view, not to an image."""

    images: torch.Tensor  # (V, N, 1, 8, 8)
    teacher_features: torch.Tensor  # (V, N, T)
    teacher_logits: torch.Tensor  # (V, N, 10)

    def sample(self, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One random view of each of the given images: images, teacher features, teacher logits."""
        view = torch.randint(len(self.images), rows.shape, generator=generator)
        return self.images[view, rows], self.teacher_features[view, rows], self.teacher_logits[view, rows]


def load_digits(seed: int, *, pool: int, labels_per_class: int) -> Digits:
    """Shuffle the 1797 digits by `seed`: `pool` of them to train on, the rest to test on."""
    from sklearn.datasets import load_digits as load  # here: only this function needs scikit-learn

    raw = load()
    images = ((torch.from_numpy(raw.images).float() / 16 - PIXEL_MEAN) / PIXEL_STD).unsqueeze(1)  # (1797, 1, 8, 8)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    inside, outside = order[:pool], order[pool:]

    chosen = torch.zeros(pool, dtype=torch.bool)
    for digit in range(CLASSES):
        found = (labels[inside] == digit).nonzero().flatten()
        if len(found) < labels_per_class:
            raise OptionError(
                f"--labels-per-class: {labels_per_class}, but of digit {digit} there are only {len(found)} "
                f"in a pool of {pool} images (seed {seed})"
            )
        chosen[found[:labels_per_class]] = True
    inside = torch.cat([inside[chosen], inside[~chosen]])
    return Digits(images[inside], labels[inside], images[outside], labels[outside], int(chosen.sum()))


def random_affine(
    images: torch.Tensor,  # (N, 1, H, W)
    generator: torch.Generator,
    *,
    rotation: float,  # degrees; every value is drawn uniformly from [-limit, limit]
    scale: float,
    shift: float,  # of half the width
    shear: float,
) -> torch.Tensor:
    """Rotate, scale, shear and shift every image by its own random amount; what enters at the border is background."""

    def draw(limit: float) -> torch.Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, size = torch.deg2rad(draw(rotation)), 1 + draw(scale)
    cos, sin, slant = angle.cos() * size, angle.sin() * size, draw(shear)
    first_row = torch.stack([cos, slant * cos - sin, draw(shift)], dim=1)
    second_row = torch.stack([sin, slant * sin + cos, draw(shift)], dim=1)
    grid = F.affine_grid(torch.stack([first_row, second_row], dim=1), list(images.shape), align_corners=False)
    background = -PIXEL_MEAN / PIXEL_STD  # grid_sample pads with zeros: make zero mean background
    return F.grid_sample(images - background, grid, align_corners=False) + background
