"""The definition of the normalisations, in plain PyTorch: statistics over rows, weighted and across ranks."""

import torch

from .all_reduce import all_reduce, all_reduce_together


def sum_of_weights(rows: torch.Tensor, row_weight, group=None) -> torch.Tensor:  # (N, C), (N,) or None -> ()
    total = rows.new_full((), rows.shape[0]) if row_weight is None else row_weight.sum()
    return all_reduce(total, group)


def total_weight(rows: torch.Tensor, row_weight, group=None) -> torch.Tensor:  # (N, C), (N,) or None -> ()
    """Σ of the rows' weights over all ranks; 1 where it is 0, so that dividing by it is safe."""
    total = sum_of_weights(rows, row_weight, group)
    return torch.where(total > 0, total, 1.0)


def without_masked_rows(rows: torch.Tensor, row_weight) -> torch.Tensor:  # (N, C)
    """Rows of weight 0 replaced by zeros: whatever they hold, NaN too, reaches no sum and no gradient."""
    return rows if row_weight is None else torch.where((row_weight > 0)[:, None], rows, 0.0)


def weighted(rows: torch.Tensor, row_weight) -> torch.Tensor:
    return rows if row_weight is None else rows * row_weight[:, None]


def mean(rows: torch.Tensor, row_weight, group=None) -> torch.Tensor:  # (N, C) -> (C,)
    return all_reduce(weighted(rows, row_weight).sum(0), group) / total_weight(rows, row_weight, group)


def standardize(rows: torch.Tensor, row_weight=None, *, eps: float, group=None) -> torch.Tensor:  # (N, C) -> (N, C)
    """Each channel minus its mean over the rows, over sqrt(biased variance + eps)."""
    rows = without_masked_rows(rows, row_weight)
    centred = rows - mean(rows, row_weight, group)
    variance = mean(centred.square(), row_weight, group)
    return without_masked_rows(centred * torch.rsqrt(variance + eps), row_weight)


def covariance(rows: torch.Tensor, row_weight=None, group=None, *, biased: bool = False):
    """(mean (C,), Σ (C, C)) with N - 1 in the denominator; for weights w, Σw - Σw²/Σw, which is N - 1 for a mask.

    With ``biased`` the denominator is N, or Σw.
    """
    return covariances([rows], [row_weight], group, biased=biased)[0]


def covariances(rows: list, row_weights: list, group=None, *, biased: bool = False) -> list:
    """covariance of each of several sets of rows, with two collectives for all of them."""
    sets = [(without_masked_rows(x, w), w) for x, w in zip(rows, row_weights, strict=True)]
    sums = all_reduce_together([value for x, w in sets for value in _sums(x, w)], group)
    moments, scatters = [], []
    for (x, w), total, squares, of_rows in zip(sets, sums[::3], sums[1::3], sums[2::3], strict=True):
        total = torch.where(total > 0, total, 1.0)
        mu = of_rows / total
        scatters.append(weighted(x - mu, w).mT @ (x - mu))
        degrees = total if biased else total - squares / total
        moments.append((mu, torch.where(degrees > 0, degrees, 1.0)))
    scatters = all_reduce_together(scatters, group)
    return [(mu, scatter / degrees) for (mu, degrees), scatter in zip(moments, scatters, strict=True)]


def _sums(rows: torch.Tensor, row_weight):
    """Σw, Σw² and Σ w x of the rows of one process."""
    w = rows.new_ones(rows.shape[0]) if row_weight is None else row_weight
    return w.sum(), w.square().sum(), weighted(rows, row_weight).sum(0)


def whitening_matrix(sigma: torch.Tensor, *, method: str, eps: float) -> torch.Tensor:  # (C, C) -> (C, C)
    """A with cov(rows @ A) = I for the shrunk covariance (1 - eps) Σ + eps (tr Σ / C) I.

    zca: Σ^(-1/2), symmetric; pca: E Λ^(-1/2), largest variance first; cholesky: L⁻ᵀ of Σ = L Lᵀ.
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
        if method == "zca":
            matrix = scaled @ vectors.mT
        else:
            # The sign of an eigenvector is arbitrary: make its largest entry positive, so that results repeat.
            largest = torch.gather(vectors, 0, vectors.abs().argmax(0, keepdim=True))
            matrix = (scaled * torch.where(largest < 0, -1.0, 1.0)).flip(-1)
    matrix = matrix * torch.where(usable_scale, scale, 1.0).rsqrt()
    return torch.where(usable, matrix, torch.nan)


def whiten(rows: torch.Tensor, row_weight=None, *, method: str, eps: float, group=None) -> torch.Tensor:
    """(rows - mean) A for the whitening matrix A of their own covariance, float64 inside: (N, C) -> (N, C)."""
    return whiten_each([rows], [row_weight], method=method, eps=eps, group=group)[0]


@torch.no_grad()
def whiten_each(rows: list, row_weights: list, *, method: str, eps: float, group=None) -> list:
    """whiten of each of several sets of rows, with the same collectives for all of them."""
    exact = [without_masked_rows(x, w).double() for x, w in zip(rows, row_weights, strict=True)]
    moments = covariances(exact, [None if w is None else w.double() for w in row_weights], group)
    return [
        without_masked_rows((x64 - mu) @ whitening_matrix(sigma, method=method, eps=eps), w).to(x.dtype)
        for x, x64, w, (mu, sigma) in zip(rows, exact, row_weights, moments, strict=True)
    ]
