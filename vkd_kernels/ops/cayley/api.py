"""The Cayley transform: validates, chooses a backend, documents (reference.py is the definition)."""

import torch

from .. import checks, implementations
from ..float64 import as_float64
from ..implementations import Implementation
from ..library import has_tangent
from . import extension, reference

_HINT = "; an orthogonal matrix in 16 bit is off by 4e-3: keep the weight in float32 and cast the result"
MAX_KERNEL_COLUMNS = 1024  # unmeasured: see candidates
SEMI_ORTHOGONAL = 1e-3  # max |QᵀQ - I| of what passes for it
FOUND_TO = 3e-2  # a matrix that is off by SEMI_ORTHOGONAL is itself no Cayley transform


def _check_weight(name: str, weight: torch.Tensor) -> None:  # (..., T, S)
    checks.check_tensor(name, weight, checks.FULL_PRECISION, _HINT)
    if weight.dim() < 2 or weight.shape[-1] < 1 or weight.shape[-2] < 1:
        raise ValueError(f"{name} must have the shape (..., T, S) with T, S >= 1; got {tuple(weight.shape)}")


def candidates(device_type: str, s: int) -> tuple[Implementation, ...]:
    """Which implementations may serve ``s`` columns when the caller asks for none, in order of preference.

    The CUDA kernels eliminate 32 columns a launch. Their time grows like ``s`` while latency dominates and like ``s³``
    on the scalar float64 units after that; the library's LU, which the reference calls, uses tensor cores and wins
    somewhere beyond 1024 in a model of both. MAX_KERNEL_COLUMNS is that model's figure, not a measurement.
    """
    if device_type == "cuda" and s > MAX_KERNEL_COLUMNS:
        return (Implementation.REFERENCE,)
    return (Implementation.EXTENSION, Implementation.REFERENCE)


def cayley(weight: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:  # (..., T, S) -> (..., T, S)
    r"""The semi-orthogonal matrix of an unconstrained one: a Cayley transform in closed form.

    For ``weight = [U; V]`` with U the first S rows::

        R = (I + U - Uᵀ + VᵀV)⁻¹        Q = [2R - I; -2 V R]        QᵀQ = I

    which are the first S columns of ``(I + K)⁻¹(I - K)``, ``K = [[U - Uᵀ, -Vᵀ], [V, 0]]``, at O(T S²) instead of
    O(T³): a point on the Stiefel manifold. The closed form is known (Trockman and Kolter, arXiv 2104.07167; Orthogonium
    has it, too). The inverse is taken in float64 whatever the weight's dtype, also under autocast, and on the CPU where
    the device has no float64 (Apple's MPS).

    Args:
        weight: ``(..., T, S)`` float32 or float64, any strides, on any device. Leading dimensions are a batch.
        backend: ``None`` chooses; ``"extension"`` or ``"torch"`` asks for one.

    Returns:
        ``(..., T, S)`` of the weight's dtype: orthonormal columns for T >= S, orthonormal rows for T < S (a wide
        weight is the transpose of a tall one). Differentiable, also in forward mode (by PyTorch); a second-order
        gradient needs ``backend="torch"``.

    Raises:
        TypeError: a weight that is no tensor or has another dtype.
        ValueError: fewer than two dimensions, an empty matrix, an unknown backend.
        RuntimeError: the requested backend can't serve; the message says why.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> q = vk.cayley(torch.randn(3024, 192))
        >>> bool((q.T @ q - torch.eye(192)).abs().max() < 1e-5)
        True
    """
    _check_weight("weight", weight)
    if weight.shape[-2] < weight.shape[-1]:
        return cayley(weight.mT, backend=backend).mT
    device = weight.device
    chosen = implementations.decide("cayley", backend, device, weight.dtype, candidates(device.type, weight.shape[-1]))
    if chosen is Implementation.EXTENSION and has_tangent([weight]):
        if implementations.requested("cayley", backend)[0] is chosen:
            raise RuntimeError('the extension has no forward-mode derivative of cayley: use backend="torch"')
        chosen = Implementation.REFERENCE
    return (extension if chosen is Implementation.EXTENSION else reference).cayley(weight)


def cayley_inverse(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight whose Cayley transform is a given semi-orthogonal matrix, up to the signs of its columns.

    Every such matrix is ``cayley(weight) * signs`` for some weight; the signs D keep ``I + Q1 D`` well
    conditioned, which the Cayley transform alone (it never reaches the eigenvalue -1) can't.

    Args:
        matrix: ``(..., T, S)`` float32 or float64 with orthonormal columns (T >= S) or rows (T < S).

    Returns:
        ``(weight, signs)``, no gradient: ``(..., T, S)``, and ±1 of shape ``(..., 1, S)`` for T >= S or
        ``(..., T, 1)`` for T < S, so that ``cayley(weight) * signs`` is ``matrix`` again.

    Raises:
        TypeError, ValueError: as for ``cayley``; ValueError also for a matrix that is not semi-orthogonal (to 1e-3),
            and for one whose weight can't be found (none is known).

    Example:
        >>> import torch, vkd_kernels as vk
        >>> q = torch.linalg.qr(torch.randn(7, 4)).Q
        >>> weight, signs = vk.functional.cayley_inverse(q)
        >>> torch.allclose(vk.cayley(weight) * signs, q, atol=1e-5)
        True
    """
    _check_weight("matrix", matrix)
    if matrix.shape[-2] < matrix.shape[-1]:
        weight, signs = cayley_inverse(matrix.mT)
        return weight.mT, signs.mT
    q = as_float64(matrix.detach())
    readable = q.numel() > 0 and checks.can_be_read(q)
    error = (q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)).abs().amax() if readable else 0.0
    if not error <= SEMI_ORTHOGONAL:
        raise ValueError(f"matrix must be semi-orthogonal; max |QᵀQ - I| of the one given is {float(error):.1e}")
    weight, signs = reference.cayley_inverse(matrix)
    signs = signs.unsqueeze(-2)
    error = (as_float64(reference.cayley(weight) * signs) - q).abs().amax() if readable else 0.0
    if not error <= FOUND_TO:
        raise ValueError(f"no weight was found for matrix: the best gives one that is off by {float(error):.1e}")
    return weight, signs
