"""Real images: any data set of torchvision by name, or folders of images per class (ImageNet's layout).

Augmentation is timm's. Every view has a seed of its own, (seed, step, position in the batch), or with fixed views
(seed, image, view): batches come out the same whatever the number of workers, and after --resume.
"""

from __future__ import annotations

import hashlib
import inspect
import signal
import struct
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
from PIL import Image
from timm.data import Mixup, create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder, VisionDataset

from ..config import OptionError
from ..engine import generator, mixed_seed, seed_all
from ..runs import RunError
from .data import Samples, smoothed

ORDER, FRESH, CHOICE, FIXED, MIX = range(5)  # what a draw is for, beside the seed and the numbers
BROKEN = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)  # what bad files make PIL raise
BROKEN_IN_A_ROW = 20  # so many unreadable images one after the other are no accident
UNREADABLE = -1  # the label of a held-out image that could not be read
READ_AT_ONCE = 64  # images of a batch that nothing is learned from

Key = tuple[int, tuple[int, ...], int]  # image; seed of its view; row among all fixed views


class ImageData:
    """Training and held-out images of `data.name`, augmented as `augment` says."""

    channels, labelled_share = 3, 1.0

    def __init__(self, config: Any, seed: int) -> None:
        self.data, self.augment, self.seed = config.data, config.augment, seed
        self.size, self.workers, self.smoothing = config.data.size, config.run.workers, config.distill.label_smoothing
        self.views = self.augment.views if self.augment.enabled else 1
        fresh = {"augment.views": not self.views, **{f"augment.{n}": self.mixing(n) for n in ("mixup", "cutmix")}}
        self.fresh = " and ".join(f"{name}={getattr(self.augment, name[8:]):g}" for name, true in fresh.items() if true)
        self.broken: set[str] = set()  # what could not be read so far

    @cached_property
    def opened(self) -> tuple[Any, Any, int]:
        """Training images, held-out images, number of classes: found when needed, since an export needs no images."""
        return (open_folder if self.data.name == "folder" else open_named)(self.data)

    @property
    def train(self) -> Any:
        return self.opened[0]

    @property
    def test(self) -> Any:
        return self.opened[1]

    @property
    def images(self) -> int:
        return len(self.train)

    @property
    def classes(self) -> int:
        return self.data.classes or self.opened[2]

    def batches(self, learner: str, start: int, batch_size: int, rank: int, ranks: int) -> Iterator[Samples]:
        if batch_size > self.images:
            raise OptionError(f"optim.batch_size: {batch_size}, but there are only {self.images} training images")
        mix = self.mixer(batch_size, ranks)
        mine = pairs(batch_size, rank, ranks) if mix else range(rank, batch_size, ranks)
        loader = self.loader(self.training_views(), Order(self, start, batch_size, [*mine]))
        for step, (images, labels, rows) in enumerate(loader, start):
            if mix:
                numpy.random.seed(mixed_seed(self.seed, step, MIX) % 2**32)  # the same on every rank
                images, targets = mix(images, labels)
            else:
                targets = smoothed(labels, self.classes, self.smoothing)
            yield Samples(images, targets, rows if self.views else None)

    def mixer(self, batch_size: int, ranks: int) -> Mixup | None:
        if not (self.mixing("mixup") or self.mixing("cutmix")):
            return None
        if batch_size % (2 * ranks):
            raise OptionError(
                f"optim.batch_size: {batch_size} images are not equal numbers of pairs for {ranks} rank(s)"
            )
        return Mixup(
            self.augment.mixup, self.augment.cutmix, switch_prob=self.augment.mix_switch,
            label_smoothing=self.smoothing, num_classes=self.classes,
        )  # fmt: skip

    def mixing(self, name: str) -> bool:
        return self.augment.enabled and getattr(self.augment, name) > 0

    def every_view(self) -> Iterator[torch.Tensor]:
        keys = [self.fixed(image, view) for view in range(self.views) for image in range(self.images)]
        for images, _, _ in self.loader(self.training_views(), in_batches(keys)):
            yield images

    def held_out(self, rank: int, ranks: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        keys: list[Key] = [(image, (), image) for image in range(rank, len(self.test), ranks)]
        views = Views(self.test, evaluation_transform(self.data), replace=False)
        for images, labels, _ in self.loader(views, in_batches(keys)):
            yield images, labels

    def fixed(self, image: int, view: int) -> Key:
        return image, (self.seed, image, view, FIXED), view * self.images + image

    def training_views(self) -> Views:
        transform = (
            training_transform(self.data, self.augment) if self.augment.enabled else evaluation_transform(self.data)
        )
        return Views(self.train, transform, replace=True)

    def loader(self, views: Views, batches: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(images, labels, rows), with a warning for every image that can't be read."""
        for samples, broken in DataLoader(
            views, batch_sampler=batches, num_workers=self.workers, collate_fn=collate, worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
        ):  # fmt: skip
            for name, error in broken:
                if name not in self.broken:
                    self.broken.add(name)
                    done = "another one takes its place" if views.replace else "left out"
                    print(f"warning: cannot read {name} ({error}): {done}; {len(self.broken)} so far", file=sys.stderr)
            if samples is None:
                raise RunError(f"{BROKEN_IN_A_ROW} images in a row cannot be read, the last is {broken[-1][0]}")
            yield samples

    def fingerprint(self) -> str:
        """Of the files' names, sizes and times, or of a data set's arrays, and of all that makes a view of them."""
        how = (self.augment, self.seed) if self.augment.enabled else ()
        digest = hashlib.sha256(repr((self.data, how)).encode())
        for path, label in getattr(self.train, "samples", ()):
            status = Path(path).stat()
            digest.update(f"{path} {label} {status.st_size} {status.st_mtime_ns}\n".encode())
        digest.update(numpy.ascontiguousarray(getattr(self.train, "data", ())).tobytes())
        return digest.hexdigest()


# ---- which images ----------------------------------------------------------------------------------------------------


class Order:
    """The batches from `start` on, without end: every epoch in its own order, the incomplete last batch left out."""

    def __init__(self, data: ImageData, start: int, batch_size: int, mine: list[int]) -> None:
        self.data, self.start, self.batch_size, self.mine = data, start, batch_size, mine

    def __iter__(self) -> Iterator[list[Key]]:
        data, per_epoch = self.data, self.data.images // self.batch_size
        epoch, step = -1, self.start
        while True:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(data.images, generator=generator(data.seed, epoch, ORDER))
            images = order[step % per_epoch * self.batch_size :][: self.batch_size].tolist()
            if data.views:
                views = torch.randint(data.views, (self.batch_size,), generator=generator(data.seed, step, CHOICE))
                yield [data.fixed(images[i], int(views[i])) for i in self.mine]
            else:
                yield [(images[i], (data.seed, step, i, FRESH), 0) for i in self.mine]
            step += 1


def pairs(batch_size: int, rank: int, ranks: int) -> list[int]:
    """A rank's positions of a batch in which i and batch_size - 1 - i are mixed: both, in mirrored order."""
    half = batch_size // 2 // ranks
    first = range(rank * half, (rank + 1) * half)
    return [*first, *(batch_size - 1 - i for i in reversed(first))]


def in_batches(keys: list[Key]) -> list[list[Key]]:
    return [keys[i : i + READ_AT_ONCE] for i in range(0, len(keys), READ_AT_ONCE)]


class Views(Dataset):
    """(image (3, H, W), label, row, [(name, error) of what could not be read]) of a `Key`."""

    def __init__(self, images: Any, transform: Any, *, replace: bool) -> None:
        self.images, self.transform, self.replace = images, transform, replace

    def __getitem__(self, key: Key) -> tuple[Any, int, int, list[tuple[str, str]]]:
        index, seed, row = key
        broken = []
        for other in range(index, index + BROKEN_IN_A_ROW):
            other %= len(self.images)
            try:
                image, label = self.images[other]
                image = image.convert("RGB")
            except BROKEN as error:
                samples = getattr(self.images, "samples", None)
                broken.append((samples[other][0] if samples else f"image {other}", str(error)))
                if self.replace:
                    continue
                image, label = Image.new("RGB", (8, 8)), UNREADABLE
            if seed:
                seed_all(*seed)  # of Python's, NumPy's and PyTorch's generators: transforms draw from all three
            return self.transform(image), label, row, broken
        return None, UNREADABLE, row, broken


def collate(samples: list[tuple[Any, int, int, list[tuple[str, str]]]]) -> tuple[Any, list[tuple[str, str]]]:
    images, labels, rows, broken = zip(*samples, strict=True)
    found = [each for some in broken for each in some]
    if any(image is None for image in images):
        return None, found
    return (torch.stack(images), torch.tensor(labels), torch.tensor(rows)), found


def start_worker(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers


# ---- augmentation ----------------------------------------------------------------------------------------------------


def training_transform(data: Any, augment: Any) -> Any:
    """Random resized crop, flip, one of grayscale / solarise / blur, colour jitter, normalisation: timm's."""
    return create_transform(
        data.size, is_training=True, scale=(augment.crop_min, 1.0), hflip=augment.flip,
        color_jitter=augment.color_jitter, auto_augment="3a" if augment.three_augment else None,
        interpolation="bicubic", mean=data.mean, std=data.std,
    )  # fmt: skip


def evaluation_transform(data: Any) -> Any:
    return create_transform(
        data.size, is_training=False, crop_pct=data.crop, interpolation="bicubic", mean=data.mean, std=data.std
    )


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_folder(data: Any) -> tuple[Any, Any, int]:
    """Training images, held-out images, number of classes of `root/train/<class>/*` and `root/val/<class>/*`."""
    parts = {}
    for split in (data.train_split or "train", data.test_split or "val"):
        folder = Path(data.root) / split
        if not data.root or not folder.is_dir():
            raise OptionError(f"data.root: there is no folder {folder}; it must hold one folder of images per class")
        try:
            parts[split] = ImageFolder(str(folder))
        except FileNotFoundError as error:  # no class, or classes without images, which it names
            raise RunError(f"{folder}: {error}") from error
    train, test = parts.values()
    if train.classes != test.classes:
        different = sorted({*train.classes} ^ {*test.classes})
        raise RunError(
            f"{data.root}: {len(train.classes)} classes to train and {len(test.classes)} to test on; only in one of "
            f"them: {', '.join(different[:5])}{', ...' if len(different) > 5 else ''}"
        )
    return train, test, checked_classes(data, len(train.classes))


def open_named(data: Any) -> tuple[Any, Any, int]:
    """The same of a data set of torchvision, by the name of its class."""
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
        train, test = (kind(**options, **split) for split in splits_of(kind, data))
    except (RuntimeError, OSError, ValueError) as error:
        hint = "" if data.download else "; data.download=true fetches it"
        raise RunError(f"data.root={data.root} data.name={data.name}: {error}{hint}") from error
    classes = len(getattr(train, "classes", ())) or data.classes
    if not classes:
        raise OptionError(f"data.classes: {data.name} does not say how many classes it has; give their number")
    return train, test, checked_classes(data, classes)


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


def checked_classes(data: Any, found: int) -> int:
    if data.classes not in (0, found):
        raise RunError(f"data.classes is {data.classes}, but {data.root} has {found} classes")
    return found
