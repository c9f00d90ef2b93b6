"""The feature loss that a task's `distill` section asks for: V_kD's, or the same through another projection."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import vkd_kernels as vk

from .config import OptionError


def make_feature_loss(
    kind: str, student_dim: int, teacher_dim: int, *, scale: float | str, **options: Any
) -> nn.Module:
    """`loss(student (..., S), teacher (..., T), mask=None)` -> scalar; `loss.projection.weight` is the matrix (T, S).

    Args:
        kind: "orthogonal" (`OrthoProjLoss`), "linear" (any trained matrix), or "none" (nothing is trained: the
            student's channels are compared with the teacher's first ones, the teacher's other channels with 0).
        scale: of the projected student: a number, "match" or, for "orthogonal" alone, "learned".
        options: of `functional.ortho_proj_loss`: normalization, beta, eps, process_group, ...
    """
    if kind == "orthogonal":
        return vk.OrthoProjLoss(student_dim, teacher_dim, scale=scale, **options)
    if scale == "learned":
        raise OptionError("distill.scale: learned goes with distill.projection=orthogonal")
    number = math.sqrt(teacher_dim / student_dim) if scale == "match" else scale
    projection = (
        nn.Linear(student_dim, teacher_dim, bias=False) if kind == "linear" else Fixed(student_dim, teacher_dim)
    )
    return ProjectedLoss(projection, scale=number, **options)


class ProjectedLoss(nn.Module):
    """`functional.ortho_proj_loss` with the weight of a module that it holds."""

    def __init__(self, projection: nn.Module, **options: Any) -> None:
        super().__init__()
        self.projection, self.options = projection, options

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters()}

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        weight: Any = self.projection.weight
        return vk.functional.ortho_proj_loss(student, teacher, weight, mask=mask, **self.options)


class Fixed(nn.Module):
    """[I; 0], or [I 0] where the student is wider."""

    weight: Tensor  # (T, S)

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(teacher_dim, student_dim), persistent=False)
