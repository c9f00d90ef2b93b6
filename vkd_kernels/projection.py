"""From the student's channels to the teacher's: ``OrthogonalLinear`` and the projections that it is compared with."""

from collections.abc import Sequence
from typing import Any, TypeAlias, Union

import torch
import torch.nn.functional as F
from torch import nn

from .map_state import prepare_map_state
from .ops import checks
from .ops.cayley import cayley
from .ops.implementations import autocast_dtype
from .parametrization import CayleyMap, assign, at_least_float32, make_map, start, was_loaded

PROJECTIONS = ("orthogonal", "linear", "identity")
Projection: TypeAlias = Union["OrthogonalLinear", "LinearProjection", "IdentityProjection"]


def make_projection(
    projection: str,
    student_dim: int,
    teacher_dim: int,
    *,
    affine: bool = False,
    orthogonal_map: str = "cayley",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Projection:
    """The module behind the option ``projection`` of ``OrthoProjLoss`` and ``Pair``.

    All have ``weight`` ``(T, S)``, ``gain`` and ``bias`` (``(T,)`` or None), ``keeps_lengths``, ``to_linear()``,
    ``reset_parameters()`` and ``no_weight_decay()``.
    """
    check_projection(projection, orthogonal_map)
    if projection == "orthogonal":
        return OrthogonalLinear(
            student_dim, teacher_dim, affine=affine, orthogonal_map=orthogonal_map, device=device, dtype=dtype
        )
    kind = LinearProjection if projection == "linear" else IdentityProjection
    return kind(student_dim, teacher_dim, affine=affine, device=device, dtype=dtype)


def check_projection(projection: str, orthogonal_map: str = "cayley") -> None:
    checks.check_choice("projection", projection, PROJECTIONS)
    if projection != "orthogonal" and orthogonal_map != "cayley":
        raise ValueError(
            f"orthogonal_map belongs to projection='orthogonal'; got orthogonal_map={orthogonal_map!r} with "
            f"projection={projection!r}"
        )


def stacked_weights(projections: Sequence[Projection]) -> torch.Tensor:  # G of (T, S) -> (G, T, S)
    """The weights of projections of one shape, those by the Cayley map in one batched call."""
    unconstrained, signs = [], []
    for projection in projections:
        if isinstance(projection, OrthogonalLinear) and isinstance(projection.map, CayleyMap):
            unconstrained.append(at_least_float32(projection.unconstrained))
            signs.append(projection.map.checked_signs())
    if len(unconstrained) > 1 and len(unconstrained) == len(projections):
        return cayley(torch.stack(unconstrained)) * torch.stack(signs)
    return torch.stack([projection.weight for projection in projections])


def full_precision(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for; by default PyTorch's, or float32 where that has 16 bit, as in ``from_pretrained``."""
    if dtype is None:
        return torch.promote_types(torch.get_default_dtype(), torch.float32)
    if not isinstance(dtype, torch.dtype) or dtype not in checks.FULL_PRECISION:
        raise TypeError(f"dtype must be None, float32 or float64, where it stays; got {checks.describe(dtype)}")
    return dtype


class OrthogonalLinear(nn.Module):
    r"""A linear projection by a semi-orthogonal matrix: ``x Pᵀ``, or ``x Pᵀ · gain + bias`` with ``affine=True``.

    P is a point on the Stiefel manifold, at the start uniformly distributed up to the signs of its columns. Every
    access to ``weight`` computes it from the unconstrained parameter; assigning a matrix (of any floating-point dtype,
    on any device) sets P to that matrix's orthonormal QR factor.

    Args:
        in_features: S.
        out_features: T.
        affine: a gain and a bias per output channel.
        orthogonal_map: ``"cayley"``, or PyTorch's ``"matrix_exp"`` or ``"householder"``: see ``orthogonal``.
        dtype: float32 or float64; by default PyTorch's, or float32 where that has 16 bit.

    Attributes:
        weight: P ``(T, S)``: orthonormal columns for T >= S, orthonormal rows for T < S.
        unconstrained: the trained parameter ``(T, S)``; ``no_weight_decay()`` names it. P also needs the buffer
            ``map.signs``, which assigning a matrix sets: state dicts have both, ``parameters()`` the first only.

    Shape:
        ``(..., S) -> (..., T)``.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> layer, x = vk.OrthogonalLinear(192, 768), torch.randn(4, 192)
        >>> torch.allclose(layer(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-4)
        True
        >>> torch.allclose(layer.to_linear()(x), layer(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        affine: bool = False,
        orthogonal_map: str = "cayley",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_dim("in_features", in_features)
        checks.check_dim("out_features", out_features)
        dtype = full_precision(dtype)
        self.in_features, self.out_features = in_features, out_features
        self.unconstrained = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.map = make_map(self.unconstrained, orthogonal_map)
        if affine:
            self.gain = nn.Parameter(torch.ones(out_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("gain", None)
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A fresh P: also after ``to_empty()``, and in ``_init_weights`` of a transformers model."""
        if self.unconstrained.is_meta:
            return
        if not was_loaded(self.unconstrained):
            start(self.map, self.unconstrained)
        if self.gain is not None:
            nn.init.ones_(self.gain)
            nn.init.zeros_(self.bias)

    @property
    def weight(self) -> torch.Tensor:  # (T, S)
        return self.map(at_least_float32(self.unconstrained))

    @weight.setter
    def weight(self, matrix: torch.Tensor) -> None:  # (T, S)
        if not checks.is_sharded(matrix):
            checks.check_tensor("weight", matrix)
        assign(self.map, self.unconstrained, matrix)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, nn.Parameter):  # nn.Module would register it
            value = value.detach()
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        prepare_map_state(
            self.map,
            state_dict,
            parameter_key=f"{prefix}unconstrained",
            map_prefix=f"{prefix}map.",
            error_messages=arguments[-1],
        )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def keeps_lengths(self) -> bool:
        """Whether ``‖forward(x)‖ = ‖x‖`` for every x: PᵀP = I, and neither gain nor bias."""
        return self.out_features >= self.in_features and self.gain is None

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, as timm's models say it."""
        return {name for name, _ in self.named_parameters()}

    def to_linear(self, scale: float | torch.Tensor = 1.0) -> nn.Linear:
        """The same map as a plain ``nn.Linear``, with its own copy of P: for export, ONNX, scripting and inference.

        ``scale`` is that of an ``OrthoProjLoss``: it multiplies the projected features, not the bias.
        """
        return _to_linear(self.weight, self.gain, self.bias, scale, self.unconstrained.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., S) -> (..., T)
        _check_input(x, self.in_features, self.unconstrained)
        weight = self.weight if self.gain is None else self.weight * self.gain[:, None]
        return F.linear(x, weight.to(self.unconstrained.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, affine={self.gain is not None}"


class LinearProjection(nn.Linear):
    """Any trained matrix, what an orthogonal projection is compared with: an ``nn.Linear``, whose bias is ``affine``.

    A gain would add nothing to the weight, so there is none. The weight is for weight decay as that of any layer.
    """

    gain: None = None
    keeps_lengths = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_dim("in_features", in_features)
        checks.check_dim("out_features", out_features)
        super().__init__(in_features, out_features, bias=affine, device=device, dtype=full_precision(dtype))

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def no_weight_decay(self) -> set[str]:
        return set() if self.bias is None else {"bias"}

    def to_linear(self, scale: float | torch.Tensor = 1.0) -> nn.Linear:
        return _to_linear(self.weight, self.gain, self.bias, scale, self.weight.dtype)


class IdentityProjection(nn.Module):
    """Nothing trained: the student's channels stand beside the teacher's first ones, or the student's first ones
    beside the teacher's.

    For S < T the teacher's other channels are compared with 0, which adds a constant to the loss and nothing to its
    gradient. ``affine`` is a trained gain and bias per teacher channel.
    """

    like: torch.Tensor  # empty; where the matrix is made, and in which dtype

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_dim("in_features", in_features)
        checks.check_dim("out_features", out_features)
        dtype = full_precision(dtype)
        self.in_features, self.out_features = in_features, out_features
        # Made anew at every access, the matrix survives to_empty() and loaders that leave such buffers undefined.
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)
        if affine:
            self.gain = nn.Parameter(torch.ones(out_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("gain", None)
            self.register_parameter("bias", None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.gain is not None and not self.gain.is_meta:
            nn.init.ones_(self.gain)
            nn.init.zeros_(self.bias)

    @property
    def weight(self) -> torch.Tensor:  # (T, S)
        return torch.eye(self.out_features, self.in_features, dtype=self.like.dtype, device=self.like.device)

    @property
    def keeps_lengths(self) -> bool:
        return self.out_features >= self.in_features and self.gain is None

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters()}

    def to_linear(self, scale: float | torch.Tensor = 1.0) -> nn.Linear:
        return _to_linear(self.weight, self.gain, self.bias, scale, self.like.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., S) -> (..., T)
        _check_input(x, self.in_features, self.like)
        x = F.pad(x[..., : self.out_features], (0, max(self.out_features - self.in_features, 0)))
        return x if self.gain is None else x * self.gain + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, affine={self.gain is not None}"


def _check_input(x: torch.Tensor, in_features: int, weight: torch.Tensor) -> None:  # (..., S), any
    checks.check_tensor("x", x)
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x must have the shape (..., {in_features}); got {tuple(x.shape)}")
    checks.check_same_device("x", x, "weight", weight)
    if x.dtype != weight.dtype and autocast_dtype(x.device.type) is None:
        raise TypeError(f"x must have the dtype of weight, {weight.dtype}; got {checks.describe(x)}")


@torch.no_grad()
def _to_linear(
    weight: torch.Tensor,  # (T, S)
    gain: torch.Tensor | None,  # (T,)
    bias: torch.Tensor | None,  # (T,)
    scale: float | torch.Tensor,
    dtype: torch.dtype,
) -> nn.Linear:
    """scale · (x weightᵀ · gain) + bias: the scale of a loss multiplies the projected student, not the bias."""
    t, s = weight.shape
    linear = nn.Linear(s, t, bias=bias is not None, device="meta", dtype=dtype)  # draws no random numbers
    weight = weight if gain is None else weight * gain[:, None]
    linear.weight = nn.Parameter((weight * scale).to(dtype).clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype).clone())
    return linear
