"""The loss fused into Triton kernels: launch.py (start here), kernels.py, tiles.py; spec.py lists what is offered."""

from collections.abc import Sequence

import torch

from ..chunks import WORKSPACE_BYTES
from ..spec import LossGroup, LossInputs, LossSpec
from . import launch
from .launch import column_sums

__all__ = [
    "column_square_sums",
    "column_sums",
    "group_loss",
    "loss",
    "semi_orthogonal_group_loss",
    "semi_orthogonal_loss",
    "student_scatters",
    "unsupported",
]


def unsupported(spec: LossSpec) -> str | None:
    """The reason why these kernels can't compute the loss, or None."""
    if len(spec.loss) > 1 or spec.share("cosine"):
        return f"the Triton kernels have no loss {dict(spec.loss)}"
    if spec.normalization == "l2":
        return "the Triton kernels have no normalization 'l2'"
    return None


def loss(spec: LossSpec, inputs: LossInputs, *, workspace_bytes: int = WORKSPACE_BYTES) -> torch.Tensor:  # ()
    return launch.fused_loss(
        student=inputs.student,
        teacher=inputs.teacher,
        weight=inputs.weight,
        bias=inputs.bias,
        row_weight=inputs.row_weight,
        channel_shift=inputs.channel_shift,
        channel_scale=inputs.channel_scale,
        layer_norm=spec.normalization == "layer_norm",
        eps=spec.eps,
        loss=spec.loss[0][0],
        beta=spec.beta,
        denominator=inputs.denominator,
        workspace_bytes=workspace_bytes,
    )


def group_loss(spec: LossSpec, group: LossGroup, *, workspace_bytes: int = WORKSPACE_BYTES) -> torch.Tensor:  # (G,)
    return launch.fused_losses(
        students=group.students,
        teachers=group.teachers,
        weight=group.weights,
        bias=group.bias,
        row_weights=group.row_weights,
        channel_shift=group.channel_shift,
        channel_scale=group.channel_scale,
        denominators=group.denominators,
        layer_norm=spec.normalization == "layer_norm",
        eps=spec.eps,
        loss=spec.loss[0][0],
        beta=spec.beta,
        workspace_bytes=workspace_bytes,
    )


def semi_orthogonal_loss(
    spec: LossSpec, inputs: LossInputs, *, workspace_bytes: int = WORKSPACE_BYTES
) -> torch.Tensor:  # ()
    return launch.fused_orthonormal_mse(
        inputs.student,
        inputs.teacher,
        inputs.weight,
        inputs.row_weight,
        scale=inputs.scale,
        layer_norm=spec.normalization == "layer_norm",
        eps=spec.eps,
        denominator=inputs.denominator,
        workspace_bytes=workspace_bytes,
    )


def semi_orthogonal_group_loss(spec: LossSpec, group: LossGroup) -> torch.Tensor:  # (G,)
    return launch.fused_orthonormal_mses(
        group.students,
        group.teachers,
        group.weights,
        group.row_weights,
        scale=group.scale,
        layer_norm=spec.normalization == "layer_norm",
        eps=spec.eps,
        denominators=group.denominators,
    )


def column_square_sums(
    rows: Sequence[torch.Tensor], row_weights: Sequence[torch.Tensor | None], means: torch.Tensor
) -> torch.Tensor:  # (G, C)
    return launch.column_centred_square_sums(rows, row_weights, means)


def student_scatters(
    students: Sequence[torch.Tensor],
    row_weights: Sequence[torch.Tensor | None],
    sums: torch.Tensor,
    means: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # (G, S), (G, S, S)
    return launch.student_moments(students, row_weights, sums, means)
