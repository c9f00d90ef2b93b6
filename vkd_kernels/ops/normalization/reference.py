"""The definition of the normalizations, in plain PyTorch: row statistics, weighted and across ranks."""

import math
from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup

from ..float64 import as_float64, has_float64
from .all_reduce import all_reduce, all_reduce_several


def sum_of_weights(
    rows: torch.Tensor,  # (N, C)
    row_weight: torch.Tensor | None,  # (N,)
    group: ProcessGroup | None = None,
) -> torch.Tensor:  # ()
    total = rows.new_full((), rows.shape[0]) if row_weight is None else row_weight.sum()
    return all_reduce(total, group)


def total_weight(
    rows: torch.Tensor,  # (N, C)
    row_weight: torch.Tensor | None,  # (N,)
    group: ProcessGroup | None = None,
) -> torch.Tensor:  # ()
    """Σ of the rows' weights over all ranks; 1 where it is 0, so that dividing by it is safe."""
    total = sum_of_weights(rows, row_weight, group)
    return torch.where(total > 0, total, 1.0)


def without_masked_rows(rows: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:  # (N, C), (N,)
    """Rows of weight 0 replaced by zeros: whatever they hold, NaN too, reaches no sum and no gradient."""
    return rows if row_weight is None else torch.where((row_weight > 0)[:, None], rows, 0.0)


def weighted(rows: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:  # (N, C), (N,)
    return rows if row_weight is None else rows * row_weight[:, None]


def mean(
    rows: torch.Tensor,  # (N, C)
    row_weight: torch.Tensor | None,  # (N,)
    group: ProcessGroup | None = None,
) -> torch.Tensor:  # (C,)
    return all_reduce(weighted(rows, row_weight).sum(0), group) / total_weight(rows, row_weight, group)


def standardize(
    rows: torch.Tensor,  # (N, C)
    row_weight: torch.Tensor | None = None,  # (N,)
    *,
    eps: float,
    group: ProcessGroup | None = None,
) -> torch.Tensor:  # (N, C)
    """Each channel minus its mean over the rows, over sqrt(biased variance + eps)."""
    rows = without_masked_rows(rows, row_weight)
    centered = rows - mean(rows, row_weight, group)
    variance = mean(centered.square(), row_weight, group)
    return without_masked_rows(centered * torch.rsqrt(variance + eps), row_weight)


@torch.no_grad()
def mean_and_variance(
    rows: torch.Tensor,  # (N, C), without masked rows
    row_weight: torch.Tensor | None,  # (N,)
    group: ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # (C,), (C,) and ()
    """Means, biased variances and the rows' total weight, accumulated in float64 without a copy of the rows in it."""
    acc_dtype = torch.float64 if has_float64(rows.device) else rows.dtype
    count = sum_of_weights(rows[:, :0].to(acc_dtype), None if row_weight is None else row_weight.to(acc_dtype))
    count, total = all_reduce_several([count, weighted(rows, row_weight).sum(0, dtype=acc_dtype)], group)
    divisor = torch.where(count > 0, count, 1.0)
    mu = total / divisor
    centered = without_masked_rows(rows - mu.to(rows.dtype), row_weight)
    # The mean was rounded to the rows' dtype: what is left of it comes off the variance.
    sums = [
        weighted(centered.square(), row_weight).sum(0, dtype=acc_dtype),
        weighted(centered, row_weight).sum(0, dtype=acc_dtype),
    ]
    squares, left = all_reduce_several(sums, group)
    return mu, (squares / divisor - (left / divisor).square()).clamp_min(0.0), count


def centered(rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:  # (N, C), (C,) -> (N, C) of the rows' dtype
    """rows - mean, for a mean of more digits than the rows have: what its rounding leaves comes off as well."""
    rounded = mean.to(rows.dtype).to(rows.device)
    left = (mean - rounded.to(mean.device).to(mean.dtype)).to(rows.dtype).to(rows.device)
    return rows - rounded - left


def covariance(
    rows: torch.Tensor,  # (N, C)
    row_weight: torch.Tensor | None = None,  # (N,)
    group: ProcessGroup | None = None,
    *,
    biased: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # (C,), (C, C)
    """Mean, and Σ with N - 1 in the denominator; for weights w, Σw - Σw²/Σw, which is N - 1 for a mask.

    With ``biased`` the denominator is N, or Σw.
    """
    return covariances([rows], [row_weight], group, biased=biased)[0]


def covariances(
    rows: Sequence[torch.Tensor],  # G of (N, C)
    row_weights: Sequence[torch.Tensor | None],  # G of (N,)
    group: ProcessGroup | None = None,
    *,
    biased: bool = False,
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # G of (C,), (C, C)
    """covariance of several sets of rows, with two collectives for all of them."""
    sets = [(without_masked_rows(x, w), w) for x, w in zip(rows, row_weights, strict=True)]
    sums = all_reduce_several([value for x, w in sets for value in _sums(x, w)], group)
    means_and_degrees, scatters = [], []
    for (x, w), total, squares, of_rows in zip(sets, sums[::3], sums[1::3], sums[2::3], strict=True):
        total = torch.where(total > 0, total, 1.0)
        mu = of_rows / total
        scatters.append(weighted(x - mu, w).mT @ (x - mu))
        degrees = total if biased else total - squares / total
        means_and_degrees.append((mu, torch.where(degrees > 0, degrees, 1.0)))
    summed = all_reduce_several(scatters, group)
    return [(mu, scatter / degrees) for (mu, degrees), scatter in zip(means_and_degrees, summed, strict=True)]


def _sums(
    rows: torch.Tensor,  # (N, C)
    row_weight: torch.Tensor | None,  # (N,)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # (), (), (C,)
    """Σw, Σw² and Σ w x of the rows of one process."""
    w = rows.new_ones(rows.shape[0]) if row_weight is None else row_weight
    return w.sum(), w.square().sum(), weighted(rows, row_weight).sum(0)


def whitening_matrix(sigma: torch.Tensor, *, method: str, eps: float) -> torch.Tensor:  # (C, C) -> (C, C)
    """A with cov(rows @ A) = I for the shrunk covariance (1 - eps) Σ + eps (tr Σ / C) I = E Λ Eᵀ.

    zca: Σ^(-1/2), symmetric; pca: E Λ^(-1/2), largest variance first; cholesky: L⁻ᵀ of Σ = L Lᵀ. phi_s instead leaves
    correlations: E Hᵀ (tr Σ / C)^(-1/2), where the rotation H makes all variances equal, as in ``equalizing_rotation``.
    """
    c = sigma.shape[-1]
    eye = torch.eye(c, dtype=sigma.dtype, device=sigma.device)
    usable = torch.isfinite(sigma).all()
    scale = sigma.diagonal().mean()
    # Decomposed at unit scale, where rounding is harmless; without variance (or numbers) there is nothing to decompose.
    usable_scale = usable & (scale > 0)
    unit = torch.where(usable_scale, (1 - eps) * sigma / torch.where(usable_scale, scale, 1.0) + eps * eye, eye)
    if method == "cholesky":
        lower = torch.linalg.cholesky_ex(unit).L
        matrix = torch.linalg.solve_triangular(lower, eye, upper=False).mT
    else:
        values, vectors = torch.linalg.eigh(unit)
        scaled = vectors * torch.rsqrt(values.clamp_min(torch.finfo(unit.dtype).eps * c))
        # The sign of an eigenvector is arbitrary: make its largest entry positive, so that results repeat.
        largest = torch.gather(vectors, 0, vectors.abs().argmax(0, keepdim=True))
        signs = torch.where(largest < 0, -1.0, 1.0)
        if method == "zca":
            matrix = scaled @ vectors.mT
        elif method == "pca":
            matrix = (scaled * signs).flip(-1)
        else:
            matrix = (vectors * signs).flip(-1) @ equalizing_rotation(values.flip(-1)).mT
    matrix = matrix * torch.where(usable_scale, scale, 1.0).rsqrt()
    return torch.where(usable, matrix, torch.nan)


def equalizing_rotation(variances: torch.Tensor) -> torch.Tensor:  # (C,) -> (C, C)
    """An orthogonal H with equal diagonal entries of H diag(variances) Hᵀ, and entries of about 1/√C.

    A Hadamard matrix does it for any variances, but exists for some C only. For every C the cosines and sines of the
    discrete Fourier transform do, once each pair has the phase φ_k at which both have the same variance:

        H = √(2/C) cos(2πjk/C + φ_k), √(2/C) sin(2πjk/C + φ_k), for 0 < k < C/2;   1/√C;   for even C also (-1)^j/√C

    The cosine's variance is mean(variances) + |L_k| cos(2φ_k + arg L_k) / C with L_k = Σ_j variances_j exp(4πi jk/C).
    """
    c = variances.shape[-1]
    j = torch.arange(c, dtype=variances.dtype, device=variances.device)
    k = torch.arange(1, (c + 1) // 2, dtype=variances.dtype, device=variances.device)
    turns = torch.outer(k, j).remainder(c) * (2 * math.pi / c)  # (K, C)
    phase = (math.pi / 2 - torch.atan2((2 * turns).sin() @ variances, (2 * turns).cos() @ variances)) / 2
    turns = turns + phase[:, None]
    constant = torch.full_like(j, 1 / math.sqrt(c))[None]
    alternating = constant * (1 - 2 * j.remainder(2))
    pairs = [turns.cos() * math.sqrt(2 / c), turns.sin() * math.sqrt(2 / c)]
    return torch.cat([constant, *([alternating] if c % 2 == 0 else []), *pairs])


def whiten(
    rows: torch.Tensor,  # (N, C)
    row_weight: torch.Tensor | None = None,  # (N,)
    *,
    method: str,
    eps: float,
    group: ProcessGroup | None = None,
) -> torch.Tensor:  # (N, C)
    """(rows - mean) A for the whitening matrix A of their own covariance, float64 inside."""
    return whiten_several([rows], [row_weight], method=method, eps=eps, group=group)[0]


@torch.no_grad()
def whiten_several(
    rows: Sequence[torch.Tensor],  # G of (N, C)
    row_weights: Sequence[torch.Tensor | None],  # G of (N,)
    *,
    method: str,
    eps: float,
    group: ProcessGroup | None = None,
) -> list[torch.Tensor]:  # G of (N, C)
    """whiten of several sets of rows, with the same collectives for all of them."""
    rows64 = [without_masked_rows(as_float64(x), in_float64(w)) for x, w in zip(rows, row_weights, strict=True)]
    weights64 = [in_float64(w) for w in row_weights]
    statistics = covariances(rows64, weights64, group)
    return [
        without_masked_rows((x64 - mu) @ whitening_matrix(sigma, method=method, eps=eps), w).to(x.dtype).to(x.device)
        for x, x64, w, (mu, sigma) in zip(rows, rows64, weights64, statistics, strict=True)
    ]


def in_float64(row_weight: torch.Tensor | None) -> torch.Tensor | None:  # (N,)
    return None if row_weight is None else as_float64(row_weight)
