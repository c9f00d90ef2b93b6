"""Images with boxes in COCO's format: read, checked, augmented, and put into batches with padding masks.

An annotation file that contradicts itself or its images is an error that names the first offender and counts all.
A single image that can't be decoded is a counted warning: another takes its place in training, and evaluation goes
without it.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as transforms

from .. import loading
from ..config import OptionError
from ..runs import RunError
from .options import AugmentConfig, DataConfig

BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what PIL raises for bad files
BROKEN_IN_A_ROW = 20  # so many unreadable images one after the other are no accident
SLACK = 1.0  # pixels by which a box may exceed its image before it counts as outside; what exceeds is cut off
READ_AT_ONCE, SMALL = 50, 256  # images of an evaluation batch, if none has more pixels a side than that; else one

Unreadable = list[tuple[str, str]]  # (file name, error)


@dataclass
class Batch:
    """One rank's share of one step; boxes x0, y0, x1, y1 in pixels, padded with label -1."""

    images: Tensor  # (N, C, H, W), padded with 0 at the right and at the bottom
    inside: Tensor  # (N, H, W) bool: not padding
    boxes: Tensor  # (N, M, 4)
    labels: Tensor  # (N, M)
    index: Tensor  # (N,) of the image in its data set
    unreadable: Unreadable | None  # what others took the place of
    teacher: dict[str, Tensor] | None = None  # its features


# ---- annotations -----------------------------------------------------------------------------------------------------


class CocoImages:
    """The images of one annotation file: ids, files, sizes (width, height), boxes (M, 4), labels (M,), one per image.

    Args:
        content: of the file.
        where: how errors call it.
        read: opens the image of a file name.
        bad_boxes: "error", or "drop": leave degenerate boxes and those outside their image out, with a warning.
    """

    def __init__(self, content: Any, where: str, read: Callable[[str], Image.Image], bad_boxes: str) -> None:
        self.where, self.read = where, read
        for name in ("images", "annotations", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(name), list):
                raise RunError(f"{where}: has no list {name!r}, which COCO's instances_*.json have")
        images, categories = content["images"], content["categories"]
        try:
            self.names = {int(c["id"]): str(c.get("name", c["id"])) for c in categories}
            self.ids, self.files = [int(i["id"]) for i in images], [str(i["file_name"]) for i in images]
            self.sizes = [(int(i["width"]), int(i["height"])) for i in images]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{where}: bad or missing in an image or a category: {error}") from error
        for name, ids, listed in (("images", self.ids, images), ("categories", self.names, categories)):
            if not listed:
                raise RunError(f"{where}: lists no {name}")
            if len({*ids}) < len(listed):
                raise RunError(f"{where}: two of its {name} have the same id")
        self.categories = sorted(self.names)  # the category of a label
        place, label = ({id: n for n, id in enumerate(ids)} for ids in (self.ids, self.categories))
        self.annotations = self._checked(content["annotations"], place, bad_boxes)
        seen = {a["category_id"] for a in self.annotations if not a["iscrowd"]}
        empty = [name for id, name in self.names.items() if id not in seen]
        if len(empty) == len(self.names):
            raise RunError(f"{where}: has no box")
        if empty:
            names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            print(f"warning: {where}: no box of {names}; {len(empty)} of {len(self.names)} categories", file=sys.stderr)

        objects: list[list[tuple[list[float], int]]] = [[] for _ in self.ids]
        for a in self.annotations:
            if not a["iscrowd"]:
                at = place[a["image_id"]]
                objects[at].append((corners(a["bbox"], self.sizes[at]), label[a["category_id"]]))
        # NumPy's, because loader processes get a copy of each: a tensor would be a file handle.
        self.boxes: list[NDArray] = [numpy.array([b for b, _ in o], numpy.float32).reshape(-1, 4) for o in objects]
        self.labels: list[NDArray] = [numpy.array([label for _, label in o], numpy.int64) for o in objects]

    def __len__(self) -> int:
        return len(self.ids)

    def _checked(self, annotations: list[Any], place: dict[int, int], bad_boxes: str) -> list[dict[str, Any]]:
        """What is needed of the annotations with good boxes; an error, or a warning, about the others."""
        good: list[dict[str, Any]] = []
        kinds, first = Counter[str](), ""
        for number, a in enumerate(annotations, start=1):
            try:
                image, category, box = int(a["image_id"]), int(a["category_id"]), [float(v) for v in a["bbox"]]
            except (KeyError, TypeError, ValueError) as error:
                raise RunError(f"{self.where}: no image_id, category_id or bbox in annotation {a!r:.200}") from error
            what = f"annotation {a.get('id')}"
            if image not in place:
                raise RunError(f"{self.where}: {what} is of image {image}, which is not listed")
            if category not in self.names:
                raise RunError(f"{self.where}: {what} has the unknown category {category}")
            size = self.sizes[place[image]]
            if kind := bad_box(box, size):
                kinds[kind] += 1
                first = first or (
                    f"{what} of image {self.files[place[image]]} ({size[0]} x {size[1]}): {a['bbox']} is {kind}"
                )
                continue
            good.append({
                "id": number, "image_id": image, "category_id": category, "bbox": box,
                "area": float(a.get("area", box[2] * box[3])), "iscrowd": int(a.get("iscrowd", 0)),
            })  # fmt: skip
        if kinds:
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            text = f"{self.where}: bad boxes [x, y, width, height]: {first}; in all {counts}"
            if bad_boxes == "error":
                raise RunError(f"{text}. data.bad_boxes=drop leaves them out")
            print(f"warning: {text}; left out", file=sys.stderr)
        return good


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


