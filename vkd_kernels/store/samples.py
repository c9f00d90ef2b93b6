"""The data while a store is built, by index; and augmentations that are the same at every visit."""

import dataclasses
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, default_collate

from ..ops import checks
from .manifest import Manifest, transform_text
from .options import Options


@dataclasses.dataclass(frozen=True)
class Samples:
    """A data set by index, and how its samples become batches."""

    dataset: Any
    count: int
    loader_options: dict[str, Any]
    batch_size: int
    transform: str

    @classmethod
    def of(cls, data: Any, options: Options) -> "Samples":
        if isinstance(data, DataLoader):
            in_order = type(data.sampler) is SequentialSampler
            if not in_order or not isinstance(data.batch_sampler, (BatchSampler, type(None))):
                raise ValueError(
                    "data: features are stored by the index in the data set, so a loader must go through all of it in "
                    f"order (build shares it among the ranks itself); got the sampler {data.sampler!r}"
                )
            if data.batch_sampler is None:
                raise ValueError(
                    "data: a loader with batch_size=None gives no batches, of which features are computed: give it a "
                    "batch_size, or give its data set itself"
                )
            names = ("collate_fn", "num_workers", "worker_init_fn", "multiprocessing_context", "timeout")
            loader_options = {name: getattr(data, name) for name in names}
            dataset, batch_size = data.dataset, data.batch_size or options.batch_size
        else:
            dataset, batch_size = data, options.batch_size
            loader_options = {"collate_fn": default_collate, "num_workers": options.num_workers}
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(dataset, Mapping):
            raise TypeError(
                f"data must have a length and samples by index, as a map-style Dataset has; got {checks.describe(data)}"
            )
        if len(dataset) == 0:
            raise ValueError("data is empty")
        transform = transform_text(dataset) if options.transform is None else options.transform
        if isinstance(dataset, FixedViews):
            transform = f"{transform}, views of seed {dataset.seed}"
        return cls(dataset, len(dataset), loader_options, batch_size, transform)

    @property
    def probed(self) -> list[int]:
        """The samples by which other data or another transform are noticed."""
        return sorted({0, self.count // 2, self.count - 1})

    def batch(self, indices: list[int]) -> Any:
        return self.loader_options["collate_fn"]([self.dataset[index] for index in indices])

    def batches(self, manifest: Manifest, shards: list[int]) -> Iterator[tuple[list[int], Any]]:
        """(indices, batch) through these shards; a batch never spans two."""
        chunks = [
            [*rows[start : start + self.batch_size]]
            for rows in map(manifest.rows_of, shards)
            for start in range(0, len(rows), self.batch_size)
        ]
        if chunks:  # otherwise no workers are started
            loader: Any = DataLoader(
                self.dataset,
                batch_sampler=chunks,
                generator=torch.Generator(),  # workers' seeds would be drawn from the caller's
                **self.loader_options,
            )
            yield from zip(chunks, loader, strict=True)


class FixedViews(Dataset):
    """Several augmented views of every image, the same at every visit: item ``view * len(images) + i`` of image i.

    A teacher's stored features are of one view of an image, which the student must be shown, too. The transform draws
    from ``random``, NumPy and PyTorch's CPU generator, whose states are put back afterwards.

    Args:
        images: a map-style data set without augmentation, of images or of tuples that begin with one.
        transform: the augmentation, from an image to a tensor.
        views: how many of each; the index of the augmentation is ``item // len(images)``.
        seed: another one gives other views.

    Example:
        >>> import torch
        >>> from vkd_kernels.store import FixedViews
        >>> views = FixedViews(torch.zeros(10, 3), lambda image: image + torch.rand(3), views=4)
        >>> len(views), torch.equal(views[23], views[23]), torch.equal(views[3], views[23])
        (40, True, False)
    """

    def __init__(self, images: Any, transform: Callable[[Any], Any], views: int, seed: int = 0):
        checks.check_dim("views", views)
        if operator.index(seed) < 0:
            raise ValueError(f"seed must be at least 0; got {seed}")
        self.images, self.transform, self.views, self.seed = images, transform, views, seed

    def __len__(self) -> int:
        return self.views * len(self.images)

    def __getitem__(self, item: int) -> Any:
        item = operator.index(item)  # of a tensor, too
        if not 0 <= item < len(self):
            raise IndexError(f"view {item} is not among {len(self)}")
        sample = self.images[item % len(self.images)]
        states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        drawn = numpy.random.SeedSequence([self.seed, item]).generate_state(3)
        try:
            random.seed(int(drawn[0]))
            numpy.random.seed(int(drawn[1]))
            torch.default_generator.manual_seed(int(drawn[2]))  # torch.manual_seed would seed every GPU, for good
            if isinstance(sample, (tuple, list)):
                return (self.transform(sample[0]), *sample[1:])
            return self.transform(sample)
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            torch.set_rng_state(states[2])
