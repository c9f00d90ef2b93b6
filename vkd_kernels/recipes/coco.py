"""Images with boxes in COCO's format: read, checked, augmented, put into batches with padding masks, and scored.

An annotation file that contradicts itself or its images is an error that names the first offender and counts all.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .config import OptionError
from .loading import Key
from .runs import RunError

SLACK = 1.0  # pixels by which a box may exceed its image before it counts as outside; what exceeds is cut off
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


class CocoImages:
    """The images of one annotation file: item i is {"image", "boxes", "labels"} for torchvision's transforms.

    Args:
        content: of the file.
        where: how errors call it.
        open_image: of a file name.
        bad_boxes: "error", or "drop": leave degenerate boxes and those outside their image out, with a warning.
        keep: decoded images in memory.
    """

    def __init__(
        self,
        content: Any,
        where: str,
        open_image: Callable[[str], Image.Image],
        *,
        channels: int = 3,
        bad_boxes: str = "error",
        keep: bool = False,
    ) -> None:
        self.where, self.open_image, self.mode = where, open_image, "L" if channels == 1 else "RGB"
        self.decoded: dict[int, Tensor] | None = {} if keep else None
        for name in ("images", "annotations", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(name), list):
                raise RunError(f"{where}: has no list {name!r}, which COCO's instances_*.json have")
        images, categories = content["images"], content["categories"]
        try:
            self.names = {int(c["id"]): str(c.get("name") or c["id"]) for c in categories}
            self.ids = [int(i["id"]) for i in images]
            self.sizes = [(int(i["width"]), int(i["height"])) for i in images]
            self.samples = [(str(i["file_name"] or i["file_name"]["missing"]),) for i in images]
        except MALFORMED as error:
            raise RunError(f"{where}: bad or missing in an image or a category: {error}") from error
        for name, ids, listed in (("images", self.ids, images), ("categories", self.names, categories)):
            if not listed:
                raise RunError(f"{where}: lists no {name}")
            if len({*ids}) < len(listed):
                raise RunError(f"{where}: two of its {name} have the same id")
        self.categories = sorted(self.names)  # the category of a label
        place = {id: n for n, id in enumerate(self.ids)}
        self.annotations = self.checked(content["annotations"], place, bad_boxes)
        objects: list[list[tuple[list[float], int]]] = [[] for _ in self.ids]
        for a in self.annotations:
            if not a["iscrowd"]:
                box = corners(a["bbox"], self.sizes[place[a["image_id"]]])
                objects[place[a["image_id"]]].append((box, self.categories.index(a["category_id"])))
        seen = {label for of_image in objects for _, label in of_image}
        empty = [self.names[id] for label, id in enumerate(self.categories) if label not in seen]
        if not seen:
            raise RunError(f"{where}: has no box")
        if empty:
            names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            print(f"warning: {where}: no box of {names}; {len(empty)} of {len(self.names)} categories", file=sys.stderr)
        # NumPy's, because loader processes may get a copy of each: a tensor would be a file handle.
        self.boxes = [numpy.array([b for b, _ in o], numpy.float32).reshape(-1, 4) for o in objects]
        self.labels = [numpy.array([label for _, label in o], numpy.int64) for o in objects]

    def checked(self, annotations: list[Any], place: dict[int, int], bad_boxes: str) -> list[dict[str, Any]]:
        """What is needed of the annotations with good boxes; an error, or a warning, about the others."""
        good: list[dict[str, Any]] = []
        kinds, first = Counter[str](), ""
        for number, a in enumerate(annotations, start=1):
            try:
                image, category, box = int(a["image_id"]), int(a["category_id"]), [float(v) for v in a["bbox"]]
                crowd, area = int(a.get("iscrowd") or 0), a.get("area")
                area = float(box[2] * box[3] if area is None else area)
            except (*MALFORMED, IndexError) as error:
                raise RunError(f"{self.where}: bad or missing ({error!r}) in annotation {a!r:.200}") from error
            if image not in place:
                raise RunError(f"{self.where}: annotation {a.get('id')} is of image {image}, which is not listed")
            if category not in self.names:
                raise RunError(f"{self.where}: annotation {a.get('id')} has the unknown category {category}")
            size = self.sizes[place[image]]
            if kind := bad_box(box, size):
                kinds[kind] += 1
                what = f"of image {self.samples[place[image]][0]} ({size[0]} x {size[1]}): {a['bbox']} is {kind}"
                first = first or f"annotation {a.get('id')} {what}"
                continue
            good.append(
                {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            )
        if kinds:
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            text = f"{self.where}: bad boxes [x, y, width, height]: {first}; in all {counts}"
            if bad_boxes == "error":
                raise RunError(f"{text}. data.bad_boxes=drop leaves them out")
            print(f"warning: {text}; left out", file=sys.stderr)
        return good

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = (self.decoded or {}).get(index)
        if image is None:
            with self.open_image(self.samples[index][0]) as file:
                if file.size != self.sizes[index]:
                    raise ValueError(f"it is {file.size}, but {self.where} says {self.sizes[index]}")
                image = v2.functional.pil_to_tensor(file.convert(self.mode))
            if self.decoded is not None:
                self.decoded[index] = image
        boxes: Any = torch.from_numpy(self.boxes[index])
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])  # type: ignore[call-arg]
        return {"image": tv_tensors.Image(image), "boxes": boxes, "labels": torch.from_numpy(self.labels[index])}


def corners(box: list[float], size: tuple[int, int]) -> list[float]:
    """x0, y0, x1, y1 of a box x, y, width, height, cut off at the image's border."""
    x, y, w, h = box
    return [max(x, 0.0), max(y, 0.0), min(x + w, float(size[0])), min(y + h, float(size[1]))]


