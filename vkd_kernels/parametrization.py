"""``orthogonal()``: a weight of any module kept semi-orthogonal, and the maps from unconstrained to such matrices."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from .diagnostics import orthogonality_error
from .map_state import SIGN, UNINITIALIZED, are_signs, prepare_map_state
from .ops import checks
from .ops.cayley import cayley, cayley_inverse
from .ops.cayley.api import SEMI_ORTHOGONAL
from .ops.float64 import as_float64
from .ops.implementations import no_autocast

ORTHOGONAL_MAPS = ("cayley", "matrix_exp", "householder")
NO_PART_OF_ITS_OWN = 10  # times the rounding of a column's norm: so small a part counts as none
SEMI_ORTHOGONAL_16_BIT = 5e-2  # max |PᵀP - I| of what passes for semi-orthogonal in 16 bit


@torch.no_grad()
def orthonormal_factor(matrix: torch.Tensor) -> torch.Tensor:  # (..., T, S)
    """The orthonormal factor of the QR decomposition with a positive diagonal of R (of the transpose, if wide)."""
    if matrix.shape[-2] < matrix.shape[-1]:
        return orthonormal_factor(matrix.mT).mT
    if checks.can_be_read(matrix) and not torch.isfinite(matrix).all():
        raise ValueError(
            f"the matrix assigned to an orthogonal weight has NaN or Inf; its shape is {tuple(matrix.shape)}"
        )
    q, r = torch.linalg.qr(as_float64(matrix))
    q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
    return q.to(matrix.dtype).to(matrix.device)  # in this order: the device may have no float64


class CayleyMap(nn.Module):
    """weight -> cayley(weight) · signs.

    The Cayley transform reaches no matrix with the eigenvalue -1, and some only by huge weights; every matrix is one of
    the others times signs of its columns (rows, if wide). A fresh map's signs are +1; assigning a matrix finds them.
    """

    # ±127, of which the sign counts: an integer, so that no cast touches it, and so large that an average of equal
    # signs that is rounded towards 0 keeps them. Memory that nobody wrote is recognized by holding other numbers.
    signs: torch.Tensor  # (..., 1, S), or (..., T, 1) for T < S

    def __init__(self, matrix: torch.Tensor) -> None:  # (..., T, S)
        super().__init__()
        *batch, t, s = self.shape = tuple(matrix.shape)
        shape = (*batch, 1, s) if t >= s else (*batch, t, 1)
        self.register_buffer("signs", torch.full(shape, SIGN, dtype=torch.int8, device=matrix.device))
        self._known_signs = self.signs

    def checked_signs(self) -> torch.Tensor:
        """``signs`` as ±1; an error once, where the buffer has been replaced by one that nobody initialized."""
        signs = self.signs
        if not torch.compiler.is_compiling() and signs is not self._known_signs and checks.can_be_read(signs):
            if not are_signs(signs):
                raise RuntimeError(UNINITIALIZED)
            self._known_signs = signs
        return signs.sign()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:  # (..., T, S) -> (..., T, S) of its dtype
        q = cayley(at_least_float32(weight)) * self.checked_signs()
        return q.to(weight.dtype).contiguous()

    @torch.no_grad()
    def start(self, matrix: torch.Tensor) -> torch.Tensor:  # (..., T, S) -> (..., T, S)
        """The weight of the matrix's orthonormal factor up to the signs of its columns, which become +1."""
        weight, _ = cayley_inverse(orthonormal_factor(matrix))
        self.signs.fill_(SIGN)
        self._known_signs = self.signs
        return weight.contiguous()

    @torch.no_grad()
    def right_inverse(self, matrix: torch.Tensor) -> torch.Tensor:  # (..., T, S) -> (..., T, S)
        if tuple(matrix.shape) != self.shape:
            raise ValueError(f"the weight takes a matrix of shape {self.shape}; got {checks.describe(matrix)}")
        if matrix.is_meta:
            return matrix
        weight, signs = cayley_inverse(orthonormal_factor(at_least_float32(matrix)))
        self.signs.copy_(signs * SIGN)
        self._known_signs = self.signs
        return weight.to(matrix.dtype).contiguous()


