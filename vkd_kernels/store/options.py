"""The keyword arguments of ``FeatureStore.build``, checked."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..ops import checks


@dataclasses.dataclass(frozen=True)
class Options:
    """The keyword arguments of ``FeatureStore.build``."""

    dtype: torch.dtype = torch.float16
    teacher_input: Callable[[Any], Any] | None = None
    mask: Callable[[Any], torch.Tensor] | None = None
    transform: str | None = None
    batch_size: int = 64
    num_workers: int = 0
    shard_samples: int | None = None
    rank: int | None = None
    world_size: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in checks.FLOATING:
            names = ", ".join(str(dtype) for dtype in checks.FLOATING)
            raise ValueError(f"dtype must be one of {names}; got {self.dtype!r}")
        for name in ("teacher_input", "mask"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function of a batch; got {checks.describe(getattr(self, name))}")
        checks.check_dim("batch_size", self.batch_size)
        if isinstance(self.num_workers, bool) or not isinstance(self.num_workers, int) or self.num_workers < 0:
            raise ValueError(f"num_workers must be an int of at least 0; got {self.num_workers!r}")
        if self.shard_samples is not None:
            checks.check_dim("shard_samples", self.shard_samples)
        if (self.rank is None) != (self.world_size is None):
            raise ValueError(f"rank and world_size go together; got {self.rank!r} and {self.world_size!r}")

    def share(self) -> tuple[int, int]:
        """(rank, ranks), as given, or as torch.distributed or the environment of torchrun say."""
        if self.rank is not None and self.world_size is not None:
            rank, ranks = self.rank, self.world_size
        elif dist.is_available() and dist.is_initialized():
            rank, ranks = dist.get_rank(), dist.get_world_size()
        else:
            of_torchrun = os.environ if "RANK" in os.environ else {}
            rank, ranks = int(of_torchrun.get("RANK", 0)), int(of_torchrun.get("WORLD_SIZE", 1))
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be in [0, world_size); got rank {rank} of {ranks}")
        return rank, ranks
