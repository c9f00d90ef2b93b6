"""The definition of the Cayley transform and its inverse, in plain PyTorch; extension.py computes the same."""

from typing import Any

import torch
from torch._functorch.pyfunctorch import JvpInterpreter, retrieve_all_functorch_interpreters

from ..float64 import as_float64
from ..implementations import no_autocast


class _InverseUnderVmap(torch.autograd.Function):
    """The inverse of what vmap batches. Second derivatives need reverse mode at least once: the rule is a constant to
    an outer forward mode."""

    @staticmethod
    def forward(m: torch.Tensor) -> torch.Tensor:  # (..., S, S)
        return _inverse_of_each(m)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (r,) = ctx.saved_tensors
        return -r.mT @ grad @ r.mT

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        (r,) = ctx.saved_tensors
        return -r @ tangent @ r

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], m: torch.Tensor) -> tuple[torch.Tensor, int]:
        return _inverse(m.movedim(in_dims[0], 0)), 0


def _inverse_of_each(m: torch.Tensor) -> torch.Tensor:  # (..., S, S)
    """Matrix by matrix: PyTorch's batched LU on the CPU (seen with 2.14 and MKL) can hang with several threads."""
    inverses = [torch.linalg.inv_ex(x).inverse for x in m.reshape(-1, *m.shape[-2:])]
    return torch.stack(inverses).view(m.shape) if inverses else m.clone()


def _is_batched(m: torch.Tensor) -> bool:
    """Whether it is one of many under some level of vmap."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(m):
        if functorch.is_batchedtensor(m):
            return True
        m = functorch.get_unwrapped(m)
    return False


def _inverse(m: torch.Tensor) -> torch.Tensor:  # (..., S, S), symmetric part >= I: never singular
    # inv_ex neither checks nor synchronizes. Compiled and traced graphs can't hold a function with a rule for vmap.
    if m.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.linalg.inv_ex(m).inverse
    if not _is_batched(m):
        return _inverse_of_each(m)
    if sum(isinstance(level, JvpInterpreter) for level in retrieve_all_functorch_interpreters()) > 1:
        raise NotImplementedError(
            "on a CPU vmap of the Cayley transform has no second derivative by forward mode alone: use "
            "torch.func.hessian (forward over reverse), or a loop in place of vmap"
        )
    return _InverseUnderVmap.apply(m)


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
    Q1 + D: each is that of its pivot, which is at least 1 in magnitude then. The largest diagonal entry left comes
    next: in a fixed order the factors may grow like 1.3^S although all pivots are large.
    """
    s = matrix.shape[-1]
    q = as_float64(matrix.detach())
    rest = q[..., :s, :].clone()
    order = torch.arange(s, device=q.device).expand((*q.shape[:-2], s)).clone()  # of the columns
    chosen = torch.ones((*q.shape[:-2], s), dtype=q.dtype, device=q.device)
    for k in range(s):
        largest = k + rest.diagonal(dim1=-2, dim2=-1)[..., k:].abs().argmax(-1, keepdim=True)
        _swap(rest, k, largest, dim=-1)
        _swap(rest, k, largest, dim=-2)
        _swap(order, k, largest, dim=-1)
        chosen[..., k] = torch.where(rest[..., k, k] < 0, -1.0, 1.0)
        pivot = rest[..., k, k] + chosen[..., k]
        column = rest[..., k + 1 :, k] / pivot[..., None]
        rest[..., k + 1 :, k + 1 :] -= column[..., :, None] * rest[..., k, None, k + 1 :]
    signs = torch.empty_like(chosen).scatter_(-1, order, chosen)
    qd = q * signs[..., None, :]
    eye = torch.eye(s, dtype=q.dtype, device=q.device)
    half_m = _inverse(eye + qd[..., :s, :])
    weight = torch.cat([(half_m - half_m.mT) / 2, -qd[..., s:, :] @ half_m], dim=-2)
    return weight.to(matrix.dtype).to(matrix.device), signs.to(matrix.dtype).to(matrix.device)


def _swap(x: torch.Tensor, k: int, other: torch.Tensor, dim: int) -> None:
    """Entries k and ``other`` (..., 1), one for each of the batch, along the last dimension or the one before."""
    first = x.narrow(dim, k, 1).clone()
    index = (other if x.dim() == other.dim() else other[..., None]).expand_as(first)
    x.narrow(dim, k, 1).copy_(x.gather(dim, index))
    x.scatter_(dim, index, first)
