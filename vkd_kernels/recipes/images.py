"""Images with labels: scikit-learn's digits, data sets of torchvision by name, folders of images per class.

Augmentation is timm's, or torchvision's for small images. Every view has a seed of its own: (seed, epoch, image), or
with fixed views (seed, image, view); batches come out the same whatever the number of workers, and after --resume.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
import torchvision
from filelock import FileLock
from timm.data import Mixup, create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from .config import OptionError, Section, UserPath, nearest, option, show
from .digits import Digits, DigitViews
from .loading import Key, Views, epochs, read
from .runs import RunError
from .task import generator, mixed_seed

SPLIT, FIXED, MIX, DRAW = range(1, 5)  # what a draw is for, beside the seed and the numbers
AT_ONCE = 64  # images of a batch that nothing is learned from


class Source(Section):
    """Where images with labels come from."""

    name: str = option("digits", "digits (bundled), folder, or a data set of torchvision by name, such as CIFAR100")
    root: UserPath = option("", "folder of the images; data.name=folder: it holds train/<class>/* and val/<class>/*")
    download: bool = option(False, "let torchvision download what is missing")
    classes: int = option(0, "number of classes; 0: as the data say", ge=0)


def check_bundled(source: Source, where: str) -> None:
    """An error about what the bundled digits would ignore, of the section `where`."""
    for key in ("root", "download", "classes") if source.name == "digits" else ():
        if value := getattr(source, key):
            remedy = f"leave it out, or name other images by {where}.name"
            raise OptionError(f"{where}.{key}: {show(value)} has no effect on the bundled digits; {remedy}")


class Images:
    """Training and held-out images of `data.name`, augmented as `augment` says. With few labels a batch has images
    with labels and others, drawn with replacement, whose targets are zero."""

    def __init__(self, config: Any, seed: int) -> None:
        self.config, self.data, self.augment, self.seed = config, config.data, config.augment, seed
        self.size, self.channels, self.views, self.labels = config.size, config.channels, config.views, config.labels

    @cached_property
    def opened(self) -> tuple[Any, Any, int]:
        return open_images(self.data, self.seed)

    @property
    def images(self) -> int:
        return len(self.opened[0])

    @property
    def classes(self) -> int:
        return self.opened[2]

    @cached_property
    def labeled(self) -> Tensor:
        """The images whose labels a student may see: a share of every class, at least one."""
        return share_of_classes(labels_of(self.opened[0]), self.classes, self.labels, generator(self.seed, SPLIT))

    @cached_property
    def training(self) -> Any:
        return self.seen(self.opened[0], training=True)

    def seen(self, images: Any, *, training: bool) -> Any:
        """What a network sees of a data set: `Views`."""
        if isinstance(images, Digits):
            return DigitViews(images, self.views if training else 0)
        return Views(images, self.transform(training=training))

    def batches(
        self, learner: str, start: int, batch_size: int, rank: int, ranks: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(images, targets, rows among all fixed views): this rank's share of the batches start, start + 1, ...

        `learner`: "distilled" (from labels where there are any, and from a teacher), "alone" (from the labeled images
        of the same batches), or "teacher" (the teacher itself, with the labels of all images).
        """
        few, mine = learner != "teacher" and self.labels < 1, slice(rank, None, ranks)
        smoothing = self.config.distill.label_smoothing
        if few:
            keys = self.few(learner, start, batch_size, mine)
        else:
            keys = epochs(self.images, batch_size, seed=self.seed, start=start, mine=mine, key=self.key)
        a, mix = self.augment, None
        if a.mixup or a.cutmix:
            mix = Mixup(a.mixup, a.cutmix, label_smoothing=smoothing, num_classes=self.classes)
        stream = read(self.training, keys, collate, run=self.config.run)
        for step, (images, labels, seen) in enumerate(stream, start):
            if mix:
                numpy.random.seed(mixed_seed(self.seed, step, rank, MIX) % 2**32)
                images, targets = mix(images, labels)
            else:
                targets = F.one_hot(labels, self.classes) * (1 - smoothing) + smoothing / self.classes
            if few:
                targets[~torch.isin(torch.tensor([key.image for key in seen]), self.labeled)] = 0
            yield images, targets, torch.tensor([key.row for key in seen]) if self.views else None

    def few(self, learner: str, start: int, batch_size: int, mine: slice) -> Iterator[list[Key]]:
        """Labeled images, then unlabeled ones; a student alone sees the labeled ones of the same batches."""
        self.check_unlabeled()  # of this seed
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

    def check_unlabeled(self) -> None:
        """An error where the share of labels is so near 1 that no image is left without one."""
        if len(self.labeled) == self.images:
            key = "digits.labels" if self.data.name == "digits" else "data.labels"
            raise OptionError(f"{key}: {self.labels} leaves no image without its label; lower it, or give {key}=1")

    def key(self, epoch: int, index: int) -> Key:
        """A new view for every epoch (or step), or one of the fixed ones."""
        if not self.views:
            return Key(index, (self.seed, epoch, index))
        return self.fixed(index, mixed_seed(self.seed, epoch, index) % self.views)

    def fixed(self, index: int, view: int) -> Key:
        return Key(index, (self.seed, index, view, FIXED), view * self.images + index)

    def every_view(self) -> EveryView:
        return EveryView(self)

    def held_out(self, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
        test = self.opened[1]
        mine = map(Key, range(rank, len(test), ranks))
        views = self.seen(test, training=False)
        for images, labels, _ in read(views, mine, collate, run=self.config.run, at_once=AT_ONCE):
            yield images, labels

    def transform(self, *, training: bool) -> Any:
        """Random resized crop, flip, one of grayscale / solarize / blur, color jitter, normalization; or shifts. In
        evaluation the center."""
        a, d = self.augment, self.data
        common: dict[str, Any] = {"interpolation": "bicubic", "mean": d.mean, "std": d.std}
        if not training:
            of_image = create_transform(self.size, is_training=False, crop_pct=d.crop, **common)
        elif a.pad:
            shifted = [transforms.Resize(self.size), transforms.RandomCrop(self.size, padding=a.pad)]
            to_tensor = [transforms.ToTensor(), transforms.Normalize(d.mean, d.std)]
            of_image = transforms.Compose([*shifted, transforms.RandomHorizontalFlip(a.flip), *to_tensor])
        else:
            common |= {"scale": (a.crop_min, 1.0), "hflip": a.flip, "color_jitter": a.color_jitter}
            policy = "3a" if a.three_augment else None
            of_image = create_transform(self.size, is_training=True, auto_augment=policy, **common)
        return partial(transformed, of_image, "RGB" if self.channels == 3 else "L")


class EveryView(Dataset):
    """Every fixed view of every training image, in the order of their rows."""

    def __init__(self, images: Images) -> None:
        self.images, self.training = images, images.training

    def __len__(self) -> int:
        return self.images.views * self.images.images

    def __getitem__(self, row: int) -> Tensor:
        view, index = divmod(row, self.images.images)
        (image, _), _ = self.training[self.images.fixed(index, view)]
        return image


def transformed(of_image: Any, mode: str, sample: tuple[Any, int]) -> tuple[Tensor, int]:
    return of_image(sample[0].convert(mode)), sample[1]


def collate(samples: list[Any]) -> tuple[Tensor, Tensor, list[Key]]:
    pairs, keys = zip(*samples, strict=True)
    images, labels = zip(*pairs, strict=True)
    return torch.stack(images), torch.tensor(labels), list(keys)


def stored_labels(dataset: Any) -> Tensor | None:
    """By either of torchvision's names for them; some data sets hide them."""
    stored = next((getattr(dataset, name) for name in ("targets", "labels") if hasattr(dataset, name)), None)
    return None if stored is None else torch.as_tensor(stored)


def labels_of(dataset: Any) -> Tensor:
    """Of data sets that hide them, item by item."""
    stored = stored_labels(dataset)
    return torch.tensor([label for _, label in dataset]) if stored is None else stored


def share_of_classes(labels: Tensor, classes: int, share: float, draw: torch.Generator) -> Tensor:
    """Row numbers of a random share of every class, at least one of each."""
    order = torch.randperm(len(labels), generator=draw)
    rows = [order[labels[order] == label] for label in range(classes)]
    return torch.cat([of_class[: max(1, round(share * len(of_class)))] for of_class in rows])


def download_lock(root: Path) -> Any:
    """Ranks and worker processes download one after another: the first one, that is, and the others find the files."""
    root.mkdir(parents=True, exist_ok=True)
    return FileLock(root / ".download.lock")


def open_images(data: Source, seed: int, where: str = "data") -> tuple[Any, Any, int]:
    """Training images, held-out images, number of classes of a section `where`; the digits are split by the seed."""
    if data.name == "digits":
        return Digits(seed, training=True), Digits(seed, training=False), len(Digits.classes)
    kind: Any = getattr(torchvision.datasets, data.name, None)
    if data.name != "folder" and not isinstance(kind, type):  # torchvision.datasets.mnist is a module
        known = ["digits", "folder", *torchvision.datasets.__all__]
        raise OptionError(f"{where}.name: there is no {data.name!r} in torchvision.datasets{nearest(data.name, known)}")
    try:
        if data.name == "folder":
            train, test = (ImageFolder(str(Path(data.root) / split)) for split in ("train", "val"))
        else:
            flag = "train" in inspect.signature(kind).parameters
            splits = [{"train": True}, {"train": False}] if flag else [{"split": "train"}, {"split": "test"}]
            with download_lock(Path(data.root)) if data.download else contextlib.nullcontext():
                train, test = (kind(data.root, download=data.download, **split) for split in splits)
    except Exception as error:  # missing or damaged files, no network: as many types as ways to fail
        hint = "" if data.download else f"; {where}.download=true fetches it"
        if data.name == "folder":
            hint = f"; {where}.root=FOLDER with FOLDER/train/<class>/* and FOLDER/val/<class>/* is needed"
        raise RunError(f"{where}.root={data.root} {where}.name={data.name}: {error}{hint}") from error
    names, others = getattr(train, "classes", ()), getattr(test, "classes", ())
    if names != others:
        raise RunError(f"{data.root}: only in one of train and val: {', '.join(sorted({*names} ^ {*others})[:5])}")
    if not (classes := len(names) or data.classes):
        raise OptionError(f"{where}.classes: {data.name} does not say how many classes it has; give their number")
    if data.classes not in (0, classes):
        raise RunError(f"{where}.classes is {data.classes}, but {data.root} has {classes} classes")
    for labels in () if names else map(stored_labels, (train, test)):
        if labels is not None and (needed := int(labels.max()) + 1) > classes:
            raise OptionError(f"{where}.classes: {classes}, but there are labels up to {needed - 1}; give {needed}")
    return train, test, classes
