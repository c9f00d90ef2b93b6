"""What a detector is here, and which there are: fcos.py (bundled), deformable.py (transformers' Deformable DETR)."""

from __future__ import annotations

import contextlib
import importlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import OptionError
from ..runs import RunError, load_safetensors, load_state
from .options import DEFORMABLE, FCOS, DetectorConfig

LOGIT = math.log(0.01 / 0.99)  # of any class at the start: nearly everything is background


class Detections(NamedTuple):
    """Of one image, in its pixels."""

    boxes: Tensor  # (K, 4) x0, y0, x1, y1
    scores: Tensor  # (K,)
    labels: Tensor  # (K,)


class Prediction(NamedTuple):
    """Of a batch. Losses are sums over the batch, weighted; `objects` is what they are to be divided by."""

    logits: Tensor  # (N, locations or queries, classes)
    boxes: Tensor  # (N, locations or queries, 4) x0, y0, x1, y1 in pixels
    features: dict[str, Tensor]  # maps (N, H, W, C), queries (N, ..., C)
    losses: dict[str, Tensor] = {}  # noqa: RUF012  (empty, and nobody writes into it)
    objects: Any = None  # () number


class Detector(nn.Module):
    """A student or a teacher. `predict` gives the losses too, where boxes and labels (coco.Batch) are given.

    `dims` are the channels of its features: those called map* are maps. Features of the same name are compared.
    """

    def __init__(self, classes: int, dims: dict[str, int]) -> None:
        super().__init__()
        self.classes, self.dims = classes, dims

    def predict(
        self, images: Tensor, inside: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None
    ) -> Prediction:
        raise NotImplementedError

    def detections(self, prediction: Prediction, inside: Tensor) -> list[Detections]:
        raise NotImplementedError

    def forward(self, images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:  # what is exported
        """(logits, boxes) of images (N, C, H, W), `inside` (N, H, W) of which they are no padding."""
        prediction = self.predict(images, inside)
        return prediction.logits, prediction.boxes


def image_sizes(inside: Tensor) -> Tensor:
    """(width, height) of every image of a padded batch: (N, 2)."""
    return torch.stack([inside.any(1).sum(1), inside.any(2).sum(1)], dim=1)


def make_detector(config: DetectorConfig, classes: int, image_channels: int, *, empty: bool = False) -> Any:
    """The detector of a configuration; `empty`: without memory for its weights, to describe it."""
    if config.name == FCOS:
        from .fcos import FCOS as Bundled

        with torch.device("meta") if empty else contextlib.nullcontext():
            return Bundled(config.widths, config.channels, classes, image_channels)
    if is_own(config.name):
        with torch.device("meta") if empty else contextlib.nullcontext():
            return own_detector(config, classes, image_channels)
    from .deformable import make_deformable  # needs transformers

    if image_channels != 3:
        raise OptionError(f"data.channels: {config.name} takes colour images, 3; got {image_channels}")
    return make_deformable(config, classes, empty=empty)


def is_own(name: str) -> bool:
    """Is it the name of a user's class or function, package.module:Name?"""
    return ":" in name and not Path(name).exists()


def has_weights(name: str) -> bool:
    """Does a detector of that name come with trained weights, as those of transformers do?"""
    return name not in (FCOS, DEFORMABLE) and not is_own(name)


def own_detector(config: DetectorConfig, classes: int, image_channels: int) -> Detector:
    module, _, name = config.name.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"name: cannot import {config.name}: {error}") from error
    found = make(config, classes, image_channels)
    if not isinstance(found, Detector):
        raise OptionError(f"name: {config.name} must give a detection.models.Detector, got {type(found).__name__}")
    return found


def load_weights(detector: Detector, path: Path, classes: int, what: str) -> None:
    """A detector's own state dict; a clear error about other classes or another architecture."""
    state = read_state(path, what)
    heads = [name for name in state if name.endswith(("class_head.weight", "class_embed.0.weight"))]
    if heads and len(state[heads[0]]) != classes:
        raise RunError(f"{what}: {path} has {len(state[heads[0]])} classes, and {classes} are needed")
    load_state(detector, state, f"{what}: {path}")


def read_state(path: Path, what: str) -> dict[str, Tensor]:
    """A state dict from a .safetensors file or one of torch.save."""
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"{what}: cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises a different type for every kind of damage
        raise RunError(f"{what}: cannot read {path}: {error}") from error
