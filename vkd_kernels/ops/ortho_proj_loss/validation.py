"""What the arguments of the loss must be: every error names the argument and shows what came."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import checks
from ..normalization.all_reduce import check_group
from .spec import LossSpec

NORMALIZATIONS = ("layer_norm", "batch_norm", "whiten", "l2", "none")
LOSSES = ("smooth_l1", "mse", "cosine")
REDUCTIONS = ("mean", "sum")


def loss_spec(*, normalization: Any, loss: Any, beta: Any, eps: Any, reduction: Any) -> LossSpec:
    """The options of a loss, checked."""
    check_options(normalization, loss, beta, eps, reduction)
    return LossSpec(
        normalization=normalization,
        eps=float(eps),  # a number of numpy's, which is a float too, is none to Triton
        loss=LossSpec.shares(loss),
        beta=float(beta),
        reduction=reduction,
    )


def check_options(normalization: Any, loss: Any, beta: Any, eps: Any, reduction: Any) -> None:
    if not isinstance(normalization, nn.Module):
        checks.check_choice("normalization", normalization, NORMALIZATIONS)
    _check_loss(loss)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_number("beta", beta, above=0)
    whitens = isinstance(normalization, str) and normalization == "whiten"
    checks.check_number("eps", eps, at_least=0, at_most=1 if whitens else None)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Mapping):
        checks.check_choice("loss", loss, LOSSES)
        return
    for name, share in loss.items():
        checks.check_choice("a key of loss", name, LOSSES)
        checks.check_number(f"loss[{name!r}]", share, at_least=0)
    if not any(loss.values()):
        raise ValueError(f"loss must have a share above 0; got {dict(loss)}")


def check_scale_acts(spec: LossSpec, scale: Any, channel_dims: int) -> None:
    """One factor for all channels changes no angle: beside the cosine alone it would be without effect.

    channel_dims: the dimensions of a scale that has a factor for each channel, which does change angles.
    """
    if not spec.is_cosine_alone or scale is None or (isinstance(scale, torch.Tensor) and scale.dim() == channel_dims):
        return
    if isinstance(scale, (str, torch.Tensor)) or scale != 1.0:
        raise ValueError(
            "scale has no effect on the loss 'cosine' alone, which compares angles: leave it at 1.0; got "
            f"{scale!r:.200}"
        )


def check_lists(
    students: Any, teachers: Any, masks: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
    """The lists of a group, an entry for each loss; masks may be missing."""
    lists = {"students": students, "teachers": teachers} | ({} if masks is None else {"masks": masks})
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple of tensors; got {checks.describe(values)}")
        if not values or len(values) != len(students):
            raise ValueError(
                f"students, teachers and masks must have an entry for each loss; got {len(students)} students and "
                f"{len(values)} {name}"
            )
    return list(students), list(teachers), [None] * len(students) if masks is None else list(masks)


def check_one(student: Any, teacher: Any, weight: Any, *, scale: Any, bias: Any, mask: Any, process_group: Any) -> None:
    """The tensors of one loss: dtypes, shapes, devices."""
    checks.check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must have the shape (T, S); got {tuple(weight.shape)}")
    check_group(process_group)
    _check_features("student", student, "teacher", teacher, weight_name="weight", weight=weight, ranks=process_group)
    _check_precision("student", student, "teacher", teacher, "weight", weight)
    checks.check_same_device("weight", weight, "student", student)
    t = weight.shape[0]
    _check_bias(bias, (t,), f"(T,) = ({t},)", student)
    _check_scale(scale, [(), (t,)], f"() or (T,) = ({t},)", student)
    checks.check_row_weights("mask", mask, student.shape[:-1], student)


def check_group_of(
    students: Sequence[Any],
    teachers: Sequence[Any],
    weights: Any,
    *,
    scale: Any,
    bias: Any,
    masks: Sequence[Any],
    process_group: Any,
) -> None:
    """The tensors of several losses of equal S and T; an error names the entry."""
    checks.check_tensor("weights", weights)
    count = len(students)
    if weights.dim() != 3 or weights.shape[0] != count:
        raise ValueError(
            f"weights must have the shape (G, T, S) with G = {count}, the number of students; got "
            f"{tuple(weights.shape)}"
        )
    check_group(process_group)
    for g, (student, teacher, mask) in enumerate(zip(students, teachers, masks, strict=True)):
        names = f"students[{g}]", f"teachers[{g}]"
        _check_features(
            names[0], student, names[1], teacher, weight_name="weights", weight=weights, ranks=process_group
        )
        for name, value, first in (("students", student, students[0]), ("teachers", teacher, teachers[0])):
            if value.dtype != first.dtype:
                raise TypeError(f"{name} must have one dtype; got {name}[0] {first.dtype}, {name}[{g}] {value.dtype}")
            checks.check_same_device(f"{name}[{g}]", value, f"{name}[0]", first)
        checks.check_row_weights(f"masks[{g}]", mask, student.shape[:-1], student)
    _check_precision("students", students[0], "teachers", teachers[0], "weights", weights)
    checks.check_same_device("weights", weights, "students[0]", students[0])
    channels = tuple(weights.shape[:2])
    _check_bias(bias, channels, f"(G, T) = {channels}", students[0])
    _check_scale(scale, [(), channels[:1], channels], f"(), (G,) or (G, T) = {channels}", students[0])


def _check_features(
    student_name: str,
    student: Any,
    teacher_name: str,
    teacher: Any,
    *,
    weight_name: str,
    weight: torch.Tensor,
    ranks: Any,
) -> None:
    t, s = weight.shape[-2:]
    for name, value, size, letter in ((student_name, student, s, "S"), (teacher_name, teacher, t, "T")):
        checks.check_tensor(name, value)
        if value.dim() < 2 or value.shape[-1] != size:
            raise ValueError(
                f"{name} must have the shape (..., {letter}) with {letter} = {size}, as {weight_name} "
                f"{tuple(weight.shape)} says; got {tuple(value.shape)}"
            )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{student_name} and {teacher_name} must have the same rows; got {student_name} of shape "
            f"{tuple(student.shape)} and {teacher_name} of shape {tuple(teacher.shape)}"
        )
    if t == 0 or s == 0 or (student.numel() == 0 and ranks is None):  # a rank may have no rows
        raise ValueError(
            f"{student_name} is empty: got {student_name} {tuple(student.shape)}, {teacher_name} {tuple(teacher.shape)}"
        )
    checks.check_same_device(teacher_name, teacher, student_name, student)


def _check_precision(
    student_name: str,
    student: torch.Tensor,
    teacher_name: str,
    teacher: torch.Tensor,
    weight_name: str,
    weight: torch.Tensor,
) -> None:
    double = [value.dtype == torch.float64 for value in (student, teacher, weight)]
    if any(double) and not all(double):
        raise TypeError(
            f"{student_name}, {teacher_name} and {weight_name} must all be float64 or none; got "
            f"{student_name} {student.dtype}, {teacher_name} {teacher.dtype}, {weight_name} {weight.dtype}"
        )


def _check_bias(bias: Any, shape: tuple[int, ...], said: str, student: torch.Tensor) -> None:
    if bias is None:
        return
    checks.check_tensor("bias", bias)
    if tuple(bias.shape) != shape:
        raise ValueError(f"bias must have the shape {said}; got {tuple(bias.shape)}")
    checks.check_same_device("bias", bias, "student", student)


def _check_scale(scale: Any, shapes: Sequence[tuple[int, ...]], said: str, student: torch.Tensor) -> None:
    if isinstance(scale, torch.Tensor):
        checks.check_tensor("scale", scale)
        if tuple(scale.shape) not in shapes:
            raise ValueError(f"scale must be a number, or a tensor of shape {said}; got {tuple(scale.shape)}")
        checks.check_same_device("scale", scale, "student", student)
    elif scale is not None:
        checks.check_number("scale", scale)
