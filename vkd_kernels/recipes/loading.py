"""Batches of a data set, read by worker processes; each depends on (seed, step) alone, as a resumed run needs it."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from .config import OptionError
from .runs import RunError
from .task import Run, generator, seed_all


class Key(NamedTuple):
    image: int  # its number
    seed: tuple[int, ...] = ()  # of its view; none: nothing is drawn
    row: int = 0  # among all fixed views


class Views(Dataset):
    """`transform(data[key.image])` and the key. Transforms may draw from `random`, NumPy and PyTorch: all seeded."""

    def __init__(self, data: Any, transform: Callable[[Any], Any]) -> None:
        self.data, self.transform = data, transform

    def __getitem__(self, key: Key) -> tuple[Any, Key]:
        try:
            sample = self.data[key.image]
        except Exception as error:  # of damaged files: as many types as libraries that read them
            files = getattr(self.data, "samples", None)
            name = files[key.image][0] if files else f"image {key.image}"
            raise RunError(f"cannot read {name} ({error}): repair it or leave it out of the data") from error
        if key.seed:
            seed_all(*key.seed)
        return self.transform(sample), key


def read(
    views: Views, keys: Iterable[Any], collate: Callable[[list[Any]], Any], *, run: Run, at_once: int = 0
) -> Iterator[Any]:
    """Batches of `collate([(sample, key), ...])`: of lists of keys, or of `at_once` keys each."""
    loader = DataLoader(
        views,
        batch_sampler=BatchSampler(keys, at_once, drop_last=False) if at_once else keys,  # type: ignore[arg-type]
        num_workers=run.workers,
        collate_fn=collate,
        worker_init_fn=_start_reading,
        pin_memory=run.accelerator != "cpu" and torch.cuda.is_available(),
    )
    yield from loader


def _start_reading(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which needs its next batch
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def epochs(
    size: int, batch_size: int, *, seed: int, start: int, mine: slice, key: Callable[[int, int], Key]
) -> Iterator[list[Key]]:
    """Lists of keys, without end, from the step `start` on: every epoch is a permutation by (seed, epoch), less the
    images that fill no batch; of each batch this rank's share. `key(epoch, image)` names a view."""
    if size < batch_size:
        few = f"{batch_size}, but there are only {size} training images"
        raise OptionError(f"optim.batch_size: {few} (of a teacher, teacher.batch_size)")
    per_epoch = size // batch_size
    first, place = divmod(start, per_epoch)
    for epoch in itertools.count(first):
        order = torch.randperm(size, generator=generator(seed, epoch)).tolist()
        for number in range(place if epoch == first else 0, per_epoch):
            rows = order[number * batch_size : (number + 1) * batch_size]
            yield [key(epoch, row) for row in rows[mine]]
