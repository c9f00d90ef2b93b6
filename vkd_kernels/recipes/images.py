"""Real images: any data set of torchvision by name, or folders of images per class (ImageNet's layout).

Augmentation is timm's, or torchvision's for small images. Every view has a seed of its own: (seed, epoch, image), or
with fixed views (seed, image, view); batches come out the same whatever the number of workers, and after --resume.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
import torchvision
from timm.data import Mixup, create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder, VisionDataset

from .config import OptionError
from .loading import Key, Views, epochs, read
from .runs import RunError
from .task import generator, mixed_seed

SPLIT, FIXED, MIX, DRAW, TEACHER = range(1, 6)  # what a draw is for, beside the seed and the numbers


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:  # (N,) -> (N, classes)
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


class Images:
    """Training and held-out images of `data.name`, augmented as `augment` says. With `data.labels` below 1 a batch is
    made of images with labels and of others, drawn with replacement, whose targets are zero."""

    def __init__(self, config: Any, seed: int) -> None:
        self.config, self.seed, self.smoothing = config, seed, config.distill.label_smoothing
        self.d, self.a = config.data, config.augment
        self.size, self.channels = self.d.size, self.d.channels
        self.views = self.a.views if self.a.enabled else 1
        fresh = {
            "augment.views=0": not self.views,
            "augment.mixup": self.a.enabled and self.a.mixup > 0,
            "augment.cutmix": self.a.enabled and self.a.cutmix > 0,
        }
        self.fresh = " and ".join(name for name, true in fresh.items() if true)
        self.mixing = self.a.enabled and (self.a.mixup > 0 or self.a.cutmix > 0)
        if self.mixing and self.d.labels < 1:
            raise OptionError("augment.mixup, augment.cutmix: 0 where data.labels are below 1: they mix labels")

    @cached_property
    def opened(self) -> tuple[Any, Any, int]:
        """Training images, held-out images, number of classes: when needed, since an export needs no images."""
        return open_images(self.d)

    @property
    def images(self) -> int:
        return len(self.opened[0])

    @property
    def classes(self) -> int:
        return self.d.classes or self.opened[2]

    @cached_property
    def labeled(self) -> Tensor:
        """The images whose labels a student may see: a share of every class, at least one."""
        labels = torch.as_tensor(self.opened[0].targets)
        order = torch.randperm(len(labels), generator=generator(self.seed, SPLIT))
        rows = [order[labels[order] == label] for label in range(self.classes)]
        return torch.cat([of_class[: max(1, round(self.d.labels * len(of_class)))] for of_class in rows])

    def batches(
        self, learner: str, start: int, batch_size: int, rank: int, ranks: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(images, targets, rows): this rank's share of the batches start, start + 1, ...; see `Digits.batches`."""
        few = self.d.labels < 1 and learner != "teacher"
        mine = slice(rank, None, ranks)
        if few:
            keys: Any = self.few(learner, start, batch_size, mine)
        else:
            keys = epochs(self.images, batch_size, seed=self.seed, start=start, mine=mine, key=self.key)
        mix = None
        if self.mixing:
            if batch_size % (2 * ranks):
                raise OptionError(f"optim.batch_size: {batch_size} images are not pairs on {ranks} ranks")
            a = self.a
            mix = Mixup(
                a.mixup, a.cutmix, switch_prob=a.mix_switch, label_smoothing=self.smoothing, num_classes=self.classes
            )
        views = Views(self.opened[0], self.training_transform())
        for step, (images, labels, keys_) in enumerate(
            read(views, keys, collate, workers=self.config.run.workers), start
        ):
            if mix:
                numpy.random.seed(mixed_seed(self.seed, step, rank, MIX) % 2**32)
                images, targets = mix(images, labels)
            else:
                targets = smoothed(labels, self.classes, self.smoothing)
            if few:
                targets[~torch.isin(torch.tensor([key.image for key in keys_]), self.labeled)] = 0
            yield images, targets, torch.tensor([key.row for key in keys_]) if self.views else None

    def few(self, learner: str, start: int, batch_size: int, mine: slice) -> Iterator[list[Key]]:
        """Labeled images, then unlabeled ones; a student alone sees the labeled ones of the same batches."""
        labeled = round(batch_size * self.config.labeled_share)
        hidden = torch.ones(self.images, dtype=torch.bool)
        hidden[self.labeled] = False
        others = hidden.nonzero().flatten()
        for step in count(start):
            draw = generator(self.seed, step, DRAW)
            seen = self.labeled[torch.randint(len(self.labeled), (labeled,), generator=draw)]
            unseen = others[torch.randint(len(others), (batch_size - labeled,), generator=draw)]
            chosen = seen if learner == "alone" else torch.cat([seen, unseen])
            yield [self.key(step, index) for index in chosen.tolist()[mine]]

    def key(self, epoch: int, index: int) -> Key:
        """A new view for every epoch (or step), or one of the fixed ones."""
        return (
            self.fixed(index, mixed_seed(self.seed, epoch, index) % self.views)
            if self.views
            else Key(index, (self.seed, epoch, index))
        )

    def fixed(self, index: int, view: int) -> Key:
        return Key(index, (self.seed, index, view, FIXED), view * self.images + index)

    def every_view(self) -> Iterator[Tensor]:
        keys = [self.fixed(index, view) for view in range(self.views) for index in range(self.images)]
        views = Views(self.opened[0], self.training_transform())
        for images, _, _ in read(views, keys, collate, workers=self.config.run.workers, at_once=64):
            yield images

    def held_out(self, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
        test, workers = self.opened[1], self.config.run.workers
        views = Views(test, self.transform(self.evaluation_transform()))
        for images, labels, _ in read(
            views, map(Key, range(rank, len(test), ranks)), collate, workers=workers, at_once=64
        ):
            yield images, labels

    def fingerprint(self) -> str:
        """Of the files' names, sizes and times, or of a data set's arrays, and of all that makes a view of them."""
        digest = hashlib.sha256(repr((self.d, self.a, self.seed if self.a.enabled else None)).encode())
        for path, label in getattr(self.opened[0], "samples", ()):
            status = Path(path).stat() if Path(path).exists() else None  # a broken link: no image either
            digest.update(f"{path} {label} {status and (status.st_size, status.st_mtime_ns)}\n".encode())
        digest.update(numpy.ascontiguousarray(getattr(self.opened[0], "data", ())).tobytes())
        return digest.hexdigest()

    # ---- augmentation ------------------------------------------------------------------------------------------------

    def transform(self, of_image: Any) -> Any:
        return partial(transformed, of_image, "RGB" if self.channels == 3 else "L")

    def evaluation_transform(self) -> Any:
        d = self.d
        return create_transform(
            d.size, is_training=False, crop_pct=d.crop, interpolation="bicubic", mean=d.mean, std=d.std
        )

    def training_transform(self) -> Any:
        """Random resized crop, flip, one of grayscale / solarize / blur, color jitter, normalization; or shifts."""
        a, d = self.a, self.d
        if not a.enabled:
            return self.transform(self.evaluation_transform())
        if a.pad:
            small = [transforms.RandomCrop(d.size, padding=a.pad), transforms.RandomHorizontalFlip(a.flip)]
            return self.transform(
                transforms.Compose(
                    [transforms.Resize(d.size), *small, transforms.ToTensor(), transforms.Normalize(d.mean, d.std)]
                )
            )
        return self.transform(
            create_transform(
                d.size,
                is_training=True,
                scale=(a.crop_min, 1.0),
                hflip=a.flip,
                color_jitter=a.color_jitter,
                auto_augment="3a" if a.three_augment else None,
                interpolation="bicubic",
                mean=d.mean,
                std=d.std,
            )
        )


def transformed(of_image: Any, mode: str, sample: tuple[Any, int]) -> tuple[Tensor, int]:
    return of_image(sample[0].convert(mode)), sample[1]


def collate(samples: list[Any]) -> tuple[Tensor, Tensor, list[Key]]:
    pairs, keys = zip(*samples, strict=True)
    images, labels = zip(*pairs, strict=True)
    return torch.stack(images), torch.tensor(labels), list(keys)


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_images(data: Any) -> tuple[Any, Any, int]:
    """Training images, held-out images, number of classes of `data.name`."""
    train, test = open_folders(data) if data.name == "folder" else open_named(data)
    names = getattr(train, "classes", ())
    if not (classes := len(names) or data.classes):
        raise OptionError(f"data.classes: {data.name} does not say how many classes it has; give their number")
    if data.classes not in (0, classes):
        raise RunError(f"data.classes is {data.classes}, but {data.root} has {classes} classes")
    return train, test, classes


def open_folders(data: Any) -> list[Any]:
    """`root/train/<class>/*` and `root/val/<class>/*`."""
    parts: list[Any] = []
    for split in (data.train_split or "train", data.test_split or "val"):
        folder = Path(data.root) / split
        if not data.root or not folder.is_dir():
            raise OptionError(f"data.root: there is no folder {folder}; it must hold one folder of images per class")
        try:
            parts.append(ImageFolder(str(folder)))
        except FileNotFoundError as error:  # no class, or classes without images, which it names
            raise RunError(f"{folder}: {error}") from error
    if parts[0].classes != parts[1].classes:
        different = sorted({*parts[0].classes} ^ {*parts[1].classes})
        raise RunError(f"{data.root}: classes that are only in one of the two folders: {', '.join(different[:5])}")
    return parts


def open_named(data: Any) -> list[Any]:
    """A data set of torchvision, by the name of its class."""
    kind: Any = getattr(torchvision.datasets, data.name, None)
    known = [name for name in torchvision.datasets.__all__ if splits_of(getattr(torchvision.datasets, name), data)]
    if data.name not in known:
        near = get_close_matches(data.name, ["digits", "folder", *known], n=3, cutoff=0.3)
        raise OptionError(
            f"data.name: {data.name!r} is not digits, folder, or a data set of torchvision with a training and a test "
            f"part; nearest: {', '.join(near)}"
        )
    options: dict[str, Any] = {"root": data.root}
    if "download" in inspect.signature(kind).parameters:
        options["download"] = data.download
    try:
        return [kind(**options, **split) for split in splits_of(kind, data)]
    except Exception as error:  # missing or damaged files, no network: as many types as ways to fail
        hint = "" if data.download else "; data.download=true fetches it"
        raise RunError(f"data.root={data.root} data.name={data.name}: {error}{hint}") from error


def splits_of(kind: Any, data: Any) -> list[dict[str, Any]]:
    """Options of the training and the test part; none for what has no such parts."""
    if not (isinstance(kind, type) and issubclass(kind, VisionDataset)):
        return []
    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        return [{"train": True}, {"train": False}]
    if "split" in parameters:
        return [{"split": data.train_split or "train"}, {"split": data.test_split or "test"}]
    return []
