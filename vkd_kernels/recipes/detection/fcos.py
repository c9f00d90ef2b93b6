"""The bundled detector: FCOS with a single level at stride 4, small enough to train on a CPU in half a minute.

From torchvision come the focal loss, the GIoU loss and the suppression of duplicates. Its own FCOS is made for pyramids
of five levels and resizes every image to 800 pixels: at 64 pixels it would spend its time elsewhere.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, generalized_box_iou_loss, sigmoid_focal_loss

from .coco import at_map
from .models import LOGIT, Detections, Detector, Prediction, image_sizes

STRIDE = 4
CENTRE_RADIUS = 1.5  # strides around an object's centre within which a location answers for it
CANDIDATES, SCORE, OVERLAP, KEPT = 200, 0.03, 0.6, 100  # of an image: before, and what survives suppression


class FCOS(Detector):
    """Convolutions to a map at stride 4, then a tower each for classes and for the distances to a box's four sides.

    Distances are predicted in strides and made positive by softplus. The class scores stand alone: no centre-ness.
    """

    def __init__(self, widths: tuple[int, ...], channels: int, classes: int, image_channels: int) -> None:
        super().__init__(classes, {"map": channels})
        sides = zip((image_channels, *widths), (*widths, channels), strict=True)
        layers = [block(before, after, 2 if index < 2 else 1) for index, (before, after) in enumerate(sides)]
        self.body = nn.Sequential(*layers)
        self.class_tower, self.box_tower = block(channels, channels), block(channels, channels)
        self.class_head, self.box_head = head(channels, classes, LOGIT), head(channels, 4, 2.0)

    def predict(
        self, images: Tensor, inside: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None
    ) -> Prediction:
        found = self.body(images)
        logits = self.class_head(self.class_tower(found)).flatten(2).mT  # (N, locations, classes)
        distances = STRIDE * F.softplus(self.box_head(self.box_tower(found)).flatten(2).mT)
        points = locations(found)
        predicted = torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)
        features = {"map": found.permute(0, 2, 3, 1)}
        if boxes is None or labels is None:
            return Prediction(logits, predicted, features)
        valid = at_map(inside, *found.shape[-2:]).flatten(1)
        classes, sides, objects = losses(logits, predicted, points, valid, boxes, labels)
        return Prediction(logits, predicted, features, {"classes": classes, "boxes": sides}, objects)

    def detections(self, prediction: Prediction, inside: Tensor) -> list[Detections]:
        found = []
        valid = at_map(inside, *prediction.features["map"].shape[1:3]).flatten(1)
        for logits, boxes, real, size in zip(
            prediction.logits, prediction.boxes, valid, image_sizes(inside), strict=True
        ):
            scores = (logits.float().sigmoid() * real[:, None]).flatten()
            scores, order = scores.topk(min(CANDIDATES, len(scores)))
            order = order[scores > SCORE]
            scores = scores[: len(order)]
            labels = order % self.classes
            boxes = boxes[order // self.classes].float().clamp(min=0).minimum(size.repeat(2))
            kept = batched_nms(boxes, scores, labels, OVERLAP)[:KEPT]
            found.append(Detections(boxes[kept], scores[kept], labels[kept]))
        return found


def block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def head(before: int, after: int, bias: float) -> nn.Conv2d:
    layer = nn.Conv2d(before, after, 1)
    nn.init.constant_(cast(Tensor, layer.bias), bias)
    return layer


def locations(found: Tensor) -> Tensor:
    """Centres (x, y) of a map's cells, in pixels of the image: (H * W, 2)."""
    y, x = (STRIDE * (torch.arange(side, device=found.device) + 0.5) for side in found.shape[-2:])
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def assigned(points: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Which box (index, or -1) every location answers for: the smallest that it is in, near whose centre it is."""
    corners, middle = boxes[:, None], (boxes[:, None, :, :2] + boxes[:, None, :, 2:]) / 2
    at = points[None, :, None]
    near = ((at > corners[..., :2]) & (at < corners[..., 2:]) & ((at - middle).abs() <= CENTRE_RADIUS * STRIDE)).all(-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[:, None]
    areas, index = torch.where(near & (labels[:, None] >= 0), areas, torch.inf).min(dim=-1)
    return torch.where(areas.isfinite(), index, -1)


def losses(
    logits: Tensor,  # (N, locations, classes)
    predicted: Tensor,  # (N, locations, 4)
    points: Tensor,  # (locations, 2)
    valid: Tensor,  # (N, locations) bool
    boxes: Tensor,  # (N, M, 4)
    labels: Tensor,  # (N, M), -1: none
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the focal loss over all valid locations and of the GIoU loss over those with a box; their number."""
    index = assigned(points, boxes, labels)
    image, location = ((index >= 0) & valid).nonzero(as_tuple=True)
    chosen = index[image, location]
    targets = torch.zeros_like(logits)
    targets[image, location, labels[image, chosen]] = 1
    classes = (sigmoid_focal_loss(logits, targets) * valid[..., None]).sum()
    sides = generalized_box_iou_loss(predicted[image, location], boxes[image, chosen], reduction="sum")
    return classes, sides, (index >= 0).logical_and(valid).sum()
