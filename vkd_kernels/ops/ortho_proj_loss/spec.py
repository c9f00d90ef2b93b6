r"""What a call of the loss is: ``LossSpec`` (options), ``LossInputs`` (one loss), ``LossGroup`` (several at once).

api.py makes the options of the caller's arguments; dispatch.py makes inputs or a group, with statistics, targets and
scale folded in. Every implementation takes them whole; they are flattened once, by name, where it calls its operator.

**What is computed.** With t = (normalize(y) - channel_shift) · channel_scale and z = x weightᵀ + bias, row by row::

    L = Σ_n w_n [ mse · Σ_j d² + smooth_l1 · Σ_j h_β(d) + cosine · (1 - cos(z, t)) ] / denominator         d = z - t

with the coefficients that ``LossSpec.coefficients(T)`` gives, h_β(d) = d²/2β below β and |d| - β/2 from there on, and
cos(z, t) = ⟨z, t⟩ / (max(‖z‖, 1e-8) max(‖t‖, 1e-8)). ``denominator`` is the rows' total weight (of all ranks) times T
for the mean, 1 for the sum, and never 0. Rows of weight 0 count nowhere, whatever they hold.

**What an implementation offers** (``chunked`` and ``triton``; ``reference`` has ``loss`` alone)::

    loss(spec, inputs) -> ()                                            differentiable in student, weight, bias
    group_loss(spec, group) -> (G,)                                     the loss of each of the group's inputs
    semi_orthogonal_loss(spec, inputs) -> ()                            differentiable in student, weight, scale
    semi_orthogonal_group_loss(spec, group) -> (G,)
    column_sums(rows, row_weights) -> (G, C)                            Σ_n w_n x_n; no gradient
    column_square_sums(rows, row_weights, means) -> (G, C)              Σ_n w_n (x_n - mean)²; no gradient
    student_scatters(students, row_weights, sums, means) -> (G, S), (G, S, S)
                                      sums themselves and Σ_n w_n (x_n - mean)(x_n - mean)ᵀ, differentiable in students

They see row normalizations only (``ROW_NORMALIZATIONS``): dispatch.py turns ``batch_norm`` into channel_shift,
channel_scale, another weight and bias, and computes the targets of ``whiten`` and of a module beforehand. Losses and
statistics are in ``acc_dtype`` (float32; float64 for float64), gradients in their tensors' dtypes. Row statistics take
sequences of G tensors (N, C) and of their (N,) weights or None.

**The semi-orthogonal form**: weightᵀ weight = I, S <= T, no bias, no channel statistics, ``mse`` and ``cosine`` alone
(``LossSpec.needs_no_z``). It writes nothing of N x T. ``weight`` is P itself and ``scale`` c stays apart::

    ‖c x Pᵀ - t‖² = ‖c x - t P‖² + (‖t‖² - ‖t P‖²)           cos = ⟨c x, t P⟩ / (max(‖c x‖, 1e-8) max(‖t‖, 1e-8))

The gradient of weight leaves out what is normal to the manifold, P Xᵀ diag(·) X, which vanishes through any orthogonal
parametrization. The bracket cancels where t lies almost in the span of P (a teacher with a large mean, S near T): the
loss must not become negative nor less accurate than the plain form's, so that Z is formed after all where the result is
small against what it is the difference of. without_z.py can look at numbers on a CPU; in triton/semi_orthogonal.py the
device decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from .ranks import RankAgreement

ROW_NORMALIZATIONS = ("layer_norm", "l2", "none")  # those that a row of the teacher has by itself
NORM_FLOOR = 1e-8  # ‖z‖ and ‖t‖ in the cosine are at least that


@dataclass(frozen=True)
class LossSpec:
    """The options of a loss; hashable, so that what an implementation prepares for it can be kept."""

    normalization: str | nn.Module = "layer_norm"
    eps: float = 1e-5
    loss: tuple[tuple[str, float], ...] = (("smooth_l1", 1.0),)  # (name, its share), each name once
    beta: float = 1.0
    reduction: str = "mean"

    @staticmethod
    def shares(loss: str | Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """The field ``loss`` of a caller's name or ``{name: share}``; terms with a share of 0 are left out."""
        if isinstance(loss, str):
            return ((loss, 1.0),)
        return tuple(sorted((name, float(share)) for name, share in loss.items() if share))

    @property
    def is_cosine_alone(self) -> bool:
        return all(name == "cosine" for name, _ in self.loss)

    def share(self, name: str) -> float:
        """The share of a loss in the mixture, 0.0 where it has none."""
        return dict(self.loss).get(name, 0.0)

    def coefficients(self, teacher_dim: int) -> "Coefficients":
        """What the terms of a row are multiplied by; the cosine by T too, where the denominator counts N·T elements."""
        shares = dict(self.loss)
        cosine = shares.get("cosine", 0.0)
        return Coefficients(
            mse=shares.get("mse", 0.0),
            smooth_l1=shares.get("smooth_l1", 0.0),
            cosine=cosine * teacher_dim if self.reduction == "mean" else cosine,
        )

    @property
    def needs_no_z(self) -> bool:
        """Whether the semi-orthogonal form can compute it."""
        return self.normalization in ROW_NORMALIZATIONS and not self.share("smooth_l1")