class TorchMap(nn.Module):
    """One of PyTorch's own maps, for comparison, guarded against two ways of losing orthogonality in training.

    Under autocast the map would run in 16 bit. And the Householder map multiplies by the weight's diagonal truncated
    to integers: as soon as weight decay takes it below 1 the result is exactly zero, and stays so.
    """

    def __init__(self, matrix: torch.Tensor, orthogonal_map: str, use_trivialization: bool = True) -> None:
        super().__init__()
        self.orthogonal_map = orthogonal_map
        holder = nn.Module()
        eye = torch.eye(*matrix.shape[-2:], dtype=at_least_float32(matrix).dtype, device=matrix.device)
        holder.register_parameter("weight", nn.Parameter(eye.expand(matrix.shape).clone()))
        parametrizations.orthogonal(
            holder, "weight", orthogonal_map=orthogonal_map, use_trivialization=use_trivialization
        )
        self.map: Any = holder.get_submodule("parametrizations.weight.0")

    def forward(self, weight: torch.Tensor) -> torch.Tensor:  # (..., T, S) -> (..., T, S) of its dtype
        dtype, weight = weight.dtype, at_least_float32(weight)
        with no_autocast(weight.device.type):
            if self.orthogonal_map == "householder":
                diagonal = weight.diagonal(dim1=-2, dim2=-1)
                weight = weight.diagonal_scatter(
                    torch.where(diagonal < 0, -1.0, 1.0).to(weight.dtype), dim1=-2, dim2=-1
                )
            return self.map(weight).to(dtype).contiguous()

    @torch.no_grad()
    def right_inverse(self, matrix: torch.Tensor) -> torch.Tensor:  # (..., T, S) -> (..., T, S)
        if matrix.is_meta:
            return matrix
        weight = self.map.right_inverse(orthonormal_factor(at_least_float32(matrix)))
        if hasattr(self.map, "base"):
            self.map.base = self.map.base.contiguous()
        return weight.to(matrix.dtype).contiguous()

    start = right_inverse

    def _apply(self, fn: Any, recurse: bool = True) -> "TorchMap":
        base = getattr(self.map, "base", None)
        super()._apply(fn, recurse)
        if base is not None and self.map.base.dtype not in checks.FULL_PRECISION:  # in 16 bit it is not orthonormal
            self.map.base = base.to(self.map.base.device)
        return self


