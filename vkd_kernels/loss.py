"""``OrthoProjLoss``: the feature loss with its own semi-orthogonal projection, as a module."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import diagnostics
from .ops import checks, implementations
from .ops.normalization.all_reduce import HasProcessGroup, share_group
from .ops.ortho_proj_loss import api
from .ops.ortho_proj_loss.ranks import RankAgreement
from .ops.ortho_proj_loss.spec import Execution, LossSpec
from .projection import full_precision, make_projection
from .training_watch import TrainingWatch

TASKS: dict[str, dict[str, Any]] = {  # the paper's normalization for each of its tasks (sections 4.1 to 4.3)
    "classification": {"normalization": "layer_norm"},
    "detection": {"normalization": "batch_norm"},
    "generation": {"normalization": "whiten", "eps": 1e-3},
}


def matched_scale(student_dim: int, teacher_dim: int) -> float:
    """√(T / S), by which a vector of norm √S gets norm √T; at least 1, as a wide P shortens to about √T itself."""
    return math.sqrt(max(teacher_dim / student_dim, 1.0))


def starting_scale(
    scale: Any,
    student_dim: int,
    teacher_dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> float | nn.Parameter:
    """What the option ``scale`` stands for: the number, √(T / S) but at least 1, or the parameter that starts there."""
    if not isinstance(scale, str):
        checks.check_number("scale", scale)
        return scale
    checks.check_choice("scale", scale, ("match", "learned"))
    matched = matched_scale(student_dim, teacher_dim)
    if scale == "match":
        return matched
    # One element rather than a 0-d tensor, which fully_shard refuses.
    return nn.Parameter(torch.full((1,), matched, device=device, dtype=full_precision(dtype)))


class OrthoProjLoss(HasProcessGroup, nn.Module):
    r"""Feature distillation through a semi-orthogonal projection (V_kD, CVPR 2024): one module, one scalar.

    ::

        Z = scale · student Pᵀ  (· gain + bias with affine)      PᵀP = I, trained
        L = mean of ρ(Z - normalize(teacher)), or of 1 - cos(z, t)

    A semi-orthogonal P keeps lengths: a student vector of norm √S stays there while a layer-normed or whitened teacher
    vector has norm √T. ``scale="match"`` multiplies by √(T / S), which preserves every angle (by 1 for S >= T, where P
    takes the norm to about √T itself); ``"learned"`` starts there and trains. The default 1.0 is the paper's.

    Args:
        student_dim: S, channels of the student's features.
        teacher_dim: T, channels of the teacher's features.
        normalization, loss, beta, reduction, eps, process_group, backend: see ``functional.ortho_proj_loss``.
        scale: a number, ``"match"`` or ``"learned"``.
        affine: a gain and a bias per teacher channel.
        orthogonal_map: ``"cayley"``, or PyTorch's ``"matrix_exp"`` or ``"householder"``: see ``orthogonal``.
        projection: ``"orthogonal"``; to compare with it, ``"linear"`` (any trained matrix; ``affine`` adds its bias) or
            ``"identity"`` (nothing is trained: equal channels are compared, of unequal numbers the first ones, and the
            teacher's other channels with 0, which adds a constant to the loss and nothing to its gradient).
        device, dtype: of the projection, float32 or float64, under autocast too; by default PyTorch's dtype, or float32
            where that has 16 bit.

    Attributes:
        projection: the ``OrthogonalLinear`` (or what was asked for); ``projection.weight`` is P ``(T, S)``.
        scale: the number, or the parameter ``(1,)`` that learns it.

    Shape:
        ``forward(student (..., S), teacher (..., T), mask (...) or None)`` -> float32 scalar (float64 for float64).

    The module's parameters train with the student's: give them to the optimizer, without weight decay
    (``no_weight_decay()`` names them). Under data parallelism put the module inside the wrapped one, so that its
    gradients are reduced too. A process group stays with deep copies and does not travel with pickles.

    Example:
        >>> import torch
        >>> from vkd_kernels import OrthoProjLoss
        >>> distill = OrthoProjLoss(student_dim=192, teacher_dim=1024)
        >>> loss = distill(torch.randn(8, 192, requires_grad=True), torch.randn(8, 1024))
        >>> loss.backward()
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        normalization: str | nn.Module = "layer_norm",
        loss: str | Mapping[str, float] = "smooth_l1",
        beta: float = 1.0,
        reduction: str = "mean",
        scale: float | str = 1.0,
        affine: bool = False,
        eps: float = 1e-5,
        orthogonal_map: str = "cayley",
        projection: str = "orthogonal",
        process_group: "dist.ProcessGroup | None" = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        checks.check_dim("student_dim", student_dim)
        checks.check_dim("teacher_dim", teacher_dim)
        api.check_options(normalization, loss, beta, eps, reduction)
        api.check_scale_acts(LossSpec(loss=LossSpec.shares(loss)), scale, channel_dims=1)
        implementations.requested("ortho_proj_loss", backend)
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.normalization, self.loss, self.beta, self.eps, self.reduction = normalization, loss, beta, eps, reduction
        self._set_group(process_group)
        self.backend = backend
        self._agreement = RankAgreement()  # whether the ranks train one projection
        self.watch = TrainingWatch()
        self.projection = make_projection(
            projection,
            student_dim,
            teacher_dim,
            affine=affine,
            orthogonal_map=orthogonal_map,
            device=device,
            dtype=dtype,
        )
        self.scale = starting_scale(scale, student_dim, teacher_dim, device, dtype)

    def _set_group(self, group: "dist.ProcessGroup | None") -> None:
        before = self.process_group
        super()._set_group(group)
        share_group(self.normalization, group, before=before)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A fresh projection, and a learned scale back where it starts: also for modules built on the meta device.

        A module that makes the targets keeps its statistics, and has a ``reset_parameters()`` of its own. From the meta
        device they come as new.
        """
        self.projection.reset_parameters()
        if isinstance(self.scale, nn.Parameter):
            nn.init.constant_(self.scale, matched_scale(self.student_dim, self.teacher_dim))

    @classmethod
    def for_task(cls, task: str, student_dim: int, teacher_dim: int, **options: Any) -> "OrthoProjLoss":
        """The paper's choices for ``"classification"``, ``"detection"`` or ``"generation"``; options override them."""
        checks.check_choice("task", task, TASKS)
        return cls(student_dim, teacher_dim, **{**TASKS[task], **options})

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: all but a linear projection's weight."""
        spared = {f"projection.{name}" for name in self.projection.no_weight_decay()}
        return spared | ({"scale"} if isinstance(self.scale, nn.Parameter) else set())

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        gain = self.projection.gain
        scale: float | torch.Tensor = self.scale
        if gain is not None:
            scale = gain * self.scale
        elif isinstance(scale, torch.Tensor):
            scale = scale[0]
        value = api.projected_loss(
            student,
            teacher,
            self.projection.weight,
            scale=scale,
            bias=self.projection.bias,
            mask=mask,
            spec=self.spec,
            execution=self.execution(self.process_group),
        )
        if self.training:
            self.watch.look(type(self).__name__, student, self.projection)
        return value

    @property
    def spec(self) -> LossSpec:
        """The options of the loss, as its implementations take them."""
        return LossSpec(
            normalization=self.normalization,
            eps=float(self.eps),
            loss=LossSpec.shares(self.loss),
            beta=float(self.beta),
            reduction=self.reduction,
        )

    def execution(self, process_group: "dist.ProcessGroup | None") -> Execution:
        """How the loss is to be computed over the ranks of a group; by this process alone in eval mode."""
        return Execution(
            process_group=process_group if self.training else None,  # evaluation may run on one rank
            backend=self.backend,
            semi_orthogonal=self.projection.keeps_lengths,
            agreement=self._agreement,
        )

    def metrics(
        self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Diagnostics of features and projection, for a logger now and then: see ``diagnostics.metrics``."""
        return diagnostics.metrics(
            student,
            teacher,
            self.projection.weight,
            mask=mask,
            process_group=self.process_group if self.training else None,
        )

    def extra_repr(self) -> str:
        scale = "learned" if isinstance(self.scale, torch.Tensor) else f"{self.scale:g}"
        named = f"normalization={self.normalization!r}, " if isinstance(self.normalization, str) else ""
        return f"{named}loss={self.loss!r}, beta={self.beta}, scale={scale}, eps={self.eps}"
