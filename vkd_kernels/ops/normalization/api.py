"""Normalisation of features: validates, documents (reference.py is the definition)."""

import torch
from torch import nn

from .. import checks
from . import reference
from .all_reduce import GroupHandle, check_group

METHODS = ("zca", "cholesky", "pca")


def _rows(name: str, features, mask, process_group):
    """Features as 2-D rows in float32 or better, and the rows' weights."""
    checks.check_tensor(name, features)
    check_group(process_group)
    if features.dim() < 2 or features.shape[-1] < 1:
        raise ValueError(
            f"{name} must have the shape (..., C) with at least one row dimension; got {tuple(features.shape)}"
        )
    rows = features.reshape(-1, features.shape[-1])
    if rows.shape[0] == 0 and process_group is None:
        raise ValueError(f"{name} has no rows: its shape is {tuple(features.shape)}")
    dtype = torch.promote_types(features.dtype, torch.float32)
    return rows.to(dtype), checks.row_weights("mask", mask, features.shape[:-1], features, dtype)


def standardize(features: torch.Tensor, *, mask=None, eps: float = 1e-5, process_group=None) -> torch.Tensor:
    r"""Each channel standardised over all rows: ``(x - mean) / sqrt(biased variance + eps)``.

    The normalisation of the paper's detection task; what ``batch_norm`` does without affine or running statistics.

    Args:
        features: ``(..., C)`` float32, float64, bfloat16 or float16; rows are all dimensions but the last.
        mask: ``(...)`` bool, or non-negative float weights. Rows of weight 0 enter no statistic and come out as 0.
        eps: added to the variance.
        process_group: statistics over the rows of all its ranks (as SyncBatchNorm); ``None``: of this process alone.

    Returns:
        ``(..., C)`` of the input's dtype (statistics in float32 or better). Differentiable, statistics included.

    Raises:
        TypeError, ValueError: naming the argument, with what came; ValueError also for no rows.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> out = vk.functional.standardize(3 * torch.randn(2, 50, 8) + 1)
        >>> bool(out.mean((0, 1)).abs().max() < 1e-5), bool((out.var((0, 1), correction=0) - 1).abs().max() < 1e-4)
        (True, True)
    """
    rows, row_weight = _rows("features", features, mask, process_group)
    checks.check_number("eps", eps, at_least=0)
    out = reference.standardize(rows, row_weight, eps=eps, group=process_group)
    return out.to(features.dtype).reshape(features.shape)


def whiten(
    teacher: torch.Tensor, *, method: str = "zca", eps: float = 1e-3, mask=None, process_group=None
) -> torch.Tensor:
    r"""Features centred and decorrelated, float64 inside: the normalisation of the paper's generation task.

    With the covariance Σ of the rows (N - 1 in the denominator) shrunk to ``(1 - eps) Σ + eps (tr Σ / C) I``::

        zca:       (y - μ) Σ^(-1/2)      closest to y
        cholesky:  (y - μ) L⁻ᵀ           Σ = L Lᵀ; the cheapest, and no host synchronisation on a GPU
        pca:       (y - μ) E Λ^(-1/2)    decreasing variance, signs fixed

    Args:
        teacher: ``(..., C)`` float32, float64, bfloat16 or float16; rows are all dimensions but the last.
        method: ``"zca"``, ``"cholesky"`` or ``"pca"``.
        eps: share of the shrinkage target, in [0, 1]. With fewer rows than channels Σ is singular and eps must be > 0.
        mask: ``(...)`` bool, or non-negative float weights. Rows of weight 0 enter no statistic and come out as 0.
        process_group: statistics over the rows of all its ranks; ``None``: of this process alone.

    Returns:
        ``(..., C)`` of the input's dtype, a constant: no gradient flows through it. Rows without any variance whiten
        to 0; NaN or Inf in a counted row makes the result NaN.

    Raises:
        TypeError, ValueError: naming the argument, with what came; ValueError also for no rows.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> out = vk.functional.whiten(torch.randn(500, 8) @ torch.randn(8, 8), eps=0.0)
        >>> torch.allclose(torch.cov(out.T), torch.eye(8), atol=1e-3)
        True
    """
    rows, row_weight = _rows("teacher", teacher, mask, process_group)
    checks.check_choice("method", method, METHODS)
    checks.check_number("eps", eps, at_least=0, at_most=1)
    out = reference.whiten(rows, row_weight, method=method, eps=eps, group=process_group)
    return out.to(teacher.dtype).reshape(teacher.shape)