def bad_box(box: list[float], size: tuple[int, int]) -> str:
    """What is wrong with a box x, y, width, height; "" if nothing is."""
    if len(box) != 4 or not all(map(math.isfinite, box)):
        return "not four numbers"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return "degenerate"
    x0, y0, x1, y1 = corners(box, size)
    over = max(-x, -y, x + w - size[0], y + h - size[1])
    return "outside its image" if over > SLACK or x1 <= x0 or y1 <= y0 else ""


def open_coco(folder: str, annotations: str, key: str, data: Any) -> CocoImages:
    """The images of a folder; `key` is data.train or data.val, for errors."""
    root, path = Path(folder), Path(annotations)
    if not root.is_dir():
        raise OptionError(f"{key}: there is no folder {root}")
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise OptionError(f"{key}_annotations: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON: {error}") from error
    images = CocoImages(
        content,
        str(path),
        lambda name: Image.open(root / name),
        channels=data.channels,
        bad_boxes=data.bad_boxes,
        keep=data.in_memory,
    )
    if missing := [name for (name,) in images.samples if not (root / name).is_file()]:
        raise RunError(
            f"{path}: {len(missing)} of its {len(images)} images are missing in {root}; the first is {missing[0]}"
        )
    return images


# ---- what training and evaluation see --------------------------------------------------------------------------------


def training_transform(a: Any) -> Any:
    """Flipped, cropped and resized at random, as Deformable DETR is trained."""
    steps: list[Any] = [v2.RandomHorizontalFlip(a.flip)]
    if a.crop:
        crop = [v2.RandomShortestSize([*a.crop_short_sides], a.longest), RandomCrop(a.crop_sizes)]
        steps += [v2.RandomApply(crop, a.crop), v2.SanitizeBoundingBoxes()]  # without what was cut off
    if a.short_sides:
        steps.append(v2.RandomShortestSize([*a.short_sides], a.longest))
    return v2.Compose(steps)


class RandomCrop(v2.Transform):
    """A part whose sides are drawn between the two sizes, as far as the image reaches."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image = next(x for x in flat_inputs if isinstance(x, tv_tensors.Image))
        sides = [min(side, int(torch.randint(self.sizes[0], self.sizes[1] + 1, ()))) for side in image.shape[-2:]]
        corner = [int(torch.randint(whole - side + 1, ())) for whole, side in zip(image.shape[-2:], sides, strict=True)]
        return {"top": corner[0], "left": corner[1], "height": sides[0], "width": sides[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


def evaluation_transform(a: Any) -> Any:
    return v2.RandomShortestSize([a.val_short_side], a.longest) if a.val_short_side else v2.Identity()


def collate(samples: list[tuple[dict[str, Any], Key]], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """images (N, C, H, W), padded with 0 at the right and at the bottom; inside (N, H, W): not padding; boxes (N, M, 4)
    x0, y0, x1, y1 in pixels and labels (N, M), padded with -1; index (N,) of the image in its data set."""
    n, most = len(samples), max(1, *(len(s["labels"]) for s, _ in samples))
    height, width = (max(s["image"].shape[side] for s, _ in samples) for side in (-2, -1))
    images, inside = torch.zeros(n, len(mean), height, width), torch.zeros(n, height, width, dtype=torch.bool)
    boxes, labels = torch.zeros(n, most, 4), torch.full((n, most), -1)
    for i, (s, _) in enumerate(samples):
        h, w = s["image"].shape[-2:]
        images[i, :, :h, :w] = (torch.as_tensor(s["image"]) / 255 - mean) / std
        inside[i, :h, :w] = True
        boxes[i, : len(s["boxes"])], labels[i, : len(s["labels"])] = torch.as_tensor(s["boxes"]), s["labels"]
    index = torch.tensor([key.image for _, key in samples])
    return {"images": images, "inside": inside, "boxes": boxes, "labels": labels, "index": index}


def at_map(inside: Tensor, height: int, width: int) -> Tensor:
    """A padding mask (N, H, W) at a map's resolution, as Deformable DETR looks it up."""
    return F.interpolate(inside[:, None].float(), (height, width))[:, 0] > 0.5


# ---- average precision -----------------------------------------------------------------------------------------------


def average_precision(data: CocoImages, indices: list[int], rows: list[list[float]]) -> dict[str, float]:
    """AP, AP50 and AP75 in percent, by pycocotools, over those images of a data set; NaN where they hold no object.

    Args:
        rows: image id, x, y, width, height, score, category id.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = ("AP", "AP50", "AP75")
    if not any(len(data.labels[index]) for index in indices):
        return dict.fromkeys(names, math.nan)
    if not rows:  # which loadRes refuses
        return dict.fromkeys(names, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every step
        truth = COCO()
        truth.dataset = {
            "images": [{"id": id, "width": w, "height": h} for id, (w, h) in zip(data.ids, data.sizes, strict=True)],
            "annotations": [dict(a) for a in data.annotations],  # which it writes into
            "categories": [{"id": id, "name": name} for id, name in data.names.items()],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(numpy.array(rows)), "bbox")
        evaluation.params.imgIds = sorted(data.ids[index] for index in indices)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100 * float(value) for name, value in zip(names, evaluation.stats, strict=False)}
