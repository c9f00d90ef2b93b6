"""The definition of the Cayley transform and its inverse, in plain PyTorch; extension.py computes the same."""

import torch

from ..float64 import as_float64
from ..implementations import no_autocast


def _inverse(m: torch.Tensor) -> torch.Tensor:  # (..., S, S), symmetric part >= I: never singular
    # inv_ex neither checks nor synchronizes. A batch goes one by one on the CPU: PyTorch's batched LU (seen with 2.14
    # and MKL) can hang when it has more than one thread.
    if m.device.type != "cpu" or m.dim() == 2:
        return torch.linalg.inv_ex(m).inverse
    return torch.stack([torch.linalg.inv_ex(x).inverse for x in m.flatten(0, -3)]).view(m.shape) if m.numel() else m


def cayley(weight: torch.Tensor) -> torch.Tensor:  # (..., T, S), T >= S -> (..., T, S)
    """Q = [2R - I; -2 V R] with R = (I + U - Uᵀ + VᵀV)⁻¹ and weight = [U; V], in float64 throughout."""
    s = weight.shape[-1]
    with no_autocast(weight.device.type):
        w = as_float64(weight)
        u, v = w[..., :s, :], w[..., s:, :]
        eye = torch.eye(s, dtype=w.dtype, device=w.device)
        r = _inverse(eye + (u - u.mT) + v.mT @ v)
        q = torch.cat([2 * r - eye, v @ (-2 * r)], dim=-2)
        return q.to(weight.dtype).to(weight.device)  # in this order: the device may have no float64


def cayley_inverse(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (..., T, S) -> (..., T, S), (..., S)
    """weight and signs D with matrix = cayley(weight) · D, for a matrix [Q1; Q2] with orthonormal columns.

    V = -Q2 D (I + Q1 D)⁻¹ and M = 2 (I + Q1 D)⁻¹, whose skew part is U - Uᵀ. The signs are chosen while eliminating
    Q1 + D: the k-th sign is that of the k-th pivot, which keeps every pivot at least 1 in magnitude.
    """
    s = matrix.shape[-1]
    q = as_float64(matrix.detach())
    rest = q[..., :s, :].clone()
    signs = torch.ones((*q.shape[:-2], s), dtype=q.dtype, device=q.device)
    for k in range(s):
        signs[..., k] = torch.where(rest[..., k, k] < 0, -1.0, 1.0)
        pivot = rest[..., k, k] + signs[..., k]
        column = rest[..., k + 1 :, k] / pivot[..., None]
        rest[..., k + 1 :, k + 1 :] -= column[..., :, None] * rest[..., k, None, k + 1 :]
    qd = q * signs[..., None, :]
    eye = torch.eye(s, dtype=q.dtype, device=q.device)
    half_m = _inverse(eye + qd[..., :s, :])
    weight = torch.cat([(half_m - half_m.mT) / 2, -qd[..., s:, :] @ half_m], dim=-2)
    return weight.to(matrix.dtype).to(matrix.device), signs.to(matrix.dtype).to(matrix.device)
