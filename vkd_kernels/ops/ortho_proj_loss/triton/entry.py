"""The loss by fused kernels: what spec.py says that an implementation offers, here for float32, bfloat16 and float16.

Few rows (tiles.is_pooled) take pooled.py, in which losses of a group share their launches; many take many_rows.py, or
semi_orthogonal.py for squared error and cosine with a semi-orthogonal weight.
"""

import functools
from dataclasses import replace
from typing import Any

import torch

from ...library import needs_gradient
from ...tf32 import tf32_allowed
from ...tracing import constant_result
from ..chunks import WORKSPACE_BYTES, balanced
from ..spec import LossGroup, LossInputs, LossSpec
from . import tiles
from .launch import dense, unit_stride
from .many_rows import fused_loss
from .pooled import pooled_loss
from .semi_orthogonal import fused_semi_orthogonal_loss
from .statistics import all_or_none


def loss(spec: LossSpec, inputs: LossInputs, *, workspace_bytes: int = WORKSPACE_BYTES) -> torch.Tensor:  # ()
    """The loss of spec.py, differentiable once in student, weight and bias.

    No temporary but G is N x T, and G only in the student's dtype and for as many rows as workspace_bytes allows.
    """
    n, t = inputs.teacher.shape
    row_weight, denominator, factor = balanced(inputs)
    arguments: dict[str, Any] = {
        "student": unit_stride(inputs.student),
        "teacher": unit_stride(inputs.teacher),
        "weight": unit_stride(inputs.weight),
        "bias": dense(inputs.bias),
        "row_weight": row_weight,
        "channel_shift": inputs.channel_shift,
        "channel_scale": inputs.channel_scale,
        "denominator": denominator,
        **_options(spec, t),
        "need_student": needs_gradient(inputs.student),
        "need_weight": needs_gradient(inputs.weight),
        "need_bias": needs_gradient(inputs.bias),
    }
    if tiles.is_pooled(n, t, inputs.student.dtype, workspace_bytes):
        return pooled_loss(**arguments, factors=[factor], group=[n])[0]
    return fused_loss(**arguments, factor=factor, workspace_bytes=workspace_bytes)[0]


def group_loss(spec: LossSpec, group: LossGroup, *, workspace_bytes: int = WORKSPACE_BYTES) -> torch.Tensor:  # (G,)
    """The loss of each of the group's inputs; those of few rows several to a launch, their rows one after the other.

    A loss of many rows fills the GPU by itself: those go one by one.
    """
    rows, t = [x.shape[0] for x in group.students], group.weights.shape[1]
    sizes = tiles.groups(rows, t, group.students[0].dtype, workspace_bytes)
    losses = []
    for part in group.split(sizes):
        if len(part) == 1:
            (inputs,) = part.inputs()
            losses.append(loss(spec, inputs, workspace_bytes=workspace_bytes)[None])
        else:
            losses.append(_pooled_group(spec, part))
    return torch.cat(losses) if len(losses) > 1 else losses[0]


def semi_orthogonal_loss(
    spec: LossSpec, inputs: LossInputs, *, workspace_bytes: int = WORKSPACE_BYTES
) -> torch.Tensor:  # ()
    """The loss for weightᵀ weight = I, in two reads of the teacher; differentiable once in student, weight and scale.

    The gradient of the weight leaves out its part normal to the manifold; see spec.py. The plain form serves few rows,
    which the launches bound; mixed dtypes, for which the teacher would have to be rounded first; and TF32 with layer
    norm, where products of targets with large means would carry their rounding along.
    """
    n, t = inputs.teacher.shape
    dtype = inputs.student.dtype
    plain = inputs.teacher.dtype != dtype or n == 0 or tiles.is_pooled(n, t, dtype, workspace_bytes)
    if plain or (spec.normalization == "layer_norm" and _is_in_tf32(dtype)):
        return loss(spec, inputs.folded(), workspace_bytes=workspace_bytes)
    row_weight, denominator, factor = balanced(inputs)
    scale = inputs.scale
    if not isinstance(scale, torch.Tensor):
        scale = inputs.student.new_full((), scale, dtype=torch.float32)
    options = {name: value for name, value in _options(spec, t).items() if name not in ("smooth_l1", "beta")}
    return fused_semi_orthogonal_loss(
        student=unit_stride(inputs.student),
        teacher=unit_stride(inputs.teacher),
        weight=unit_stride(inputs.weight),
        scale=scale,
        row_weight=row_weight,
        denominator=denominator,
        factor=factor,
        workspace_bytes=workspace_bytes,
        **options,
        need_student=needs_gradient(inputs.student),
        need_weight=needs_gradient(inputs.weight),
        need_scale=needs_gradient(scale),
    )[0]


@constant_result  # PyTorch's setting as it is when a graph is compiled
def _is_in_tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and tf32_allowed()


def semi_orthogonal_group_loss(spec: LossSpec, group: LossGroup) -> torch.Tensor:  # (G,)
    """semi_orthogonal_loss of each of the group's inputs; where all are of few rows, as group_loss."""
    t = group.weights.shape[1]
    if all(tiles.is_pooled(x.shape[0], t, x.dtype, WORKSPACE_BYTES) for x in group.students):
        return group_loss(spec, group.folded())
    return torch.stack([semi_orthogonal_loss(spec, inputs) for inputs in group.inputs()])


def _pooled_group(spec: LossSpec, group: LossGroup) -> torch.Tensor:  # (G,)
    """group_loss of losses that are all of few rows, as one pooled_loss."""
    row_weights = all_or_none(group.students, group.row_weights)
    denominators = group.denominators
    if row_weights and group.students[0].dtype == torch.float16:
        parts = [balanced(inputs) for inputs in replace(group, row_weights=tuple(row_weights)).inputs()]
        row_weights = [w for w, _, _ in parts if w is not None]
        denominators = torch.stack([d for _, d, _ in parts if d is not None])  # all of them
    on_device = isinstance(denominators, torch.Tensor)
    return pooled_loss(
        student=torch.cat(group.students),
        teacher=torch.cat(group.teachers),
        weight=group.weights.contiguous(),
        bias=dense(group.bias),
        row_weight=torch.cat(row_weights) if row_weights else None,
        channel_shift=group.channel_shift,
        channel_scale=group.channel_scale,
        denominator=denominators if on_device else None,
        factors=[1.0] * len(group) if on_device else [1.0 / value for value in denominators],
        group=[x.shape[0] for x in group.students],
        **_options(spec, group.weights.shape[1]),
        need_student=needs_gradient(*group.students),
        need_weight=needs_gradient(group.weights),
        need_bias=needs_gradient(group.bias),
    )[0]


def _options(spec: LossSpec, t: int) -> dict[str, Any]:
    """The spec as operators take it."""
    return _new_options(spec, t) if torch.compiler.is_compiling() else _kept_options(spec, t)


def _new_options(spec: LossSpec, t: int) -> dict[str, Any]:
    coefficients = spec.coefficients(t)
    return {
        "normalization": spec.normalization,
        "eps": spec.eps,
        "mse": coefficients.mse,
        "smooth_l1": coefficients.smooth_l1,
        "cosine": coefficients.cosine,
        "beta": spec.beta,
    }


_kept_options = functools.lru_cache(maxsize=1024)(_new_options)