def open_coco(folder: str, annotations: str, key: str, bad_boxes: str) -> CocoImages:
    """The images of a folder; `key` is data.train or data.val, for errors."""
    root, path = Path(folder), Path(annotations)
    if not root.is_dir():
        raise OptionError(f"{key}: there is no folder {root}")
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise OptionError(f"{key}_annotations: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from error
    found = CocoImages(content, str(path), partial(open_image, root), bad_boxes)
    if missing := [name for name in found.files if not (root / name).is_file()]:
        raise RunError(
            f"{path}: {len(missing)} of its {len(found)} images are missing in {root}; the first is {missing[0]}"
        )
    return found


def open_image(root: Path, name: str) -> Image.Image:
    return Image.open(root / name)


# ---- images ----------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    image: Tensor  # (C, H, W) uint8
    boxes: Tensor  # (M, 4)
    labels: Tensor  # (M,)
    index: int
    unreadable: Unreadable  # whose place it takes


class Views(Dataset):
    """What training or evaluation sees of the first `images`. Training draws from `random`, which is seeded."""

    def __init__(
        self, data: CocoImages, config: DataConfig, augment: AugmentConfig, *, images: int, train: bool
    ) -> None:
        self.images = images
        self.where, self.files, self.sizes, self.open = data.where, data.files, data.sizes, data.read
        self.boxes, self.labels = data.boxes, data.labels
        self.config, self.augment, self.train = config, augment, train
        self.decoded: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample | Unreadable:
        unreadable: Unreadable = []
        for other in range(index, index + (BROKEN_IN_A_ROW if self.train else 1)):
            other %= len(self)
            try:
                image = self.read(other)
            except BROKEN as error:
                unreadable.append((self.files[other], str(error)))
                continue
            boxes, labels = torch.from_numpy(self.boxes[other]), torch.from_numpy(self.labels[other])
            if self.train:
                image, boxes, labels = augmented(image, boxes, labels, self.augment)
            else:
                image, boxes = resized(image, boxes, self.augment.val_short_side, self.augment.longest)
            return Sample(image, boxes, labels, other, unreadable)
        if self.train:
            raise RunError(f"{self.where}: {len(unreadable)} images in a row cannot be read: {unreadable[0]}, ...")
        return unreadable

    def read(self, index: int) -> Tensor:
        if index in self.decoded:
            return self.decoded[index]
        with self.open(self.files[index]) as file:
            if file.size != self.sizes[index]:
                raise ValueError(f"it is {file.size}, but {self.where} says {self.sizes[index]}")
            image = transforms.pil_to_tensor(file.convert("L" if self.config.channels == 1 else "RGB"))
        if self.config.in_memory:
            self.decoded[index] = image
        return image


def augmented(image: Tensor, boxes: Tensor, labels: Tensor, augment: AugmentConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Flipped, cropped and resized at random, as Deformable DETR is trained."""
    if random.random() < augment.flip:
        width = image.shape[-1]
        image = image.flip(-1)
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    if random.random() < augment.crop:
        image, boxes = resized(image, boxes, random.choice(augment.crop_short_sides), augment.longest)
        height, width = (min(side, random.randint(*augment.crop_sizes)) for side in image.shape[-2:])
        top, left = random.randint(0, image.shape[-2] - height), random.randint(0, image.shape[-1] - width)
        image, boxes, kept = cropped(image, boxes, top, left, height, width)
        boxes, labels = boxes[kept], labels[kept]
    side = random.choice(augment.short_sides) if augment.short_sides else 0
    return (*resized(image, boxes, side, augment.longest), labels)


def cropped(
    image: Tensor, boxes: Tensor, top: int, left: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Part of an image, the boxes in it, and (M,) which of them are not outside."""
    boxes = (boxes - torch.tensor([left, top, left, top])).clamp(min=0)
    boxes = boxes.minimum(torch.tensor([width, height, width, height]))
    return image[:, top : top + height, left : left + width], boxes, (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def resized(image: Tensor, boxes: Tensor, short_side: int, longest: int) -> tuple[Tensor, Tensor]:
    """The shorter side made `short_side` (0: as it is), but the longer one at most `longest`."""
    height, width = image.shape[-2:]
    if not short_side:
        return image, boxes
    scale = min(short_side / min(height, width), longest / max(height, width))
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    return transforms.resize(image, size, antialias=True), boxes * torch.tensor([size[1] / width, size[0] / height] * 2)


# ---- batches ---------------------------------------------------------------------------------------------------------


class Loader:
    """Batches of a data set, with a warning for every image that can't be read."""

    def __init__(self, data: CocoImages, config: Any, fabric: Any, *, images: int, train: bool) -> None:
        self.views = Views(data, config.data, config.augment, images=images, train=train)
        self.fabric = fabric
        self.workers = config.run.workers
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (config.data.mean, config.data.std))
        self.unreadable: set[str] = set()

    def training(self, batch_size: int, seed: int, start: int) -> Iterator[Batch]:
        """This rank's share of the batches start, start + 1, ..."""
        for batch in loading.batches(
            self.views, self.fabric, batch_size=batch_size, seed=seed, start=start,
            workers=self.workers, collate=partial(collate, mean=self.mean, std=self.std),
        ):  # fmt: skip
            yield self.warned(batch)

    def in_order(self, indices: list[int]) -> Iterator[Batch]:
        """Those images; less those that can't be read."""
        at_once = READ_AT_ONCE if max(map(max, self.views.sizes)) <= SMALL else 1
        for samples in DataLoader(
            Subset(self.views, indices), at_once, num_workers=self.workers, collate_fn=list,
            multiprocessing_context="spawn" if self.workers else None,
        ):  # fmt: skip
            for sample in samples:
                if not isinstance(sample, Sample):
                    self.warn(sample)
            if good := [sample for sample in samples if isinstance(sample, Sample)]:
                yield self.warned(self.fabric.to_device(collate(good, self.mean, self.std)))

    def warned(self, batch: Batch) -> Batch:
        self.warn(batch.unreadable or [])
        batch.unreadable = None
        return batch

    def warn(self, unreadable: Unreadable) -> None:
        for name, error in unreadable:
            if name not in self.unreadable:
                self.unreadable.add(name)
                done = "another one takes its place" if self.views.train else "left out"
                text = f"cannot read {name} ({error}): {done}; {len(self.unreadable)} so far"
                print(f"warning: {self.views.where}: {text}", file=sys.stderr)


def collate(samples: list[Sample], mean: Tensor, std: Tensor) -> Batch:
    n, most = len(samples), max(1, *(len(s.labels) for s in samples))
    height, width = (max(s.image.shape[side] for s in samples) for side in (-2, -1))
    batch = Batch(
        torch.zeros(n, len(mean), height, width), torch.zeros(n, height, width, dtype=torch.bool),
        torch.zeros(n, most, 4), torch.full((n, most), -1), torch.tensor([s.index for s in samples]),
        [each for s in samples for each in s.unreadable],
    )  # fmt: skip
    for i, s in enumerate(samples):
        h, w = s.image.shape[-2:]
        batch.images[i, :, :h, :w] = (s.image / 255 - mean) / std
        batch.inside[i, :h, :w] = True
        batch.boxes[i, : len(s.boxes)], batch.labels[i, : len(s.labels)] = s.boxes, s.labels
    return batch


def at_map(inside: Tensor, height: int, width: int) -> Tensor:
    """A padding mask (N, H, W) at a map's resolution, as Deformable DETR looks it up."""
    return F.interpolate(inside[:, None].float(), (height, width))[:, 0] > 0.5
