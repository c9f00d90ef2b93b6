"""COCO's average precision, by pycocotools; and pictures of detections beside the ground truth."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import draw_bounding_boxes, make_grid

from ..runs import write_atomically
from .coco import CocoImages
from .models import Detections

Row = list[float]  # image id, x, y, width, height, score, category id
GREEN, RED = "#30c030", "#f04040"
SHOWN_SCORE, SHOWN_SIDE, LETTERS = 0.5, 320, 15


def coco_rows(data: CocoImages, index: int, found: Detections, size: tuple[int, int]) -> list[Row]:
    """Detections of one image whose resized size is (height, width), as COCO wants them: in the original's pixels."""
    width, height = data.sizes[index]
    scale = torch.tensor([width / size[1], height / size[0]] * 2)
    boxes = found.boxes.cpu() * scale
    boxes[:, 2:] -= boxes[:, :2]
    return [
        [float(data.ids[index]), *box, score, float(data.categories[label])]
        for box, score, label in zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ]


def average_precision(data: CocoImages, indices: list[int], found: list[Row]) -> dict[str, float]:
    """AP, AP50 and AP75 in per cent over those images of a data set."""
    import numpy
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints every step
        truth = COCO()
        truth.dataset = {
            "images": [{"id": id, "width": w, "height": h} for id, (w, h) in zip(data.ids, data.sizes, strict=True)],
            "annotations": [dict(a) for a in data.annotations],  # which it writes into
            "categories": [{"id": id, "name": name} for id, name in data.names.items()],
        }
        truth.createIndex()
        if not found:
            return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}  # which loadRes refuses
        evaluation = COCOeval(truth, truth.loadRes(numpy.array(found)), "bbox")
        evaluation.params.imgIds = sorted(data.ids[index] for index in indices)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100 * float(value) for name, value in zip(("AP", "AP50", "AP75"), evaluation.stats, strict=False)}


# ---- pictures --------------------------------------------------------------------------------------------------------


def save_pictures(path: Path, pairs: list[tuple[Tensor, Detections, Detections]], names: list[str]) -> None:
    """For every image (uint8) its ground truth and, to the right of it, what was detected: one PNG."""
    panels: list[Tensor] = []
    for image, truth, found in pairs:
        kept = found.scores > SHOWN_SCORE
        found = Detections(found.boxes[kept], found.scores[kept], found.labels[kept])
        panels += [drawn(image, truth, names, GREEN), drawn(image, found, names, RED)]
    side = max(max(panel.shape[-2:]) for panel in panels)
    panels = [transforms.pad(p, [0, 0, side - p.shape[-1], side - p.shape[-2]]) for p in panels]
    grid = transforms.to_pil_image(make_grid(panels, nrow=4, padding=6, pad_value=255))
    file = io.BytesIO()
    grid.save(file, format="PNG")
    write_atomically(path, lambda out: out.write(file.getvalue()))


def drawn(image: Tensor, objects: Detections, names: list[str], colour: str) -> Tensor:
    """An image (C, H, W) enlarged or reduced to be looked at, with boxes, classes and scores."""
    import matplotlib

    scale = SHOWN_SIDE / max(image.shape[-2:])
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    nearest: Any = transforms.InterpolationMode.NEAREST
    image = transforms.resize(image.expand(3, -1, -1), size, interpolation=nearest)
    scores = objects.scores.tolist() if colour == RED else []
    texts = [names[label] for label in objects.labels.tolist()]
    texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores, strict=True)] if scores else texts
    if not texts:
        return image
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    return draw_bounding_boxes(image, objects.boxes * scale, texts, colour, width=2, font=font, font_size=LETTERS)