class Whitening(nn.Module):
    r"""Whitens features by the statistics of the batch or, with ``momentum``, by running ones.

    A batch with fewer rows than channels has a singular covariance; running statistics pool several batches. With
    ``momentum`` the statistics are updated in training mode, then used, in training and in eval mode alike: a
    cumulative average until ``1 / momentum`` batches have been seen, an exponential one afterwards. The spread of the
    batches' means counts as variance, so that batches of one size pool to the (biased) covariance of all their rows.
    Before the first update the map is the identity.

    Args:
        num_features: C.
        method, eps: as for ``functional.whiten``.
        momentum: ``None`` for batch statistics in both modes, or a number in (0, 1].
        process_group: statistics over the rows of all its ranks; ``None``: of this process alone.

    Shape:
        forward(features (..., C), mask (...) or None) -> (..., C), a constant (no gradient).

    Example:
        >>> import torch, vkd_kernels as vk
        >>> whitening = vk.Whitening(8, momentum=0.1)
        >>> whitening(torch.randn(4, 8)).shape, int(whitening.batches_seen)
        (torch.Size([4, 8]), 1)
    """

    running_mean: torch.Tensor  # (C,) float64, as the other statistics; there with momentum alone
    running_covariance: torch.Tensor  # (C, C)
    batches_seen: torch.Tensor  # ()

    def __init__(
        self,
        num_features: int,
        *,
        method: str = "zca",
        eps: float = 1e-3,
        momentum: float | None = None,
        process_group=None,
    ):
        super().__init__()
        checks.check_dim("num_features", num_features)
        checks.check_choice("method", method, METHODS)
        checks.check_number("eps", eps, at_least=0, at_most=1)
        if momentum is not None:
            checks.check_number("momentum", momentum, above=0, at_most=1)
        self.num_features, self.method, self.eps, self.momentum = num_features, method, eps, momentum
        self.process_group = GroupHandle(process_group)
        if momentum is not None:
            self.register_buffer("running_mean", torch.zeros(num_features, dtype=torch.float64))
            self.register_buffer("running_covariance", torch.eye(num_features, dtype=torch.float64))
            self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, features: torch.Tensor, mask=None) -> torch.Tensor:
        checks.check_tensor("features", features)
        if features.dim() and features.shape[-1] != self.num_features:
            raise ValueError(f"features must have {self.num_features} channels; got the shape {tuple(features.shape)}")
        if self.momentum is None:
            return whiten(features, method=self.method, eps=self.eps, mask=mask, process_group=self.process_group.group)
        rows, row_weight = _rows("features", features, mask, self.process_group.group)
        rows = reference.without_masked_rows(rows, row_weight).double()
        if self.training:
            self._update(rows, None if row_weight is None else row_weight.double())
        matrix = reference.whitening_matrix(self.running_covariance, method=self.method, eps=self.eps)
        out = reference.without_masked_rows((rows - self.running_mean) @ matrix, row_weight)
        return out.to(features.dtype).reshape(features.shape)

    def _update(self, rows: torch.Tensor, row_weight) -> None:
        group = self.process_group.group
        mean, covariance = reference.covariance(rows, row_weight, group, biased=True)
        counted = reference.sum_of_weights(rows, row_weight, group) > 0  # a batch that is all masked changes nothing
        share = (1.0 / (self.batches_seen + 1.0)).clamp_min(self.momentum or 0.0).to(mean.dtype) * counted
        first = (self.batches_seen == 0) & counted
        delta = mean - self.running_mean
        mixed = torch.lerp(self.running_covariance, covariance, share) + share * (1 - share) * torch.outer(delta, delta)
        self.running_covariance.copy_(torch.where(first, covariance, mixed))
        self.running_mean.lerp_(mean, torch.where(first, 1.0, share))
        self.batches_seen.add_(counted)

    def extra_repr(self) -> str:
        return f"{self.num_features}, method={self.method!r}, eps={self.eps}, momentum={self.momentum}"