@dataclass(frozen=True)
class Coefficients:
    mse: float
    smooth_l1: float
    cosine: float


@dataclass(frozen=True)
class LossInputs:
    """The tensors of one loss: 2-D, on one device."""

    student: torch.Tensor  # (N, S), in the product's dtype
    teacher: torch.Tensor  # (N, T) of any floating dtype; a constant
    weight: torch.Tensor  # (T, S), with the scale folded in but for the semi-orthogonal form; used in student's dtype
    denominator: float | torch.Tensor  # number or (), acc_dtype; never 0
    row_weight: torch.Tensor | None = None  # (N,) acc_dtype, not negative; a constant
    bias: torch.Tensor | None = None  # (T,) acc_dtype
    channel_shift: torch.Tensor | None = None  # (T,) acc_dtype; a constant
    channel_scale: torch.Tensor | None = None  # (T,) acc_dtype; a constant
    scale: float | torch.Tensor = 1.0  # number, () or (T,); not folded in yet, or apart for the semi-orthogonal form

    def folded(self) -> "LossInputs":
        """With the scale folded into the weight, which leaves every angle as it is."""
        weight = _scaled(self.weight, self.scale)
        return self if weight is self.weight else replace(self, weight=weight, scale=1.0)


@dataclass(frozen=True)
class LossGroup:
    """The tensors of G losses of equal S and T."""

    students: tuple[torch.Tensor, ...]  # G of (N, S), of one dtype
    teachers: tuple[torch.Tensor, ...]  # G of (N, T), of one dtype
    weights: torch.Tensor  # (G, T, S)
    denominators: tuple[float, ...] | torch.Tensor  # G numbers, or (G,)
    row_weights: tuple[torch.Tensor | None, ...]  # G of (N,) or None
    bias: torch.Tensor | None = None  # (G, T)
    channel_shift: torch.Tensor | None = None  # (G, T)
    channel_scale: torch.Tensor | None = None  # (G, T)
    scale: float | torch.Tensor = 1.0  # number, (G,) or (G, T); as in LossInputs

    def folded(self) -> "LossGroup":
        """As in LossInputs."""
        weights = _scaled(self.weights, self.scale)
        return self if weights is self.weights else replace(self, weights=weights, scale=1.0)

    def __len__(self) -> int:
        return len(self.students)

    def inputs(self) -> list[LossInputs]:
        """The inputs of every loss, as views."""
        return [
            LossInputs(
                student=self.students[g],
                teacher=self.teachers[g],
                weight=weight,
                denominator=self.denominators[g],
                row_weight=self.row_weights[g],
                bias=_entry(self.bias, g),
                channel_shift=_entry(self.channel_shift, g),
                channel_scale=_entry(self.channel_scale, g),
                scale=self.scale[g] if isinstance(self.scale, torch.Tensor) else self.scale,
            )
            for g, weight in enumerate(self.weights.unbind(0))  # its gradient is one tensor; indexing would add up G
        ]

    def split(self, sizes: list[int]) -> list["LossGroup"]:
        """Groups of the first sizes[0] losses, of the next sizes[1], ..., as views."""
        groups, first = [], 0
        for size, weights in zip(sizes, self.weights.split(sizes), strict=True):
            entries = slice(first, first + size)
            first += size
            groups.append(
                LossGroup(
                    students=self.students[entries],
                    teachers=self.teachers[entries],
                    weights=weights,
                    denominators=self.denominators[entries],
                    row_weights=self.row_weights[entries],
                    bias=_entry(self.bias, entries),
                    channel_shift=_entry(self.channel_shift, entries),
                    channel_scale=_entry(self.channel_scale, entries),
                    scale=self.scale[entries] if isinstance(self.scale, torch.Tensor) else self.scale,
                )
            )
        return groups


def _scaled(weight: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """weight (..., T, S) times a number, or (...), or (..., T)."""
    if not isinstance(scale, torch.Tensor):
        return weight if scale == 1.0 else weight * scale
    return weight * scale.to(weight.dtype)[(..., *[None] * (weight.dim() - scale.dim()))]


def _entry(values: torch.Tensor | None, index: int | slice) -> torch.Tensor | None:
    return None if values is None else values[index]


@dataclass(frozen=True)
class Execution:
    """How a loss is computed, beside what it is."""

    process_group: "dist.ProcessGroup | None" = None  # statistics and mean over the rows of all its ranks
    backend: str | None = None  # the caller's request
    semi_orthogonal: bool = False  # weightᵀ weight = I and S <= T are known to hold
    agreement: "RankAgreement | None" = None  # asks now and then whether the ranks hold the same weight


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses, statistics and unscaled gradients of a weight are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
