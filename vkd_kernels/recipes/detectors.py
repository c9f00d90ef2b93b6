"""What a detector is here, and the bundled one; deformable.py has the other (transformers' Deformable DETR)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList

STRIDE = 4
KEPT = 100  # detections of an image


class Prediction(NamedTuple):
    """Of a batch. Losses are means over `objects`: the objects, or the locations that answer for them."""

    outputs: Any  # what `detections` takes
    features: dict[str, Tensor]  # maps (N, H, W, C), queries (N, ..., C)
    losses: dict[str, Tensor] = {}
    objects: Any = None  # () number


class Detector(nn.Module):
    """A student or a teacher. `predict` gives the losses too, where targets are given: of every image, {"boxes": (M, 4)
    x0, y0, x1, y1 in pixels, "labels": (M,)}.

    `dims` are the channels of its features: those called map* are maps. Features of the same name are compared.
    """

    def __init__(self, classes: int, dims: dict[str, int]) -> None:
        super().__init__()
        self.classes, self.dims = classes, dims

    def predict(self, images: Tensor, inside: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Prediction:
        raise NotImplementedError

    def detections(self, prediction: Prediction, inside: Tensor) -> list[dict[str, Tensor]]:
        """Of every image: boxes (K, 4) x0, y0, x1, y1 in its pixels, scores (K,), labels (K,)."""
        raise NotImplementedError


def image_sizes(inside: Tensor) -> Tensor:
    """(height, width) of every image of a padded batch: (N, 2)."""
    return torch.stack([inside.any(2).sum(1), inside.any(1).sum(1)], dim=1)


class FCOS(Detector):
    """torchvision's FCOS, small enough to train on a CPU in half a minute: one level, at stride 4, and one convolution
    before the outputs. Its parts are called one by one, because its own call resizes images and hides the features.

    Args:
        body: images to maps of so many channels at stride 4.
    """

    def __init__(self, body: Any, channels: int, classes: int) -> None:
        super().__init__(classes, {"map": channels})
        body.out_channels = channels
        head: Any = Head(channels, num_anchors=1, num_classes=classes, num_convs=1)
        nn.init.constant_(head.regression_head.bbox_reg.bias, 2.0)  # strides: nothing is learned of boxes of no area
        anchors = AnchorGenerator(sizes=((STRIDE,),), aspect_ratios=((1.0,),))
        self.net: Any = detection.FCOS(
            body, classes, anchor_generator=anchors, head=head, score_thresh=0.05, detections_per_img=KEPT
        )

    def predict(self, images: Tensor, inside: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Prediction:
        maps = self.net.backbone(images)
        outputs = self.net.head([maps])
        # The generator divides an image's sides by the map's, rounding down: 65 pixels in 17 would give a stride of 3.
        height, width = (STRIDE * side for side in maps.shape[-2:])
        canvas = images.new_empty(len(images), 0, height, width)
        anchors = self.net.anchor_generator(ImageList(canvas, [(height, width)] * len(images)), [maps])
        features = {"map": maps.permute(0, 2, 3, 1)}
        if targets is None:
            return Prediction((outputs, anchors), features)
        losses = self.net.compute_loss(targets, outputs, anchors, [len(anchors[0])])
        return Prediction((outputs, anchors), features, losses, self.net.head.objects)

    def detections(self, prediction: Prediction, inside: Tensor) -> list[dict[str, Tensor]]:
        outputs, anchors = prediction.outputs
        levels = {name: [output.float()] for name, output in outputs.items()}
        return self.net.postprocess_detections(levels, [[a] for a in anchors], image_sizes(inside).tolist())


def convolutions(image_channels: int, widths: tuple[int, ...]) -> nn.Sequential:
    """The bundled body: the first two halve their maps."""
    sides = zip((image_channels, *widths[:-1]), widths, strict=True)
    return nn.Sequential(*(block(a, b, 2 if index < 2 else 1) for index, (a, b) in enumerate(sides)))


class Head(FCOSHead):
    """torchvision's, which keeps the number of locations that its losses are means over."""

    def compute_loss(self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: list[Tensor]) -> Any:
        self.objects = (torch.stack(matched_idxs) >= 0).sum()
        return super().compute_loss(targets, head_outputs, anchors, matched_idxs)


def block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
