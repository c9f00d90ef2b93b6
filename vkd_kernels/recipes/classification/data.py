"""What the classification task needs of a data set, and which one `data.name` is: digits.py or images.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F


@dataclass
class Samples:
    """One rank's share of one step."""

    images: torch.Tensor  # (N, channels, size, size), normalised
    targets: torch.Tensor  # (N, classes), sums to 1; all 0 where the student may not see the label
    rows: torch.Tensor | None = None  # (N,) which of `every_view()` each image is; None where views are fresh


class Data(Protocol):
    """A data set, split into training and held-out images. Batches depend on (seed, step, rank, ranks) alone."""

    size: int
    channels: int
    views: int  # fixed augmented views of every training image; 0: a fresh one at every step
    fresh: str  # which options make students see other images than `every_view()`; "": they don't
    labelled_share: float  # of a batch

    @property
    def classes(self) -> int: ...

    @property
    def images(self) -> int:
        """Training images of one epoch."""

    def batches(self, learner: str, start: int, batch_size: int, rank: int, ranks: int) -> Iterator[Samples]:
        """This rank's share of the batches start, start + 1, ...

        `learner`: "distilled" (from labels where there are any, and from a teacher), "alone" (from the labelled images
        of the same batches), or "teacher" (the teacher itself, with the labels of all images).
        """

    def every_view(self) -> Iterator[torch.Tensor]:
        """All fixed views in the order of their rows, in batches: what a teacher's outputs are stored for."""

    def held_out(self, rank: int, ranks: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images, labels) of this rank's share of the held-out images; label -1: an image that could not be read."""

    def fingerprint(self) -> str:
        """Changes with anything that changes `every_view()`."""


def open_data(config: Any, seed: int) -> Data:
    if config.data.name == "digits":
        from .digits import Digits

        return Digits(config, seed)
    from .images import ImageData

    return ImageData(config, seed)


def smoothed(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:  # (N,) -> (N, classes)
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
