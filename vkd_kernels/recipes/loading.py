"""Batches of a data set, read by worker processes; each depends on (seed, step) alone, as a resumed run needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from . import engine
from .config import OptionError
from .devices import Fabric


def batches(
    dataset: Dataset, fabric: Fabric, *, batch_size: int, seed: int, start: int = 0, workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Iterator[Any]:  # fmt: skip
    """This rank's share of the batches start, start + 1, ..., on its device, for `Training.batches`.

    Every epoch is a permutation by (seed, epoch), less the images that fill no batch. `random`, NumPy and PyTorch are
    seeded with (seed, epoch, index) before an item is read, so augmentation may use them, in whatever worker.

    Args:
        dataset: with `len` and integer indices.
        batch_size: of all ranks together.
        workers: processes of this rank that read.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if size < batch_size:
        raise OptionError(f"optim.batch_size: {batch_size}, but there are only {size} training images")
    order = _Order(size, batch_size, seed, start, fabric.global_rank, fabric.world_size)
    loader = DataLoader(
        _Seeded(dataset, seed), batch_sampler=order, num_workers=workers, collate_fn=collate,
        pin_memory=fabric.device.type == "cuda", multiprocessing_context="spawn" if workers else None,
    )  # fmt: skip
    for batch in loader:
        yield fabric.to_device(batch)


class _Order:
    """Lists of (epoch, index), for ever."""

    def __init__(self, size: int, batch_size: int, seed: int, start: int, rank: int, ranks: int) -> None:
        self.size, self.batch_size, self.seed, self.start, self.rank, self.ranks = (
            size, batch_size, seed, start, rank, ranks,
        )  # fmt: skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.size // self.batch_size
        epoch, place = divmod(self.start, per_epoch)
        while True:
            order = torch.randperm(self.size, generator=engine.generator(self.seed, epoch)).tolist()
            for number in range(place, per_epoch):
                rows = order[number * self.batch_size : (number + 1) * self.batch_size]
                yield [(epoch, row) for row in rows[self.rank :: self.ranks]]
            epoch, place = epoch + 1, 0


class _Seeded(Dataset):
    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, item: tuple[int, int]) -> Any:
        epoch, index = item
        engine.seed_all(self.seed, epoch, index)
        return self.dataset[index]
