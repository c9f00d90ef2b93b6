"""The loss of the classification task, with the student inside: labels, the teacher's logits, the teacher's features.

L = CE(class head, labels) + logit_weight * KL(teacher || distillation head) + weight * smooth_l1(X P^T, norm(Y))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import OptionError
from ..projections import make_feature_loss
from . import models


@dataclass
class Batch:
    """One rank's share of one step. A target of zeros: the student may not see that label."""

    images: torch.Tensor  # (N, channels, H, W)
    targets: torch.Tensor  # (N, classes), smoothed and mixed
    teacher_logits: torch.Tensor | None = None  # (N, classes)
    teacher_features: torch.Tensor | None = None  # (N, T), or (N, positions, T) where tokens are distilled


class DistilledStudent(nn.Module):
    """What is trained: the student, and the projection of the feature loss beside it. `forward(batch)` -> losses.

    Both are in one module so that data-parallel wrapping reduces the gradients of both. Every rank holds as many images
    as any other, so the mean of the ranks' losses is the loss of the global batch. `labelled_share` says how many of
    the global batch's images have labels.
    """

    def __init__(
        self,
        student: models.Model,
        distill: Any,
        teacher_dim: int,
        labelled_share: float = 1.0,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.student, self.distill, self.labelled_share = student, distill, labelled_share
        self.feature_loss: Any = None
        if distill.weight:
            self.feature_loss = make_feature_loss(
                distill.projection, student.num_features, teacher_dim, scale=distill.scale, beta=distill.beta,
                normalization=distill.normalization, process_group=process_group,
                eps=distill.eps or (1e-3 if distill.normalization == "whiten" else 1e-5),
            )  # fmt: skip

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        tokens, logits, distilled = models.run(self.student, batch.images)
        losses = {"labels": self.label_loss(logits, batch.targets)}
        total = losses["labels"]
        if batch.teacher_logits is not None:
            losses["logits"] = distillation(distilled, batch.teacher_logits, self.distill.temperature)
            total = total + self.distill.logit_weight * losses["logits"]
        elif distilled is not logits:  # nobody else teaches the second head, and its logits count in evaluation
            losses["labels"] = total = (total + self.label_loss(distilled, batch.targets)) / 2
        if batch.teacher_features is not None:
            losses["features"] = self.feature_loss(*same_positions(tokens, batch.teacher_features))
            total = total + self.distill.weight * losses["features"]
        return {**losses, "total": total}

    def label_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, mean over the global batch's labelled images."""
        return F.cross_entropy(logits.float(), targets) / self.labelled_share  # that of a target of zeros is zero


def distillation(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of the softened classes, times temperature^2, mean over the rows."""
    student, teacher = (F.log_softmax(x.float() / temperature, dim=1) for x in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def teacher_features(tokens: torch.Tensor, distill: Any) -> torch.Tensor:
    """What the student learns from the teacher's positions (N, P, T): their mean (N, T), or all of them."""
    return tokens.mean(dim=1) if distill.features == "pooled" else tokens


def same_positions(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's (N, P, S) against the teacher's (N, T): the mean; against (N, P', T): the finer grid resampled."""
    if teacher.dim() == 2:
        return student.mean(dim=1), teacher
    count = min(student.shape[1], teacher.shape[1])
    return resampled(student, count), resampled(teacher, count)


def resampled(tokens: torch.Tensor, count: int) -> torch.Tensor:  # (N, P, C) -> (N, count, C)
    before, after = math.isqrt(tokens.shape[1]), math.isqrt(count)
    if tokens.shape[1] == count:
        return tokens
    if (before**2, after**2) != (tokens.shape[1], count):
        raise OptionError(
            f"distill.features: tokens can be compared on square grids only, got {tokens.shape[1]} and {count} "
            "positions; use distill.features=pooled"
        )
    grid = tokens.float().transpose(1, 2).unflatten(2, (before, before))
    return F.interpolate(grid, (after, after), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
