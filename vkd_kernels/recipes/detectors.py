"""What a detector is here, and the bundled one; deformable.py has the other (transformers' Deformable DETR).

The bundled detector is an FCOS with a single level at stride 4, small enough to train on a CPU in half a minute. From
torchvision come the focal loss, the GIoU loss and the suppression of duplicates; its own FCOS resizes every image, has
a center-ness branch and towers of four convolutions, with which the bundled scenes train several times longer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, generalized_box_iou_loss, sigmoid_focal_loss

from .coco import at_map

LOGIT = math.log(0.01 / 0.99)  # of any class at the start: nearly everything is background
STRIDE = 4
CENTER_RADIUS = 1.5  # strides around an object's center within which a location answers for it
CANDIDATES, SCORE, OVERLAP, KEPT = 200, 0.03, 0.6, 100  # of an image: before, and what survives suppression


class Prediction(NamedTuple):
    """Of a batch. Losses are sums over the batch, weighted; `objects` is what they are to be divided by."""

    logits: Tensor  # (N, locations or queries, classes)
    boxes: Tensor  # (N, locations or queries, 4) x0, y0, x1, y1 in pixels
    features: dict[str, Tensor]  # maps (N, H, W, C), queries (N, ..., C)
    losses: dict[str, Tensor] = {}
    objects: Any = None  # () number


class Detector(nn.Module):
    """A student or a teacher. `predict` gives the losses too, where boxes and labels (coco.collate) are given.

    `dims` are the channels of its features: those called map* are maps. Features of the same name are compared.
    """

    def __init__(self, classes: int, dims: dict[str, int]) -> None:
        super().__init__()
        self.classes, self.dims = classes, dims

    def predict(
        self, images: Tensor, inside: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None
    ) -> Prediction:
        raise NotImplementedError

    def detections(self, prediction: Prediction, inside: Tensor) -> list[dict[str, Tensor]]:
        """Of every image: boxes (K, 4) x0, y0, x1, y1 in its pixels, scores (K,), labels (K,)."""
        raise NotImplementedError


def image_sizes(inside: Tensor) -> Tensor:
    """(width, height) of every image of a padded batch: (N, 2)."""
    return torch.stack([inside.any(1).sum(1), inside.any(2).sum(1)], dim=1)


class FCOS(Detector):
    """Convolutions to a map at stride 4, then a tower each for classes and for the distances to a box's four sides.

    Distances are predicted in strides and made positive by softplus. The class scores stand alone: no center-ness.
    """

    def __init__(self, widths: tuple[int, ...], channels: int, classes: int, image_channels: int) -> None:
        super().__init__(classes, {"map": channels})
        sides = zip((image_channels, *widths), (*widths, channels), strict=True)
        layers = [block(before, after, 2 if index < 2 else 1) for index, (before, after) in enumerate(sides)]
        self.body: nn.Module = nn.Sequential(*layers)
        self.class_tower, self.box_tower = block(channels, channels), block(channels, channels)
        self.class_head, self.box_head = head(channels, classes, LOGIT), head(channels, 4, 2.0)

    def predict(
        self, images: Tensor, inside: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None
    ) -> Prediction:
        maps = self.body(images)
        logits = self.class_head(self.class_tower(maps)).flatten(2).mT  # (N, locations, classes)
        distances = STRIDE * F.softplus(self.box_head(self.box_tower(maps)).flatten(2).mT)
        points = locations(maps)
        predicted = torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)
        features = {"map": maps.permute(0, 2, 3, 1)}
        if boxes is None or labels is None:
            return Prediction(logits, predicted, features)
        valid = at_map(inside, *maps.shape[-2:]).flatten(1)
        index = assigned(points, boxes, labels)
        image, location = ((index >= 0) & valid).nonzero(as_tuple=True)
        chosen = index[image, location]
        targets = torch.zeros_like(logits)
        targets[image, location, labels[image, chosen]] = 1
        losses = {
            "classes": (sigmoid_focal_loss(logits, targets) * valid[..., None]).sum(),
            "boxes": generalized_box_iou_loss(predicted[image, location], boxes[image, chosen], reduction="sum"),
        }
        return Prediction(logits, predicted, features, losses, torch.tensor(len(chosen), device=images.device))

    def detections(self, prediction: Prediction, inside: Tensor) -> list[dict[str, Tensor]]:
        detections = []
        valid = at_map(inside, *prediction.features["map"].shape[1:3]).flatten(1)
        sizes = image_sizes(inside)
        for logits, boxes, real, size in zip(prediction.logits, prediction.boxes, valid, sizes, strict=True):
            scores = (logits.float().sigmoid() * real[:, None]).flatten()
            scores, order = scores.topk(min(CANDIDATES, len(scores)))
            order = order[scores > SCORE]
            scores, labels = scores[: len(order)], order % self.classes
            boxes = boxes[order // self.classes].float().clamp(min=0).minimum(size.repeat(2))
            kept = batched_nms(boxes, scores, labels, OVERLAP)[:KEPT]
            detections.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
        return detections


def block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def head(before: int, after: int, bias: float) -> nn.Conv2d:
    layer = nn.Conv2d(before, after, 1)
    nn.init.constant_(cast(Tensor, layer.bias), bias)
    return layer


def locations(maps: Tensor) -> Tensor:
    """Centers (x, y) of a map's cells, in pixels of the image: (H * W, 2)."""
    y, x = (STRIDE * (torch.arange(side, device=maps.device) + 0.5) for side in maps.shape[-2:])
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def assigned(points: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:  # (L, 2), (N, M, 4), (N, M) -> (N, L)
    """Which box (index, or -1) every location answers for: the smallest that it is in, near whose center it is."""
    corners, middle = boxes[:, None], (boxes[:, None, :, :2] + boxes[:, None, :, 2:]) / 2
    at = points[None, :, None]
    near = ((at > corners[..., :2]) & (at < corners[..., 2:]) & ((at - middle).abs() <= CENTER_RADIUS * STRIDE)).all(-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[:, None]
    areas, index = torch.where(near & (labels[:, None] >= 0), areas, torch.inf).min(dim=-1)
    return torch.where(areas.isfinite(), index, -1)
