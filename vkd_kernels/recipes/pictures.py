"""The images of the generation task, all in memory, and classifiers of them: the bundled teacher, and the judge."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from . import images
from .digits import read_digits
from .gan import Classifier, as_float
from .loading import Key, Views, read
from .runs import RunError
from .task import Context, Optim, Task, generator

SPLIT, CLASSIFIER, AT_ONCE = 0, 1, 250  # the first two: what a draw is for, beside the seed and the step


class Pictures:
    """All images in memory: the pool is for training, of which the GAN sees `data.fraction` of every class (`seen`,
    rows of the pool); generated images are compared with the held-out ones. uint8, or float from -1 to 1."""

    def __init__(self, data: Any, seed: int, shape: Any) -> None:
        if data.name == "digits":
            pictures, labels = read_digits()
            order = torch.randperm(len(labels), generator=generator(seed, SPLIT))
            inside, outside = order[: data.pool], order[data.pool :]
            pictures = pictures * 2 - 1
            self.pool, self.labels, self.held_out = pictures[inside], labels[inside], pictures[outside]
            self.held_out_labels, classes = labels[outside], 10
        else:
            train, test, classes = images.open_images(data)
            (self.pool, self.labels), (self.held_out, self.held_out_labels) = (
                in_memory(x, data) for x in (train, test)
            )
        self.shape = shape(classes)
        order = torch.randperm(len(self.labels), generator=generator(seed, SPLIT, 1))
        rows = [order[self.labels[order] == label] for label in range(classes)]
        if empty := [label for label, of_class in enumerate(rows) if not len(of_class)]:
            raise RunError(f"{data.root}: no image of class number {empty[0]} can be read")
        self.seen = torch.cat([of_class[: max(1, round(data.fraction * len(of_class)))] for of_class in rows])


def in_memory(dataset: Any, data: Any) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) uint8 and labels (N,) of all that can be read, cropped to squares in the middle and resized."""
    to_size = v2.Compose([v2.Resize(data.size), v2.CenterCrop(data.size), v2.PILToTensor()])
    mode = "RGB" if data.channels == 3 else "L"
    views = Views(dataset, partial(images.transformed, to_size, mode))
    parts = [*read(views, map(Key, range(len(dataset))), images.collate, workers=0, at_once=AT_ONCE)]
    if not parts:
        raise RunError(f"{data.root}: no image can be read")
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


class ClassifierTraining(Task):
    """A classifier learns the labels of images: the bundled teacher those of the pool, the judge the held-out ones."""

    def __init__(self, config: Any, context: Context, data: Pictures) -> None:
        t = config.teacher
        optim = Optim(
            lr=t.lr,
            weight_decay=0.05,
            warmup=0.1,
            steps=t.steps,
            batch_size=t.batch_size,
            precision=config.optim.precision,
        )
        run = config.run.model_copy(update={"eval_every": 0, "tensorboard": False})
        super().__init__(config.model_copy(update={"run": run}), context)
        self.optim = optim
        self.data, d = data, data
        pool, held_out = (d.pool, d.labels), (d.held_out, d.held_out_labels)
        judges = context.folder.name == "judge"
        self.learn, self.test = (held_out, pool) if judges else (pool, held_out)

    def make_student(self) -> nn.Module:
        return Classifier(self.config.teacher.widths, self.data.shape)

    def make_model(self, student: nn.Module) -> nn.Module:
        return Labeled(student)

    def batches(self, start: int) -> Iterator[Any]:
        pictures, labels = self.learn
        for step in itertools.count(start):
            draw = generator(self.seed, step, CLASSIFIER)
            rows = torch.randint(len(labels), (self.optim.batch_size,), generator=draw)[self.mine]
            yield self.fabric.to_device((as_float(pictures[rows]), labels[rows]))

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        right = 0
        for part, labels in zip(*(x.split(AT_ONCE) for x in self.test), strict=True):
            right += (student(self.fabric.to_device(as_float(part))).argmax(1).cpu() == labels).sum().item()
        return {"accuracy": 100 * right / len(self.test[1])}


class Labeled(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"total": F.cross_entropy(self.classifier(batch[0]).float(), batch[1], label_smoothing=0.1)}
