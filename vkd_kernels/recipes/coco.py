"""Images with boxes in COCO's format: read, augmented, and put into batches with padding masks."""

from __future__ import annotations

import json
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

LONGEST, CROP_SHORT_SIDES, CROP_SIZES = 1333, (400, 500, 600), (384, 600)  # Deformable DETR's, in pixels


def annotation_file(root: Path, part: str) -> Path:
    return root / "annotations" / f"instances_{part}.json"


class CocoImages:
    """A part of a data set, such as train2017. Labels number the categories in the order of their ids (`names`)."""

    def __init__(self, root: Path, part: str, channels: int) -> None:
        self.where, self.mode = annotation_file(root, part), "L" if channels == 1 else "RGB"
        try:
            content = json.loads(self.where.read_text(encoding="utf-8"))
            self.names = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
            label = {id: number for number, id in enumerate(self.names)}
            self.samples = [(str(root / part / i["file_name"]),) for i in content["images"]]
            objects: dict[Any, list[list[float]]] = {}
            for i in content["images"]:
                if i["id"] in objects:
                    raise ValueError(f"two images have the id {i['id']}")
                objects[i["id"]] = []
            for a in content["annotations"]:
                x, y, w, h = a["bbox"]
                objects[a["image_id"]].append([x, y, x + w, y + h, label[a["category_id"]], a.get("iscrowd", 0)])
            # NumPy's, because loader processes may get a copy of each: a tensor would be a file handle.
            self.objects = [numpy.array(rows, numpy.float32).reshape(-1, 6) for rows in objects.values()]
        except OSError as error:
            raise OptionError(f"data.root: cannot read the annotations: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.where} is no annotation file in COCO's format: {error!r}") from error

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with Image.open(self.samples[index][0]) as file:
            image = v2.functional.pil_to_tensor(file.convert(self.mode))
        return cleaned(item(image, torch.from_numpy(self.objects[index])))


def item(image: Tensor, objects: Tensor) -> dict[str, Any]:  # (C, H, W) uint8; (M, 6) box, label, crowd or not
    """An image and its objects, for torchvision's transforms."""
    boxes: Any = tv_tensors.BoundingBoxes(objects[:, :4], format="XYXY", canvas_size=image.shape[-2:])  # type: ignore[call-arg]
    labels, crowds = objects[:, 4:].long().unbind(1)
    return {"image": tv_tensors.Image(image), "boxes": boxes, "labels": labels, "iscrowd": crowds}


def cleaned(sample: dict[str, Any]) -> dict[str, Any]:
    """Boxes end at the image's border; empty ones are left out."""
    return v2.Compose([v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=labels_and_crowds)])(sample)


def labels_and_crowds(sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What goes with the boxes that are left out."""
    return sample["labels"], sample["iscrowd"]


# ---- what training and evaluation see --------------------------------------------------------------------------------


def training_transform(a: Any) -> Any:
    """Flipped, cropped and resized at random, as Deformable DETR is trained."""
    steps: list[Any] = [v2.RandomHorizontalFlip(a.flip)]
    if a.crop:
        crop = [v2.RandomShortestSize([*CROP_SHORT_SIDES], LONGEST), RandomCrop()]
        steps += [v2.RandomApply(crop, a.crop), v2.SanitizeBoundingBoxes(labels_getter=labels_and_crowds)]
    if a.short_sides:
        steps.append(v2.RandomShortestSize([*a.short_sides], LONGEST))
    return v2.Compose(steps)


def evaluation_transform(a: Any) -> Any:
    return v2.RandomShortestSize([max(a.short_sides)], LONGEST) if a.short_sides else v2.Identity()


class RandomCrop(v2.Transform):
    """A part whose sides are drawn between the two of CROP_SIZES, as far as the image reaches."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        whole = next(x for x in flat_inputs if isinstance(x, tv_tensors.Image)).shape[-2:]
        height, width = (min(side, int(torch.randint(CROP_SIZES[0], CROP_SIZES[1] + 1, ()))) for side in whole)
        top, left = (int(torch.randint(all_ - part + 1, ())) for all_, part in zip(whole, (height, width), strict=True))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


def collate(samples: list[tuple[dict[str, Any], Key]], mean: Tensor, std: Tensor) -> dict[str, Any]:
    """images (N, C, H, W), padded with 0 at the right and at the bottom; inside (N, H, W): not padding; index (N,) of
    the image in its data set; and of every image, as torchmetrics takes them, targets: boxes (M, 4) x0, y0, x1, y1 in
    pixels, labels (M,), and iscrowd (M,), 1 for what average precision ignores."""
    height, width = (max(s["image"].shape[side] for s, _ in samples) for side in (-2, -1))
    images = torch.zeros(len(samples), len(mean), height, width)
    inside = torch.zeros(len(samples), height, width, dtype=torch.bool)
    for i, (s, _) in enumerate(samples):
        h, w = s["image"].shape[-2:]
        images[i, :, :h, :w] = (torch.as_tensor(s["image"]) / 255 - mean) / std
        inside[i, :h, :w] = True
    # Copies: a loader process shares what it sends, and a data set's own tensors would stay shared for good.
    targets = [{name: torch.as_tensor(s[name]).clone() for name in ("boxes", "labels", "iscrowd")} for s, _ in samples]
    index = torch.tensor([key.image for _, key in samples])
    return {"images": images, "inside": inside, "targets": targets, "index": index}


def at_map(inside: Tensor, height: int, width: int) -> Tensor:
    """A padding mask (N, H, W) at a map's resolution, as Deformable DETR looks it up."""
    return F.interpolate(inside[:, None].float(), (height, width))[:, 0] > 0.5
