"""``FeatureStore``: reads a teacher's stored features by the index of the sample."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from ..ops import checks
from ..pairs import Pair
from .build import build
from .functions import function_text, same_function
from .manifest import Manifest, StoredTap, missing_shards, shard_path
from .options import Options
from .teacher import teacher_taps

MOST_MAPS = 128  # shards mapped at once: each holds a file open, of which macOS allows a process 256 and Linux 1024


class FeatureStore:
    """A frozen teacher's features of every sample of a data set, on disk: computed once, read at every step.

    ``build`` computes what is missing and opens the store; ``FeatureStore(folder)`` opens a complete one. Files are
    safetensors, mapped into memory as they are read, in every process for itself: a store can be pickled, and workers
    of a ``DataLoader`` read it. ``FeatureDistiller`` takes one in place of the teacher.

    Args:
        folder: where ``build`` has put the store.

    Attributes:
        taps: what is stored, by name: the module's, with its options where a module is tapped more than once.
        dtype: of the features.
        folder: where it is.

    Shape:
        ``store[indices]`` with a tensor, a list or a slice of N sample indices, in any order, also repeated ->
        ``{name: features (N, ...)}``; with one int ``{name: features (...)}``, as a ``Dataset`` gives it.

    Raises:
        FileNotFoundError: there is no store, or a file of it is gone.
        ValueError: the store is incomplete or damaged; the message says what to do.

    Example:
        >>> import tempfile, torch, vkd_kernels as vk
        >>> teacher, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 32)), torch.randn(10, 3, 4, 4)
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = vk.FeatureStore.build(folder.name, teacher, images, ["1"], progress=False)
        >>> store[[7, 0, 7]]["1"].shape, store.dtype
        (torch.Size([3, 32]), torch.float16)
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).absolute()  # also after os.chdir, as Hydra calls it
        self._manifest = Manifest.load(self.folder)
        missing = missing_shards(self.folder, self._manifest)
        if missing:
            raise ValueError(
                f"the store in {self.folder} is incomplete: of {self._manifest.shards} shards {len(missing)} are "
                f"missing (the first is {shard_path(self.folder, missing[0]).name}); FeatureStore.build with the same "
                "arguments continues"
            )
        self._maps: dict[int, dict[str, numpy.ndarray]] = {}
        self._built: dict[str, Pair] = {}  # by this process, by key

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike,
        teacher: nn.Module,
        data: Any,
        taps: Sequence[str | Mapping[str, Any] | Pair],
        *,
        dtype: torch.dtype = torch.float16,
        teacher_input: Callable[[Any], Any] | None = None,
        mask: Callable[[Any], torch.Tensor] | None = None,
        transform: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        shard_samples: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        progress: bool = True,
    ) -> "FeatureStore":
        """Computes what the folder does not hold yet, and opens the store.

        The first, the middle and the last sample are computed every time: that their inputs and features are those of
        the store, up to 5 %, is what tells other data or another pool. No other sample is compared.

        Every rank of torchrun writes its share of the shards and returns when all are there. Interrupted or killed,
        the same call continues: a shard that has its name is complete. The teacher runs in eval mode, without
        gradients, on its own device and in its own dtype, under the caller's autocast.

        Args:
            folder: new, empty, or a store begun with the same arguments, on a disk that all ranks see; nothing else is
                touched. A finished store may hold more taps.
            teacher: any module, whole on every rank.
            data: a map-style ``Dataset`` (or anything with ``len`` and ``[index]``), or a ``DataLoader`` over one,
                in batches and without shuffling. A sample must be the same at every visit: see ``FixedViews`` for
                augmentation.
            taps: names of modules, dicts with the teacher's fields of ``Pair``, or the ``pairs`` of a
                ``FeatureDistiller`` themselves. ``{"teacher": ""}`` stores the model's output, for the logit loss. A
                function is known by its name and the numbers and strings that it is bound to, not by its code.
            dtype: float16, bfloat16, float32 or float64.
            teacher_input: from a batch to the teacher's input, as in ``FeatureDistiller``. By default a tensor is the
                input, of a tuple or list its first entry is, and a dict gives keyword arguments.
            mask: from a batch to the mask ``(N, tokens)`` or ``(N, H, W)`` of what means are taken over.
            transform: what is done to the data, in words; by default what ``data.transform`` says of itself.
            batch_size, num_workers: of reading ``data``; a loader has its own.
            shard_samples: by default what fits in 256 MiB, at most 8192, and no more than a rank's share.
            rank, world_size: whose share; by default as torch.distributed or torchrun say, and every rank must call it.
                ``rank=0, world_size=1`` where only one process does.
            progress: sizes before the start, then speed and the time left, on standard error.

        Raises:
            FileExistsError: the folder holds other files and no store.
            ValueError: the store there is of another class of teacher, other weights, taps, dtype, transform or number
                of samples, or its three samples differ; functions of two taps can't be told apart by name; features are
                not finite.
            OSError: the disk has not enough room for the store, said before the start.
            TimeoutError: shards of other ranks are missing, and nobody has worked on one for 30 minutes.
        """
        options = Options(
            dtype=dtype,
            teacher_input=teacher_input,
            mask=mask,
            transform=transform,
            batch_size=batch_size,
            num_workers=num_workers,
            shard_samples=shard_samples,
            rank=rank,
            world_size=world_size,
            progress=progress,
        )
        folder = Path(folder).absolute()
        pairs = teacher_taps(taps)
        build(folder, teacher, data, pairs, options)
        store = cls(folder)
        store._built = {store.key_of(pair): pair for pair in pairs}
        return store

    @property
    def taps(self) -> dict[str, StoredTap]:
        return dict(self._manifest.taps)

    @property
    def dtype(self) -> torch.dtype:
        return self._manifest.torch_dtype

    def __len__(self) -> int:
        return self._manifest.samples

    def __getitem__(self, indices: Any) -> dict[str, torch.Tensor]:
        if isinstance(indices, slice):
            return self._read(numpy.arange(*indices.indices(len(self))))
        array = indices.cpu().numpy() if isinstance(indices, torch.Tensor) else numpy.asarray(indices)
        if array.ndim > 1 or (array.dtype.kind not in "iu" and array.size):
            raise TypeError(
                f"indices must be an int, a slice, or a list or tensor (N,) of ints; got {checks.describe(indices)}"
            )
        outside = (array < 0) | (array >= len(self))
        if outside.any():
            raise IndexError(f"index {array[outside].flat[0]} is not in the store's {len(self)} samples")
        features = self._read(array.reshape(-1).astype(numpy.int64))
        return features if array.ndim else {key: rows[0] for key, rows in features.items()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """The samples of a batch, one by one: how ``DataLoader`` asks."""
        features = self[indices]
        return [{key: rows[i] for key, rows in features.items()} for i in range(len(indices))]

    def key_of(self, pair: Pair) -> str:
        """The name of the features that a pair's teacher side asks for."""
        wanted = StoredTap.of(pair)
        for key, tap in self._manifest.taps.items():
            if tap.same_as(wanted):
                self._check_function(key, pair)
                return key
        stored = "; ".join(map(str, self._manifest.taps.values()))
        raise ValueError(
            f"pair {pair.name!r}: the store in {self.folder} has no features of teacher module {wanted}; it has "
            f"{stored}. Build another store with this pair among the taps"
        )

    def _check_function(self, key: str, pair: Pair) -> None:
        """An error if the pair's function is another one than that of the build, though of the same name."""
        pool = pair.teacher_pool
        if callable(pool) and key in self._built and not same_function(pool, self._built[key].teacher_pool):
            raise ValueError(
                f"pair {pair.name!r}: its teacher_pool {function_text(pool)!r} has the name of the function that the "
                f"store in {self.folder} was built with, but is another one: call FeatureStore.build again with this "
                "pair among the taps, which compares the features of a few samples"
            )

    def _read(self, indices: numpy.ndarray) -> dict[str, torch.Tensor]:  # (N,)
        features = {
            key: torch.empty((len(indices), *tap.shape), dtype=self.dtype) for key, tap in self._manifest.taps.items()
        }
        shards, rows = numpy.divmod(indices, self._manifest.shard_samples)
        for shard in numpy.unique(shards).tolist():
            chosen = numpy.flatnonzero(shards == shard)
            maps = self._map(shard)
            for key, tensor in features.items():
                values = tensor.reshape(len(indices), math.prod(tensor.shape[1:])).view(torch.uint8).numpy()
                values[chosen] = maps[key][rows[chosen]]
        return features

    def _map(self, shard: int) -> dict[str, numpy.ndarray]:
        """The bytes (samples, bytes of one) of every tap in a shard, mapped when first asked for."""
        maps = self._maps.get(shard)
        if maps is None:
            path, manifest = shard_path(self.folder, shard), self._manifest
            try:
                maps = _mapped(path, manifest, len(manifest.rows_of(shard)))
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{path} is gone since the store was opened: FeatureStore.build with the same arguments computes "
                    "it again"
                ) from error
            except OSError as error:  # of the disk or the rights, not of what the file holds
                raise OSError(error.errno, f"cannot read {path} ({error.strerror or error})") from error
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}): delete this file; FeatureStore.build with the same arguments "
                    "computes it again"
                ) from error
            while len(self._maps) >= MOST_MAPS:
                self._maps.pop(next(iter(self._maps)), None)  # the oldest
            self._maps[shard] = maps
        return maps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_built": {}}

    def __repr__(self) -> str:
        taps = ", ".join(f"{key!r} {tuple(tap.shape)}" for key, tap in self._manifest.taps.items())
        return f"FeatureStore({str(self.folder)!r}: {len(self)} samples of {taps} in {self._manifest.dtype})"


def _mapped(path: Path, manifest: Manifest, samples: int) -> dict[str, numpy.ndarray]:
    # A safetensors file: the length of the header (8 bytes), the header in JSON, the values.
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is not whole")
        header = json.loads(file.read(length))
    if header.get("__metadata__", {}).get("store") != manifest.identity():
        raise ValueError("it belongs to another store")
    values = numpy.memmap(path, numpy.uint8, mode="r", offset=8 + length)
    maps = {}
    for key, tap in manifest.taps.items():
        begin, end = header[key]["data_offsets"]
        size = math.prod(tap.shape) * manifest.torch_dtype.itemsize
        maps[key] = numpy.asarray(values[begin:end]).reshape(samples, size)
    return maps
