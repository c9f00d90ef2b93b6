"""The loss of the detection task, with the student inside: the detector's own, and features of maps and queries.

    L = the detector's losses + weight * sum over features of smooth_l1(norm(X P^T), norm(Y))

`batch_norm` standardises both sides per channel over all rows of the batch. Rows are the locations of a map, inside
ground-truth boxes or in all of the image but never in its padding; and queries, of one layer or of all layers together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import vkd_kernels as vk

from ..config import OptionError
from ..runs import RunError
from .coco import Batch, at_map
from .models import Detector


class DistilledDetector(nn.Module):
    """What is trained: the student, and the projections beside it. `forward(batch)` -> losses.

    Both are in one module so that data-parallel wrapping reduces the gradients of both. Ranks hold different numbers of
    objects: each divides by the number of all, so that the mean of the ranks is the loss of the global batch.
    """

    def __init__(
        self, student: Detector, distill: Any, teacher_dims: dict[str, int], process_group: Any = None
    ) -> None:
        super().__init__()
        self.student, self.distill, self.group = student, distill, process_group
        self.feature_loss = None
        if distill.weight:
            self.feature_loss = FeatureLoss(distill, student.dims, teacher_dims, process_group)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        prediction = self.student.predict(batch.images, batch.inside, batch.boxes, batch.labels)
        share = share_of_ranks(prediction.objects, self.group)
        losses = {name: loss / share for name, loss in prediction.losses.items()}
        total = torch.stack([*losses.values()]).sum()
        if self.feature_loss is not None:
            found = self.feature_loss(prediction.features, batch)
            losses["features"] = found.sum()
            total = total + self.distill.weight * losses["features"]
            if len(found) > 1:
                losses |= {f"features/{name}": x for name, x in zip(self.feature_loss.names, found, strict=True)}
        return {**losses, "total": total}


def share_of_ranks(count: Tensor, group: Any) -> Tensor:
    """The number of objects of all ranks by the number of ranks: what a rank's sum is to be divided by. At least 1."""
    total, ranks = count.detach().float(), 1
    if group is not None:
        ranks = torch.distributed.get_world_size(group)
        torch.distributed.all_reduce(total, group=group)
    return total.clamp(min=1) / ranks


class FeatureLoss(nn.Module):
    """A projection for every feature, those of equal shape in one batched Cayley call and one batched loss.

    projection: "orthogonal", the paper's; "linear", any trained matrix; "none": nothing is trained, the student's
    channels are the teacher's first ones.
    """

    def __init__(
        self, distill: Any, student_dims: dict[str, int], teacher_dims: dict[str, int], process_group: Any = None
    ) -> None:
        super().__init__()
        if student_dims.keys() != teacher_dims.keys():
            raise OptionError(
                f"teacher.name, student.name: their features differ: {', '.join(teacher_dims)} of the teacher, "
                f"{', '.join(student_dims)} of the student"
            )
        self.distill, self.group, self.names = distill, process_group, [*student_dims]
        self.shapes: dict[str, list[str]] = {}  # "TxS" -> names of the features
        shapes = {}
        for name, s in student_dims.items():
            key = f"{teacher_dims[name]}x{s}"
            self.shapes.setdefault(key, []).append(name)
            shapes[key] = (teacher_dims[name], s)
        self.projections = nn.ModuleDict({
            key: Projections(distill.projection, len(self.shapes[key]), *shape) for key, shape in shapes.items()
        })  # fmt: skip

    def forward(self, student: dict[str, Tensor], batch: Batch) -> Tensor:  # (number of features,)
        d, found = self.distill, dict[str, Tensor]()
        eps = d.eps or (1e-3 if d.normalization == "whiten" else 1e-5)
        teacher = batch.teacher or {}
        for name in self.names:
            if student[name].shape[:-1] != teacher[name].shape[:-1]:
                raise RunError(
                    f"teacher and student must have the same positions and queries; {name} is "
                    f"{(*teacher[name].shape,)} of the teacher and {(*student[name].shape,)} of the student"
                )
        for key, names in self.shapes.items():
            weight: Any = self.projections[key].weight  # (G, T, S)
            scale = math.sqrt(weight.shape[-2] / weight.shape[-1]) if d.scale == "match" else d.scale
            losses = vk.functional.ortho_proj_losses(
                [student[name] for name in names], [teacher[name] for name in names], weight,
                scale=None if scale == 1.0 else scale,
                masks=[rows(batch, student[name].shape[1:3], d.where) if "map" in name else None for name in names],
                normalization=d.normalization, beta=d.beta, eps=eps, process_group=self.group,
            )  # fmt: skip
            found |= zip(names, losses, strict=True)
        return torch.stack([found[name] for name in self.names])


class Projections(nn.Module):
    """Matrices (G, T, S) of one kind."""

    weight: Tensor

    def __init__(self, kind: str, count: int, t: int, s: int) -> None:
        super().__init__()
        if kind == "none":
            self.register_buffer("weight", torch.eye(t, s).expand(count, t, s).clone(), persistent=False)
            return
        layers = [nn.Linear(s, t, bias=False).weight.detach() for _ in range(count)]
        self.weight = nn.Parameter(torch.stack(layers))
        if kind == "orthogonal":
            nn.init.normal_(self.weight)  # uniformly distributed, once it is orthonormal
            vk.orthogonal(self)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters()}


def rows(batch: Batch, size: Any, where: str) -> Tensor:
    """Which locations of maps of size (height, width) are compared: (N, height, width) bool."""
    height, width = size
    valid = at_map(batch.inside, height, width)
    if where == "image":
        return valid
    y, x = (
        (torch.arange(cells, device=valid.device) + 0.5) * (pixels / cells)
        for cells, pixels in zip((height, width), batch.images.shape[-2:], strict=True)
    )
    x0, y0, x1, y1 = batch.boxes.unbind(-1)  # each (N, M)
    in_x = (x > x0[..., None]) & (x < x1[..., None])  # (N, M, width)
    in_y = (y > y0[..., None]) & (y < y1[..., None])
    within = in_y[..., :, None] & in_x[..., None, :] & (batch.labels >= 0)[..., None, None]
    return valid & within.any(dim=1)
