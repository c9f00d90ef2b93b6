"""Normalization of features: validates, documents (reference.py is the definition, modules.py keeps statistics)."""

import torch
from torch.distributed import ProcessGroup

from .. import checks
from . import reference
from .all_reduce import check_group

METHODS = ("zca", "cholesky", "pca", "phi_s")


def flat_rows(
    name: str,
    features: torch.Tensor,  # (..., C)
    mask: torch.Tensor | None,  # (...)
    process_group: ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # (N, C), (N,)
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
    dtype = weight_dtype = torch.promote_types(features.dtype, torch.float32)
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.float64:
        weight_dtype = torch.float64  # whose small weights float32 would take for masked rows
    return rows.to(dtype), checks.row_weights("mask", mask, features.shape[:-1], features, weight_dtype)


def standardize(
    features: torch.Tensor,  # (..., C)
    *,
    mask: torch.Tensor | None = None,  # (...)
    eps: float = 1e-5,
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:  # (..., C)
    r"""Each channel standardized over all rows: ``(x - mean) / sqrt(biased variance + eps)``.

    The normalization of the paper's detection task; what ``batch_norm`` does without affine or running statistics.

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
    rows, row_weight = flat_rows("features", features, mask, process_group)
    checks.check_number("eps", eps, at_least=0)
    out = reference.standardize(rows, row_weight, eps=eps, group=process_group)
    return out.to(features.dtype).reshape(features.shape)


def whiten(
    features: torch.Tensor,  # (..., C)
    *,
    method: str = "zca",
    eps: float = 1e-3,
    mask: torch.Tensor | None = None,  # (...)
    process_group: ProcessGroup | None = None,
) -> torch.Tensor:  # (..., C)
    r"""Features centered and decorrelated, float64 inside: the normalization of the paper's generation task.

    With the covariance Σ of the rows (N - 1 in the denominator) shrunk to ``(1 - eps) Σ + eps (tr Σ / C) I``::

        zca:       (y - μ) Σ^(-1/2)           closest to y
        cholesky:  (y - μ) L⁻ᵀ                Σ = L Lᵀ; the cheapest, and no host synchronization on a GPU
        pca:       (y - μ) E Λ^(-1/2)         Σ = E Λ Eᵀ; decreasing variance, signs fixed
        phi_s:     (y - μ) E Hᵀ / √(tr Σ/C)   a rotation and one scale, after which every channel has variance 1

    ``phi_s`` is PHI-S of RADIO (arXiv 2410.01680), which keeps the ratios of distances between rows. H is like a
    Hadamard matrix: Fourier's cosines and sines, with phases that make all variances equal, for any number of channels.

    Args:
        features: ``(..., C)`` float32, float64, bfloat16 or float16; rows are all dimensions but the last.
        method: ``"zca"``, ``"cholesky"``, ``"pca"`` or ``"phi_s"``.
        eps: share of the shrinkage target, in [0, 1]. With fewer rows than channels Σ is singular and eps must be > 0
            (``phi_s`` does not depend on it).
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
    rows, row_weight = flat_rows("features", features, mask, process_group)
    checks.check_choice("method", method, METHODS)
    checks.check_number("eps", eps, at_least=0, at_most=1)
    out = reference.whiten(rows, row_weight, method=method, eps=eps, group=process_group)
    return out.to(features.dtype).reshape(features.shape)
