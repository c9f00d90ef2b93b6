"""Targets with statistics of their own: ``Standardization`` and ``Whitening``, of a batch, running or frozen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed import ProcessGroup
from typing_extensions import Self

from .. import checks
from ..float64 import KeepsDtypes, as_float64, has_float64
from ..implementations import no_autocast
from ..tracing import is_recomputation
from . import reference
from .all_reduce import HasProcessGroup
from .api import METHODS, flat_rows, whiten

FROZEN = 127  # an integer, as averages of models subtract buffers, and so large that one rounded towards 0 keeps it


class RunningStatistics(HasProcessGroup, KeepsDtypes):
    """What both modules share: statistics over the rows in float64, whatever the module is cast to.

    With ``momentum`` a cumulative average until ``1 / momentum`` batches have been seen, an exponential one afterwards.
    The spread of the batches' means counts as variance, so that batches of one size pool to the (biased) variance of
    all their rows.
    """

    running_mean: torch.Tensor  # (C,), float64; there with momentum alone, as the others
    batches_seen: torch.Tensor  # ()
    frozen: torch.Tensor  # (), int8; not 0: frozen
    spread_name: str  # the name of the buffer of variances (C,) or covariances (C, C)
    _ranks_agree = False  # on what is frozen

    def __init__(
        self, num_features: int, momentum: float | None, process_group: ProcessGroup | None, spread: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.num_features, self.momentum = num_features, momentum
        self._set_group(process_group)
        self.is_frozen = False
        if spread is not None:
            self.register_buffer("running_mean", torch.zeros(num_features, dtype=torch.float64))
            self.register_buffer(self.spread_name, spread)
            self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))
            self.register_buffer("frozen", torch.zeros((), dtype=torch.int8))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets what has been seen, and thaws: also in transformers' ``_init_weights``."""
        if self.momentum is None or self.batches_seen.is_meta:
            return
        nn.init.zeros_(self.running_mean)
        spread = getattr(self, self.spread_name)
        nn.init.ones_(spread) if spread.dim() == 1 else nn.init.eye_(spread)
        nn.init.zeros_(self.batches_seen)
        nn.init.zeros_(self.frozen)
        self.is_frozen = False

    def freeze(self) -> Self:
        """From now on the statistics stay as they are, in training mode too; ``state_dict()`` says so.

        With a process group every rank must freeze, as all of them add up their rows until then.
        """
        if self.momentum is None:
            raise RuntimeError("freeze() needs running statistics: build the module with momentum, 0.1 say")
        self.frozen.fill_(FROZEN)
        self.is_frozen = True
        return self

    def rows_of(
        self,
        features: torch.Tensor,  # (..., C)
        mask: torch.Tensor | None,  # (...)
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # (N, C), (N,)
        rows, row_weight = flat_rows("features", features, mask, self.process_group)
        if features.shape[-1] != self.num_features:
            raise ValueError(f"features must have {self.num_features} channels; got the shape {tuple(features.shape)}")
        if self.momentum is not None and has_float64(rows.device):
            checks.check_same_device("features", rows, "the running statistics", self.running_mean)
        return rows, row_weight

    @property
    def group(self) -> ProcessGroup | None:
        """The process group; in eval mode, where one rank may be alone, none."""
        return self.process_group if self.training else None

    @property
    def updates(self) -> bool:
        if self.training and self.process_group is not None:
            self._agree()
        return self.training and not self.is_frozen and not is_recomputation()

    def _agree(self) -> None:
        """The first step reads the buffer, into which DDP has copied the first rank's: one rank may have loaded alone.

        Not every step, because reading waits for the GPU, and DDP writes its buffers before each. From then on, and in
        a compiled graph, every rank loads and freezes for itself.
        """
        if not (torch.compiler.is_compiling() or self._ranks_agree) and checks.can_be_read(self.frozen):
            self.is_frozen = bool(self.frozen.item())
            self._ranks_agree = True

    def update(
        self,
        mean: torch.Tensor,  # (C,)
        spread: torch.Tensor,  # (C,) or (C, C)
        count: torch.Tensor,  # (), Σ of the rows' weights
    ) -> None:
        """A batch that is all masked and one with a value that is not finite leave the statistics as they were."""
        running_spread = getattr(self, self.spread_name)
        mean, spread = (as_float64(x).to(running_spread.device) for x in (mean, spread))
        usable = (count > 0).to(running_spread.device) & mean.isfinite().all() & spread.isfinite().all()
        counted = usable & (self.frozen == 0)
        mean, spread = (torch.where(usable, x, 0.0) for x in (mean, spread))
        share = (1 / (as_float64(self.batches_seen) + 1)).clamp_min(self.momentum or 0.0) * counted
        delta = mean - self.running_mean
        between = delta.square() if spread.dim() == 1 else torch.outer(delta, delta)
        mixed = torch.lerp(running_spread, spread, share) + share * (1 - share) * between
        first = (self.batches_seen == 0) & counted
        running_spread.copy_(torch.where(first, spread, mixed))
        self.running_mean.copy_(torch.where(first, mean, self.running_mean + share * delta))
        self.batches_seen.add_(counted)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """``to_empty()`` from the meta device starts the statistics anew: they would be what the memory held."""
        was_meta = self.momentum is not None and self.batches_seen.is_meta
        super()._apply(fn, recurse)
        if was_meta:
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if self.momentum is not None and f"{prefix}batches_seen" in state_dict:
            state_dict.setdefault(f"{prefix}frozen", torch.tensor(False))  # commits before 0.1 could not freeze
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if self.momentum is not None and not self.frozen.is_meta:
            self.is_frozen = bool(self.frozen.item())
            self._ranks_agree = False

    def _set_group(self, group: ProcessGroup | None) -> None:
        super()._set_group(group)
        self._ranks_agree = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ranks_agree": False}


class Decomposed(NamedTuple):
    covariance: torch.Tensor  # (C, C), a copy: not every change in place is counted, those of DDP's buffers are not
    settings: tuple[str, float]  # method, eps
    matrix: torch.Tensor  # (C, C), that whitens

    def is_of(self, covariance: torch.Tensor, settings: tuple[str, float]) -> bool:
        mine = self.covariance
        return self.settings == settings and mine.device == covariance.device and torch.equal(mine, covariance)


class Whitening(RunningStatistics):
    r"""Whitens features by the statistics of the batch or, with ``momentum``, by running ones.

    A batch with fewer rows than channels has a singular covariance; running statistics pool several batches. With
    ``momentum`` they are updated in training mode, then used, in training and in eval mode alike: a cumulative average
    until ``1 / momentum`` batches have been seen, an exponential one afterwards. Before the first update they are mean
    0 and covariance I, after ``freeze()`` they stay. ``OrthoProjLoss`` and ``Pair`` take it as ``normalization``.

    Args:
        num_features: C.
        method, eps: as for ``functional.whiten``.
        momentum: ``None`` for batch statistics in both modes, or a number in (0, 1].
        process_group: statistics over the rows of all its ranks, in training mode; ``None``: of this process alone.

    Shape:
        forward(features (..., C), mask (...) or None) -> (..., C), a constant (no gradient).

    Example:
        >>> import torch, vkd_kernels as vk
        >>> whitening = vk.Whitening(8, method="phi_s", momentum=0.1)
        >>> whitening(torch.randn(4, 8)).shape, int(whitening.batches_seen)
        (torch.Size([4, 8]), 1)
    """

    running_covariance: torch.Tensor  # (C, C)
    spread_name = "running_covariance"
    _decomposed: Decomposed | None = None

    def __init__(
        self,
        num_features: int,
        *,
        method: str = "zca",
        eps: float = 1e-3,
        momentum: float | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        checks.check_dim("num_features", num_features)
        checks.check_choice("method", method, METHODS)
        checks.check_number("eps", eps, at_least=0, at_most=1)
        check_momentum(momentum)
        covariance = None if momentum is None else torch.eye(num_features, dtype=torch.float64)
        super().__init__(num_features, momentum, process_group, covariance)
        self.method, self.eps = method, eps

    def matrix(self) -> torch.Tensor:  # (C, C)
        """That of the running covariance. One that no longer changes, frozen or in eval mode, is decomposed once."""
        covariance, settings = self.running_covariance, (self.method, self.eps)
        constant = not (torch.compiler.is_compiling() or self.updates) and checks.can_be_read(covariance)
        if constant and self._decomposed is not None and self._decomposed.is_of(covariance, settings):
            return self._decomposed.matrix
        matrix = reference.whitening_matrix(covariance, method=self.method, eps=self.eps)
        if constant:
            self._decomposed = Decomposed(covariance.clone(), settings, matrix)
        return matrix

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_decomposed": None}  # copies and pickles make their own

    @torch.no_grad()
    def forward(
        self,
        features: torch.Tensor,  # (..., C)
        mask: torch.Tensor | None = None,  # (...)
    ) -> torch.Tensor:  # (..., C)
        rows, row_weight = self.rows_of(features, mask)
        if self.momentum is None:
            return whiten(features, method=self.method, eps=self.eps, mask=mask, process_group=self.group)
        with no_autocast(features.device.type):
            weight = reference.in_float64(row_weight)
            rows = reference.without_masked_rows(as_float64(rows), weight)
            if self.updates:
                mean, covariance = reference.covariance(rows, weight, self.group, biased=True)
                self.update(mean, covariance, reference.sum_of_weights(rows, weight, self.group))
            out = reference.without_masked_rows((rows - self.running_mean) @ self.matrix(), weight)
        return out.to(features.dtype).to(features.device).reshape(features.shape)

    def extra_repr(self) -> str:
        return f"{self.num_features}, method={self.method!r}, eps={self.eps}, momentum={self.momentum}"


class Standardization(RunningStatistics):
    r"""Standardizes features by the statistics of the batch or, with ``momentum``, by running ones.

    ::

        (x - mean) / sqrt(variance + eps)      per channel, or with the mean of all channels' variances if isotropic

    The teacher's side only: ``normalization="batch_norm"`` standardizes the student's projection, too. With
    ``momentum`` the statistics are updated in training mode, then used, in training and in eval mode alike, as UNIC and
    DUNE do: a cumulative average until ``1 / momentum`` batches have been seen, an exponential one afterwards. Before
    the first update they are mean 0 and variance 1, after ``freeze()`` they stay. ``OrthoProjLoss`` and ``Pair`` take
    it as ``normalization``.

    Args:
        num_features: C.
        momentum: ``None`` for batch statistics in both modes, or a number in (0, 1].
        isotropic: one scale for all channels, which keeps the ratios of distances between features.
        eps: added to the (biased) variance.
        process_group: statistics over the rows of all its ranks, in training mode; ``None``: of this process alone.

    Shape:
        forward(features (..., C), mask (...) or None) -> (..., C), a constant (no gradient).

    Example:
        >>> import torch, vkd_kernels as vk
        >>> loss = vk.OrthoProjLoss(64, 96, normalization=vk.Standardization(96, momentum=0.1))
        >>> bool(loss(torch.randn(32, 64), 7 + torch.randn(32, 96)) < 1)
        True
    """

    running_variance: torch.Tensor  # (C,)
    spread_name = "running_variance"

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = None,
        isotropic: bool = False,
        eps: float = 1e-5,
        process_group: ProcessGroup | None = None,
    ) -> None:
        checks.check_dim("num_features", num_features)
        check_momentum(momentum)
        checks.check_number("eps", eps, at_least=0)
        if not isinstance(isotropic, bool):
            raise TypeError(f"isotropic must be True or False; got {checks.describe(isotropic)}")
        variance = None if momentum is None else torch.ones(num_features, dtype=torch.float64)
        super().__init__(num_features, momentum, process_group, variance)
        self.isotropic, self.eps = isotropic, eps

    @torch.no_grad()
    def forward(
        self,
        features: torch.Tensor,  # (..., C)
        mask: torch.Tensor | None = None,  # (...)
    ) -> torch.Tensor:  # (..., C)
        rows, row_weight = self.rows_of(features, mask)
        with no_autocast(features.device.type):
            rows = reference.without_masked_rows(rows, row_weight)
            if self.momentum is None:
                mean, variance, _ = reference.mean_and_variance(rows, row_weight, self.group)
                scale = self.inverse_deviation(variance)
            else:
                if self.updates:
                    self.update(*reference.mean_and_variance(rows, row_weight, self.group))
                mean = self.running_mean
                scale = self.inverse_deviation(self.running_variance)
            scale = scale.to(rows.dtype).to(rows.device)
            out = reference.without_masked_rows(reference.centered(rows, mean) * scale, row_weight)
        return out.to(features.dtype).reshape(features.shape)

    def inverse_deviation(self, variance: torch.Tensor) -> torch.Tensor:  # (C,) -> (C,) or ()
        return torch.rsqrt((variance.mean() if self.isotropic else variance) + self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}, isotropic={self.isotropic}, eps={self.eps}"


def check_momentum(momentum: float | None) -> None:
    if momentum is not None:
        checks.check_number("momentum", momentum, above=0, at_most=1)
