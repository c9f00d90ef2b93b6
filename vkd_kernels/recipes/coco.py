"""Images with boxes in COCO's format: read, augmented, and put into batches with padding masks."""

from __future__ import annotations

import json
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

LONGEST, CROP_SHORT_SIDES, CROP_SIZES = 1333, (400, 500, 600), (384, 600)  # Deformable DETR's, in pixels


class CocoImages:
    """The images of an annotation file: item i is {"image", "boxes", "labels", "crowds"} for torchvision's transforms.

    Labels number the categories in the order of their ids. What exceeds an image is cut off, and boxes without area are
    left out. Crowds, which average precision ignores, have their label in `crowds` and -1 in `labels`.

    Args:
        content: of the file.
        where: how errors call it.
        open_image: of a file name.
        keep: items in memory.
    """

    def __init__(
        self,
        content: Any,
        where: str,
        open_image: Callable[[str], Image.Image],
        *,
        channels: int = 3,
        keep: bool = False,
    ) -> None:
        self.where, self.open_image, self.mode = where, open_image, "L" if channels == 1 else "RGB"
        self.kept: dict[int, Any] | None = {} if keep else None
        try:
            self.names = {int(c["id"]): str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
            label = {id: number for number, id in enumerate(self.names)}
            self.samples = [(str(i["file_name"]),) for i in content["images"]]
            objects: dict[Any, list[list[float]]] = {i["id"]: [] for i in content["images"]}
            for a in content["annotations"]:
                x, y, w, h = a["bbox"]
                kind, crowd = label[a["category_id"]], a.get("iscrowd")
                objects[a["image_id"]].append([x, y, x + w, y + h, *((-1, kind) if crowd else (kind, -1))])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{where} is no annotation file in COCO's format: {error!r}") from error
        # NumPy's, because loader processes may get a copy of each: a tensor would be a file handle.
        self.objects = [numpy.array(rows, numpy.float32).reshape(-1, 6) for rows in objects.values()]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        with self.open_image(self.samples[index][0]) as file:
            image = v2.functional.pil_to_tensor(file.convert(self.mode))
        objects = torch.from_numpy(self.objects[index])
        boxes: Any = tv_tensors.BoundingBoxes(objects[:, :4], format="XYXY", canvas_size=image.shape[-2:])  # type: ignore[call-arg]
        boxes = v2.functional.clamp_bounding_boxes(boxes)
        real = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        labels, crowds = objects[real, 4:].long().unbind(1)
        boxes = tv_tensors.wrap(boxes[real], like=boxes)
        item = {"image": tv_tensors.Image(image), "boxes": boxes, "labels": labels, "crowds": crowds}
        if self.kept is not None:
            self.kept[index] = item
        return item


def open_coco(folder: str, annotations: str, channels: int) -> CocoImages:
    try:
        content = json.loads(Path(annotations).read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read the annotations {annotations}: {error}") from error
    return CocoImages(content, annotations, lambda name: Image.open(Path(folder) / name), channels=channels)


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


def labels_and_crowds(sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What goes with the boxes that a crop has cut off."""
    return sample["labels"], sample["crowds"]


class RandomCrop(v2.Transform):
    """A part whose sides are drawn between the two of CROP_SIZES, as far as the image reaches."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        whole = next(x for x in flat_inputs if isinstance(x, tv_tensors.Image)).shape[-2:]
        height, width = (min(side, int(torch.randint(CROP_SIZES[0], CROP_SIZES[1] + 1, ()))) for side in whole)
        top, left = (int(torch.randint(all_ - part + 1, ())) for all_, part in zip(whole, (height, width), strict=True))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


def collate(samples: list[tuple[dict[str, Any], Key]], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """images (N, C, H, W), padded with 0 at the right and at the bottom; inside (N, H, W): not padding; boxes (N, M, 4)
    x0, y0, x1, y1 in pixels, labels and crowds (N, M), padded with -1; index (N,) of the image in its data set."""
    n, most = len(samples), max(1, *(len(s["labels"]) for s, _ in samples))
    height, width = (max(s["image"].shape[side] for s, _ in samples) for side in (-2, -1))
    images, inside = torch.zeros(n, len(mean), height, width), torch.zeros(n, height, width, dtype=torch.bool)
    objects = {"boxes": torch.full((n, most, 4), -1.0)}
    objects |= {name: torch.full((n, most), -1) for name in ("labels", "crowds")}
    for i, (s, _) in enumerate(samples):
        h, w = s["image"].shape[-2:]
        images[i, :, :h, :w] = (torch.as_tensor(s["image"]) / 255 - mean) / std
        inside[i, :h, :w] = True
        for name, padded in objects.items():
            padded[i, : len(s[name])] = torch.as_tensor(s[name])
    return {"images": images, "inside": inside, **objects, "index": torch.tensor([key.image for _, key in samples])}


def at_map(inside: Tensor, height: int, width: int) -> Tensor:
    """A padding mask (N, H, W) at a map's resolution, as Deformable DETR looks it up."""
    return F.interpolate(inside[:, None].float(), (height, width))[:, 0] > 0.5
