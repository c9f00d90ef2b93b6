"""What a store says of itself: which features of which weights, in how many shards.

<folder>/store.json                 the manifest
<folder>/probe.safetensors          the teacher's input and features of a few samples
<folder>/shard-00000.safetensors    features of the samples 0, 1, ..., one tensor per tap
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import _version
from ..files import partial_files, whole_file
from ..pairs import Pair
from .functions import function_text

FORMAT = "vkd_kernels feature store 1"
MANIFEST, PROBE = "store.json", "probe.safetensors"
OWN_FILE = re.compile(r"(store\.json|probe\.safetensors|shard-\d{5,}\.safetensors)(\.partial-.*)?")
SKIPPING_POOLS = ("mean_tokens", "tokens")


@dataclasses.dataclass(frozen=True)
class StoredTap:
    """Which features: the teacher's side of a ``Pair``, and the shape of one sample's."""

    module: str
    pool: str | None  # a function by its name and the values that it is bound to
    skip: int
    output: int | str | tuple | None
    shape: tuple[int, ...] = ()
    call: int | None = None
    layout: str = "NCHW"

    @classmethod
    def of(cls, pair: Pair) -> "StoredTap":
        pool = pair.teacher_pool
        if callable(pool):
            pool = f"function {function_text(pool)}"
        skip = pair.teacher_skip if pool in SKIPPING_POOLS else 0
        return cls(
            module=pair.teacher,
            pool=pool,
            skip=skip,
            output=pair.teacher_output,
            call=pair.teacher_call,
            layout=pair.teacher_layout,
        )

    @property
    def is_output(self) -> bool:
        """Whether it is what the model returned, position by position: a pool would have made something else of it."""
        return self.module == "" and (self.pool is None or (self.pool == "tokens" and self.skip == 0))

    def same_as(self, other: "StoredTap") -> bool:
        return dataclasses.replace(self, shape=()) == dataclasses.replace(other, shape=())

    def __str__(self) -> str:
        options = {"teacher_pool": self.pool, "teacher_skip": self.skip or None, "teacher_output": self.output}
        options |= {"teacher_call": self.call, "teacher_layout": None if self.layout == "NCHW" else self.layout}
        shown = [f"{name}={value!r}" for name, value in options.items() if value is not None]
        return " with ".join([repr(self.module), *([", ".join(shown)] if shown else [])])


@dataclasses.dataclass(frozen=True)
class Manifest:
    samples: int
    shard_samples: int  # in every shard but the last
    dtype: str
    taps: dict[str, StoredTap]
    teacher: str  # its class
    weights: str  # their fingerprint
    transform: str
    data: str = ""  # a hash of the file PROBE; stores of earlier versions have none

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_samples)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def sample_bytes(self) -> int:
        return sum(torch.Size(tap.shape).numel() for tap in self.taps.values()) * self.torch_dtype.itemsize

    def rows_of(self, shard: int) -> range:
        start = shard * self.shard_samples
        return range(start, min(start + self.shard_samples, self.samples))

    def differences(self, other: "Manifest") -> list[str]:
        """What another store was built from, field by field; shards may be of any size, and this one may hold more."""
        differences = []
        for field in ("samples", "dtype", "teacher", "weights", "transform"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                differences.append(f"{field}: {mine} there, {theirs} now")
        if any(tap not in self.taps.values() for tap in other.taps.values()):
            mine, theirs = ("; ".join(f"{tap} {tap.shape}" for tap in store.taps.values()) for store in (self, other))
            differences.append(f"taps: {mine} there, {theirs} now")
        return differences

    def identity(self) -> str:
        """In every shard: one that was copied in from another store is noticed."""
        fields = dataclasses.asdict(self)
        if not self.data:
            del fields["data"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Unless another job has been first, whose manifest is to be loaded."""
        content = {"format": FORMAT, **dataclasses.asdict(self), "vkd_kernels": _version.__version__}
        with writing(folder / MANIFEST, replace=False) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder} holds no feature store: FeatureStore.build makes one") from None
        except OSError as error:  # of the disk or the rights, not of what the file holds
            raise OSError(error.errno, f"cannot read {path} ({error.strerror or error})") from error
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete the folder and build the store again") from error
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not of the format {FORMAT!r}: delete the folder and build the store again")
        content = {"data": "", **content}
        fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
        taps = {
            key: StoredTap(**{**tap, "shape": tuple(tap["shape"]), "output": _path(tap["output"])})
            for key, tap in fields["taps"].items()
        }
        return cls(**{**fields, "taps": taps})


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    present = {path.name for path in folder.iterdir()}
    return [shard for shard in range(manifest.shards) if shard_path(folder, shard).name not in present]


def signs_of_work(folder: Path) -> dict[str, int]:
    """When each shard that is being built, here or by others, was touched last: builders do so for every batch."""
    times = {}
    for path in partial_files(folder):
        with contextlib.suppress(FileNotFoundError):  # it was completed meanwhile
            times[path.name] = path.stat().st_mtime_ns
    return times


def _path(output: int | str | list | None) -> int | str | tuple | None:
    """A path of entries, which JSON has as a list."""
    return tuple(output) if isinstance(output, list) else output


def tap_keys(taps: list[StoredTap]) -> list[str]:
    """The name of each among the features: its module's, with the options where a module is tapped twice."""
    modules = [tap.module for tap in taps]
    return [tap.module if modules.count(tap.module) == 1 else str(tap) for tap in taps]


@contextlib.contextmanager
def writing(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A whole file of the store, or an error that says what to do."""
    try:
        with whole_file(path, replace=replace) as partial:
            yield partial
    except OSError as error:
        reason = error.strerror or error
        remedy = "finished shards are kept: build it again with the same arguments to continue"
        raise OSError(error.errno, f"cannot write {path} ({reason}); {remedy}") from error


def transform_text(data: Any) -> str:
    """What a data set says of its transform, without addresses in memory."""
    while data is not None:
        transform = getattr(data, "transform", None)
        if transform is not None:
            return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform))
        data = getattr(data, "dataset", None)
    return ""
