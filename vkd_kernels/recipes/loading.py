"""Batches of a data set, read by worker processes; each depends on (seed, step) alone, as a resumed run needs it.

One rule for images that cannot be read: a warning each, the next one takes its place in training, and evaluation goes
without it. So many in a row that it is no accident are an error.
"""

from __future__ import annotations

import signal
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .config import OptionError
from .runs import RunError
from .task import generator, seed_all

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # of bad files
IN_A_ROW = 20


class Key(NamedTuple):
    image: int  # its number
    seed: tuple[int, ...] = ()  # of its view; none: nothing is drawn
    row: int = 0  # among all fixed views


class Views(Dataset):
    """`transform(data[key.image])` and the key. Transforms may draw from `random`, NumPy and PyTorch: all seeded."""

    def __init__(self, data: Any, transform: Callable[[Any], Any], *, size: int, replace: bool) -> None:
        self.data, self.transform, self.size, self.replace = data, transform, size, replace
        self.warned: set[int] = set()

    def __getitem__(self, key: Key) -> tuple[Any, Key] | None:
        for other in range(key.image, key.image + (IN_A_ROW if self.replace else 1)):
            other %= self.size
            try:
                sample = self.data[other]
            except UNREADABLE as error:
                self.warn(other, error)
                continue
            if key.seed:
                seed_all(*key.seed)
            return self.transform(sample), key._replace(image=other)
        if self.replace:
            raise RunError(f"{IN_A_ROW} images in a row cannot be read, the first is {self.name(key.image)}")
        return None

    def warn(self, index: int, error: Exception) -> None:
        if index not in self.warned:
            self.warned.add(index)
            done = "another one takes its place" if self.replace else "left out"
            said = f"{self.name(index)} ({error}): {done}; {len(self.warned)} so far"
            print(f"warning: cannot read {said}", file=sys.stderr)

    def name(self, index: int) -> str:
        files = getattr(self.data, "samples", None)
        return str(files[index][0]) if files else f"image {index}"


def read(views: Views, keys: Any, collate: Callable[[list[Any]], Any], *, workers: int, at_once: int = 0) -> Iterator:
    """Batches of `collate([(sample, key), ...])`: of lists of keys, or of `at_once` keys each."""
    if at_once:
        keys = list(keys)
        keys = [keys[i : i + at_once] for i in range(0, len(keys), at_once)]

    loader = DataLoader(
        views,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_Readable(collate),
        worker_init_fn=_start_reading,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        yield from (batch for batch in loader if batch is not None)
    except RuntimeError as error:  # what a reading process raised comes wrapped
        if isinstance(error.__cause__, RunError):
            raise error.__cause__ from None
        raise


class _Readable:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        good = [sample for sample in samples if sample is not None]
        return self.collate(good) if good else None


def _start_reading(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which needs its next batch
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Epochs:
    """Lists of keys, without end, from the step `start` on: every epoch is a permutation by (seed, epoch), less the
    images that fill no batch; of each batch this rank's share."""

    def __init__(
        self, size: int, batch_size: int, *, seed: int, start: int, mine: slice, key: Callable[[int, int], Key]
    ) -> None:
        if size < batch_size:
            raise OptionError(f"optim.batch_size: {batch_size}, but there are only {size} training images")
        self.size, self.batch_size, self.seed, self.start, self.mine = size, batch_size, seed, start, mine
        self.key = key  # (epoch, index) -> key

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = self.size // self.batch_size
        epoch, place = divmod(self.start, per_epoch)
        while True:
            order = torch.randperm(self.size, generator=generator(self.seed, epoch)).tolist()
            for number in range(place, per_epoch):
                rows = order[number * self.batch_size : (number + 1) * self.batch_size]
                yield [self.key(epoch, row) for row in rows[self.mine]]
            epoch, place = epoch + 1, 0