class OrthogonalWeight(parametrize.ParametrizationList):
    """What ``module.parametrizations.<name>`` becomes: assigned matrices are checked before anything changes, and no
    checkpoint loads into another matrix than it was saved from."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniformly distributed matrix, up to the signs of its columns: for ``_init_weights`` of transformers."""
        orthogonal_map: Any = self[0]
        if not (self.original.is_meta or was_loaded(self.original)):
            start(orthogonal_map, self.original)

    def right_inverse(self, value: torch.Tensor) -> None:  # (..., T, S)
        if len(self) > 1:
            return super().right_inverse(value)
        if not checks.is_sharded(value):
            checks.check_tensor("an orthogonal weight", value)
        if value.dtype != self.original.dtype:
            raise ValueError(f"the weight takes a {self.original.dtype} matrix; got {checks.describe(value)}")
        orthogonal_map: Any = self[0]
        assign(orthogonal_map, self.original, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        prepare_map_state(  # also where another parametrization is stacked on it
            self[0],
            state_dict,
            parameter_key=f"{prefix}original",
            map_prefix=f"{prefix}0.",
            error_messages=arguments[-1],
        )
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def orthogonal(
    module: nn.Module, name: str = "weight", orthogonal_map: str | None = None, *, use_trivialization: bool = True
) -> nn.Module:
    r"""Keeps a weight of any module semi-orthogonal; a drop-in for ``torch.nn.utils.parametrizations.orthogonal``.

    ``module.<name>`` becomes a matrix with orthonormal columns (or rows, if it is wide): a point on the Stiefel
    manifold. It starts at the orthonormal QR factor of what it was, and assigning a matrix of its shape and dtype sets
    it to that matrix's. The trained parameter is ``module.parametrizations.<name>.original``: leave it out of weight
    decay. In 16 bit the matrix is computed in float32 and rounded, to errors of 4e-3 in bfloat16.

    Args:
        module: holds the weight.
        name: of a parameter of shape ``(..., T, S)``, float32, float64, bfloat16 or float16.
        orthogonal_map: ``None`` or ``"cayley"`` (closed form, O(T S²)); ``"matrix_exp"`` and ``"householder"`` are
            PyTorch's maps, hundreds of times slower, kept for comparison and guarded against collapse.
        use_trivialization: PyTorch's maps only, as there; the closed form takes any assigned matrix without it.

    Returns:
        The module itself, changed in place. ``torch.nn.utils.parametrize.remove_parametrizations(module, name)`` makes
        the matrix a plain parameter again, for export and scripting.

    Raises:
        ValueError: no such parameter, fewer than two dimensions, an unknown map.
        TypeError: no module, a weight that is not floating-point.

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
    if not isinstance(use_trivialization, bool):
        raise TypeError(f"use_trivialization must be True or False; got {checks.describe(use_trivialization)}")
    weight = getattr(module, name, None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(
            f"name must be that of a parameter, but module has no parameter {name!r}; {type(module).__name__} has "
            + (", ".join(repr(n) for n, _ in module.named_parameters(recurse=False)) or "no parameters")
        )
    checks.check_tensor(name, weight)
    if weight.dim() < 2:
        raise ValueError(f"{name} must have the shape (..., T, S); got {tuple(weight.shape)}")
    new_map = make_map(weight, "cayley" if orthogonal_map is None else orthogonal_map, use_trivialization)
    parametrize.register_parametrization(module, name, new_map)
    weights: Any = module.parametrizations
    if len(weights[name]) == 1:
        weights[name].__class__ = OrthogonalWeight
        _let_parameters_be_assigned(type(module))
    return module


def make_map(matrix: torch.Tensor, orthogonal_map: str, use_trivialization: bool = True) -> CayleyMap | TorchMap:
    checks.check_choice("orthogonal_map", orthogonal_map, ORTHOGONAL_MAPS)
    return CayleyMap(matrix) if orthogonal_map == "cayley" else TorchMap(matrix, orthogonal_map, use_trivialization)


def _let_parameters_be_assigned(parametrized: type) -> None:
    """``module.weight = old.weight`` for the class that PyTorch made for one module: there it is a KeyError.

    Only what is semi-orthogonal, as an old layer's weight: code that folds a scale into a weight would lose the scale.
    """

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and parametrize.is_parametrized(self, name):
            value = value.detach()
            if isinstance(self.get_submodule(f"parametrizations.{name}"), OrthogonalWeight):
                _check_semi_orthogonal(name, value)
        super(parametrized, self).__setattr__(name, value)  # type: ignore[arg-type, misc]

    if "__setattr__" not in vars(parametrized):
        parametrized.__setattr__ = __setattr__  # type: ignore[method-assign, assignment]


def _check_semi_orthogonal(name: str, parameter: torch.Tensor) -> None:
    if parameter.dim() < 2 or not checks.can_be_read(parameter) or checks.is_sharded(parameter):
        return  # what else is wrong with it the assignment says
    error = orthogonality_error(parameter).item()
    if error > (SEMI_ORTHOGONAL if parameter.dtype in checks.FULL_PRECISION else SEMI_ORTHOGONAL_16_BIT):
        raise ValueError(
            f"{name} is kept semi-orthogonal, and the Parameter assigned to it is not: max |PᵀP - I| is {error:.1e}. "
            f"Assign a tensor (parameter.detach()) to get its orthonormal factor, or make {name} a plain parameter "
            f"first: torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        )


@torch.no_grad()
def assign(
    orthogonal_map: CayleyMap | TorchMap,
    parameter: torch.Tensor,  # (..., T, S), perhaps sharded by FSDP2
    matrix: torch.Tensor,  # (..., T, S) of any floating-point dtype, on any device
) -> None:
    """Sets the parameter, and the map's signs, to what gives the matrix's orthonormal factor."""
    if matrix.shape != parameter.shape or (matrix.is_meta and not parameter.is_meta):
        raise ValueError(f"weight takes a tensor of shape {tuple(parameter.shape)}; got {checks.describe(matrix)}")
    if parameter.is_meta:
        return
    matrix = whole_as(at_least_float32(matrix.to(device=parameter.device)), parameter)
    _check_rank(matrix)
    parameter.copy_(sharded_as(orthogonal_map.right_inverse(matrix).to(parameter.dtype), parameter))


def _check_rank(matrix: torch.Tensor) -> None:  # (..., T, S)
    """An error for a matrix that decides no orthonormal factor, such as the zeros of a projection that collapsed."""
    if not checks.can_be_read(matrix) or not torch.isfinite(matrix).all():
        return  # orthonormal_factor says the latter
    tall = as_float64(matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT)
    own_parts = torch.linalg.qr(tall, mode="r").R.diagonal(dim1=-2, dim2=-1).abs()  # of the columns
    dependent = own_parts <= NO_PART_OF_ITS_OWN * torch.finfo(matrix.dtype).eps * tall.norm(dim=-2)
    if dependent.any():
        raise ValueError(
            "the matrix assigned to an orthogonal weight must have full rank, or it has no orthonormal factor of its "
            f"own: {int(dependent.sum(-1).max())} of its columns (rows, if wide) are zero or depend on the others; got "
            f"{checks.describe(matrix)}. Assign another matrix, or keep the weight that is there"
        )


@torch.no_grad()
def start(orthogonal_map: CayleyMap | TorchMap, parameter: torch.Tensor) -> None:  # (..., T, S)
    """A fresh matrix, uniformly distributed over the semi-orthogonal ones up to the signs of its columns."""
    matrix = whole_as(torch.randn_like(parameter), parameter)
    parameter.copy_(sharded_as(orthogonal_map.start(at_least_float32(matrix)).to(parameter.dtype), parameter))


def was_loaded(parameter: torch.Tensor) -> bool:
    """Whether ``from_pretrained`` of transformers has loaded the parameter, which must not be initialized again.

    transformers calls ``_init_weights`` for loaded modules, too; while it does, the functions of ``torch.nn.init``
    leave marked tensors alone. So such a function is asked; after loading, the mark alone says nothing.
    """
    if not getattr(parameter, "_is_hf_initialized", False):
        return False
    probe: Any = torch.zeros(())
    probe._is_hf_initialized = True
    return nn.init.ones_(probe).item() == 0


def at_least_float32(parameter: torch.Tensor) -> torch.Tensor:
    """For maps: FSDP2's mixed precision hands out a 16-bit copy of the parameter, whose P is as orthonormal."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


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
