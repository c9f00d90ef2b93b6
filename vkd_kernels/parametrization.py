"""``orthogonal()``: a weight of any module kept semi-orthogonal, and the maps from unconstrained to such matrices."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from .ops import checks
from .ops.cayley import cayley, cayley_inverse
from .ops.implementations import no_autocast

ORTHOGONAL_MAPS = ("cayley", "matrix_exp", "householder")


@torch.no_grad()
def orthonormal_factor(matrix: torch.Tensor) -> torch.Tensor:  # (..., T, S)
    """The orthonormal factor of the QR decomposition with a positive diagonal of R (of the transpose, if wide)."""
    if matrix.shape[-2] < matrix.shape[-1]:
        return orthonormal_factor(matrix.mT).mT
    if not torch.isfinite(matrix).all():
        raise ValueError(
            f"the matrix assigned to an orthogonal weight has NaN or Inf; its shape is {tuple(matrix.shape)}"
        )
    q, r = torch.linalg.qr(matrix.double())
    return (q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)).to(matrix.dtype)


class CayleyMap(nn.Module):
    """weight -> cayley(weight) · signs. Assignment goes through the inverse and sets the signs, which never train."""

    signs: torch.Tensor

    def __init__(self, matrix: torch.Tensor):  # (..., T, S)
        super().__init__()
        t, s = matrix.shape[-2:]
        shape = (*matrix.shape[:-2], 1, s) if t >= s else (*matrix.shape[:-2], t, 1)
        self.register_buffer("signs", torch.ones(shape, dtype=matrix.dtype, device=matrix.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return cayley(weight) * self.signs

    @torch.no_grad()
    def right_inverse(self, matrix: torch.Tensor) -> torch.Tensor:
        if matrix.device.type == "meta":
            return matrix
        weight, signs = cayley_inverse(orthonormal_factor(matrix))
        self.signs.copy_(signs)
        return weight


class TorchMap(nn.Module):
    """One of PyTorch's own maps, for comparison, guarded against two ways of losing orthogonality in training.

    Under autocast the map would run in 16 bit. And the Householder map multiplies by the weight's diagonal truncated
    to integers: as soon as weight decay takes it below 1 the result is exactly zero, and stays so.
    """

    def __init__(self, matrix: torch.Tensor, orthogonal_map: str):
        super().__init__()
        self.orthogonal_map = orthogonal_map
        holder = nn.Module()
        eye = torch.eye(*matrix.shape[-2:], dtype=matrix.dtype, device=matrix.device)
        holder.register_parameter("weight", nn.Parameter(eye.expand(matrix.shape).clone()))
        parametrizations.orthogonal(holder, "weight", orthogonal_map=orthogonal_map)
        self.map: Any = holder.get_submodule("parametrizations.weight.0")

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with no_autocast(weight.device.type):
            if self.orthogonal_map == "householder":
                diagonal = weight.diagonal(dim1=-2, dim2=-1)
                weight = weight.diagonal_scatter(
                    torch.where(diagonal < 0, -1.0, 1.0).to(weight.dtype), dim1=-2, dim2=-1
                )
            return self.map(weight)

    @torch.no_grad()
    def right_inverse(self, matrix: torch.Tensor) -> torch.Tensor:
        return self.map.right_inverse(orthonormal_factor(matrix))


def at_least_float32(parameter: torch.Tensor) -> torch.Tensor:
    """For maps: FSDP2's mixed precision hands out a 16-bit copy of the parameter, whose P is as orthonormal."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def make_map(matrix: torch.Tensor, orthogonal_map: str) -> CayleyMap | TorchMap:
    checks.check_choice("orthogonal_map", orthogonal_map, ORTHOGONAL_MAPS)
    return CayleyMap(matrix) if orthogonal_map == "cayley" else TorchMap(matrix, orthogonal_map)


def orthogonal(module: nn.Module, name: str = "weight", orthogonal_map: str = "cayley") -> nn.Module:
    r"""Keeps a weight of any module orthonormal; a drop-in for ``torch.nn.utils.parametrizations.orthogonal``.

    ``module.<name>`` becomes a matrix with orthonormal columns (or rows, if it is wide); it starts at the orthonormal
    QR factor of what it was, and assigning a matrix sets it to that matrix's. The trained parameter is
    ``module.parametrizations.<name>.original``: leave it out of weight decay, as any orthogonal weight.

    Args:
        module: holds the weight.
        name: of a parameter of shape ``(..., T, S)``, float32 or float64.
        orthogonal_map: ``"cayley"`` (closed form, O(T S²)); ``"matrix_exp"`` and ``"householder"`` are PyTorch's maps,
            hundreds of times slower, kept for comparison and guarded against collapse.

    Returns:
        The module itself, changed in place.

    Raises:
        ValueError: no such parameter, fewer than two dimensions, an unknown map.
        TypeError: no module, a 16-bit weight.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> layer = vk.orthogonal(torch.nn.Linear(192, 3024, bias=False))
        >>> p = layer.weight
        >>> bool((p.T @ p - torch.eye(192)).abs().max() < 1e-5)
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {checks.describe(module)}")
    if not isinstance(name, str):
        raise TypeError(f"name must be a string; got {checks.describe(name)}")
    weight = getattr(module, name, None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(
            f"name must be that of a parameter, but module has no parameter {name!r}; {type(module).__name__} has "
            + (", ".join(repr(n) for n, _ in module.named_parameters(recurse=False)) or "no parameters")
        )
    check_map_weight(name, weight)
    parametrize.register_parametrization(module, name, make_map(weight, orthogonal_map))
    return module


def check_map_weight(name: str, weight: torch.Tensor) -> None:
    checks.check_tensor(name, weight, checks.FULL_PRECISION, "; orthogonal weights stay in float32 or float64")
    if weight.dim() < 2:
        raise ValueError(f"{name} must have the shape (..., T, S); got {tuple(weight.shape)}")


def whole_as(matrix: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The matrix itself or, for a parameter sharded by FSDP2, the first rank's on every rank."""
    if not checks.is_sharded(parameter):
        return matrix
    sharded: Any = matrix if checks.is_sharded(matrix) else sharded_as(matrix, parameter)
    return sharded.full_tensor()


def sharded_as(matrix: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The matrix itself or, for a parameter sharded by FSDP2, as a DTensor of its placement."""
    if not checks.is_sharded(parameter):
        return matrix
    from torch.distributed.tensor import distribute_tensor  # not above, because importing it takes a while

    sharded: Any = parameter
    return distribute_tensor(matrix, sharded.device_mesh, sharded.placements)
