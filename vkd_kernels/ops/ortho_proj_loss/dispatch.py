"""From the caller's tensors to an implementation's: rows, their weights, statistics, targets, scale; then the call.

api.py has checked the arguments. An implementation sees row normalizations alone: what needs all rows is done here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from .. import checks, implementations
from ..implementations import Implementation
from ..library import has_tangent
from ..normalization.all_reduce import all_reduce_several, with_gradient
from ..normalization.reference import whiten_several
from . import chunked, reference
from .ranks import all_ranks_loss
from .spec import Execution, LossGroup, LossInputs, LossSpec, acc_dtype

CHUNKED_FROM = 2**23  # elements of N x T (32 MiB in float32) from which PyTorch goes by chunks of rows


@dataclass(frozen=True)
class Rows:
    """The rows of G losses as their implementation takes them."""

    students: tuple[torch.Tensor, ...]  # G of (N, S), in the product's dtype
    teachers: tuple[torch.Tensor, ...]  # G of (N, T)
    row_weights: tuple[torch.Tensor | None, ...]  # G of (N,)

    @property
    def acc_dtype(self) -> torch.dtype:
        return acc_dtype(self.students[0].dtype)


@dataclass(frozen=True)
class Sums:
    """Sums over the rows of all ranks, of G losses; the channels' are for batch_norm alone."""

    weight: tuple[float, ...] | torch.Tensor  # G numbers, or (G,) where they must be known on the device
    teacher: torch.Tensor | None = None  # (G, T)
    student: torch.Tensor | None = None  # (G, S)
    own_student: torch.Tensor | None = None  # (G, S), of this rank's rows

    def denominators(self, spec: LossSpec, teacher_dim: int) -> tuple[float, ...] | torch.Tensor:
        """What each loss is divided by; nowhere 0."""
        if isinstance(self.weight, torch.Tensor):
            if spec.reduction == "sum":
                return torch.ones_like(self.weight)
            return torch.where(self.weight > 0, self.weight * teacher_dim, 1.0)
        return tuple(total * teacher_dim if spec.reduction == "mean" else 1.0 for total in self.weight)


def loss(
    student: torch.Tensor,  # (..., S)
    teacher: torch.Tensor,  # (..., T)
    weight: torch.Tensor,  # (T, S)
    *,
    scale: float | torch.Tensor | None,  # number, () or (T,)
    bias: torch.Tensor | None,  # (T,)
    mask: torch.Tensor | None,  # (...)
    spec: LossSpec,
    execution: Execution,
) -> torch.Tensor:  # ()
    """The loss of arguments that api.py has checked."""
    product_dtype = _product_dtype(student)
    differentiable = (student, weight, scale, bias)
    implementation = choose(execution, student.device, product_dtype, [teacher], differentiable)
    spec = _with_beta_in_range(spec, acc_dtype(product_dtype))
    with implementations.no_autocast(student.device.type):
        spec, (teacher,) = _targets_of_module(spec, [teacher], [mask])
        rows = _rows(spec, execution, product_dtype, [student], [teacher], [mask])
        spec, rows = _with_targets(spec, execution, implementation, rows)
        sums = _sums(spec, execution, implementation, rows)
        inputs = LossInputs(
            student=rows.students[0],
            teacher=rows.teachers[0],
            weight=weight,
            denominator=sums.denominators(spec, weight.shape[0])[0],
            row_weight=rows.row_weights[0],
            bias=None if bias is None else bias.to(rows.acc_dtype),
            scale=1.0 if scale is None else scale,
        )
        if implementation is Implementation.REFERENCE:
            share = reference.loss(spec, inputs.folded(), execution.process_group)
        elif _is_without_z(spec, execution, inputs):
            share = _module(implementation).semi_orthogonal_loss(spec, inputs)
        elif spec.normalization == "batch_norm":
            group = _standardized(spec, execution, implementation, rows, sums, _group_of_one(inputs.folded()))
            (inputs,) = group.inputs()
            share = _module(implementation).loss(replace(spec, normalization="none"), inputs)
        else:
            share = _module(implementation).loss(spec, inputs.folded())
        trained = {"projections": weight, "scales": scale, "biases": bias}
        return all_ranks_loss(share, trained, execution.process_group, execution.agreement)


def group_loss(
    students: Sequence[torch.Tensor],  # G of (..., S)
    teachers: Sequence[torch.Tensor],  # G of (..., T)
    weights: torch.Tensor,  # (G, T, S)
    *,
    scale: float | torch.Tensor | None,  # number, (), (G,) or (G, T)
    bias: torch.Tensor | None,  # (G, T)
    masks: Sequence[torch.Tensor | None],  # G of (...)
    spec: LossSpec,
    execution: Execution,
) -> torch.Tensor:  # (G,)
    """The losses of arguments that api.py has checked."""
    product_dtype = _product_dtype(students[0])
    differentiable = (*students, weights, scale, bias)
    implementation = choose(execution, students[0].device, product_dtype, teachers, differentiable)
    spec = _with_beta_in_range(spec, acc_dtype(product_dtype))
    with implementations.no_autocast(students[0].device.type):
        spec, teachers = _targets_of_module(spec, teachers, masks)
        rows = _rows(spec, execution, product_dtype, students, teachers, masks)
        spec, rows = _with_targets(spec, execution, implementation, rows)
        sums = _sums(spec, execution, implementation, rows)
        if isinstance(scale, torch.Tensor) and scale.dim() == 0:
            scale = scale.expand(len(students))
        group = LossGroup(
            students=rows.students,
            teachers=rows.teachers,
            weights=weights,
            denominators=sums.denominators(spec, weights.shape[1]),
            row_weights=rows.row_weights,
            bias=None if bias is None else bias.to(rows.acc_dtype),
            scale=1.0 if scale is None else scale,
        )
        if implementation is Implementation.REFERENCE:
            losses = [reference.loss(spec, inputs, execution.process_group) for inputs in group.folded().inputs()]
            share = torch.stack(losses)
        elif _is_without_z(spec, execution, group):
            share = _module(implementation).semi_orthogonal_group_loss(spec, group)
        elif spec.normalization == "batch_norm":
            group = _standardized(spec, execution, implementation, rows, sums, group.folded())
            share = _module(implementation).group_loss(replace(spec, normalization="none"), group)
        else:
            share = _module(implementation).group_loss(spec, group.folded())
        trained = {"projections": weights, "scales": scale, "biases": bias}
        return all_ranks_loss(share, trained, execution.process_group, execution.agreement)


def _with_beta_in_range(spec: LossSpec, dtype: torch.dtype) -> LossSpec:
    """Clamps beta to the dtype's range: one that underflows to 0 would be divided by."""
    if 1e-30 < spec.beta < 1e30:
        return spec
    limits = torch.finfo(dtype)
    return replace(spec, beta=min(max(spec.beta, limits.tiny), limits.max))


# ------------------------------------------------------------------------------------------ which implementation serves


def choose(
    execution: Execution,
    device: torch.device,
    product_dtype: torch.dtype,
    teachers: Sequence[torch.Tensor],
    differentiable: Sequence[torch.Tensor | float | None],
) -> Implementation:
    """The implementation that serves: the table of implementations.py, for these sizes.

    The reference where one of the differentiable inputs is a dual number of forward mode.
    """
    # Ranks, which may differ in size, all take the path with the same collectives.
    large = execution.process_group is not None or max(y.numel() for y in teachers) > CHUNKED_FROM
    in_torch = Implementation.CHUNKED if large else Implementation.REFERENCE
    candidates: tuple[Implementation, ...] = (Implementation.TRITON, in_torch)
    if has_tangent(x for x in differentiable if isinstance(x, torch.Tensor)):
        candidates = (Implementation.REFERENCE,)
    return implementations.decide("ortho_proj_loss", execution.backend, device, product_dtype, candidates)


def _module(implementation: Implementation) -> ModuleType:
    """The module whose functions spec.py lists."""
    if implementation is Implementation.TRITON:
        from . import triton  # here, because Triton need not be installed

        return triton
    return chunked


def _is_without_z(spec: LossSpec, execution: Execution, tensors: LossInputs | LossGroup) -> bool:
    """Whether the semi-orthogonal form serves: a gain of each channel is no semi-orthogonal weight's."""
    of_channels = isinstance(tensors.scale, torch.Tensor) and tensors.scale.dim() == (
        1 if isinstance(tensors, LossInputs) else 2
    )
    return execution.semi_orthogonal and spec.needs_no_z and tensors.bias is None and not of_channels


def _product_dtype(student: torch.Tensor) -> torch.dtype:
    """The dtype of the products: autocast's or the student's."""
    autocast = None if student.dtype == torch.float64 else implementations.autocast_dtype(student.device.type)
    return autocast or student.dtype


# ----------------------------------------------------------------------------------------------- rows and their targets


def _rows(
    spec: LossSpec,
    execution: Execution,
    product_dtype: torch.dtype,
    students: Sequence[torch.Tensor],
    teachers: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
) -> Rows:
    relative = spec.reduction == "mean" and execution.process_group is None
    return Rows(
        students=tuple(x.reshape(-1, x.shape[-1]).to(product_dtype) for x in students),
        teachers=tuple(_constant(y).reshape(-1, y.shape[-1]) for y in teachers),
        row_weights=tuple(
            None if mask is None else _row_weight(mask.detach().reshape(-1), acc_dtype(product_dtype), relative)
            for mask in masks
        ),
    )


def _constant(teacher: torch.Tensor) -> torch.Tensor:
    """The teacher's features without their graph; autograd can't keep a tensor of inference mode."""
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and teacher.is_inference():
        return teacher.clone()
    return teacher.detach()


def _row_weight(mask: torch.Tensor, dtype: torch.dtype, relative: bool) -> torch.Tensor:  # (N,) -> (N,)
    """The mask as weights; a float64 weight that float32 has no number for does not become 0, a negative one does."""
    mask = checks.at_least_0(mask)
    if mask.dtype != torch.float64 or dtype == torch.float64 or mask.numel() == 0:
        return mask.to(dtype)
    if relative:  # a weighted mean does not depend on the weights' size
        return (mask / mask.amax().clamp_min(torch.finfo(mask.dtype).tiny)).to(dtype)
    return torch.where(mask > 0, mask.to(dtype).clamp_min(torch.finfo(dtype).tiny), mask.to(dtype))


def _targets_of_module(
    spec: LossSpec, teachers: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
) -> tuple[LossSpec, Sequence[torch.Tensor]]:
    """What a module that is the normalization makes of the teachers: module(features (..., T), mask) -> targets."""
    module = spec.normalization
    if isinstance(module, str):
        return spec, teachers
    targets = []
    with torch.no_grad():
        for teacher, mask in zip(teachers, masks, strict=True):
            target = module(teacher.detach(), mask)
            if not isinstance(target, torch.Tensor) or target.shape != teacher.shape or not target.is_floating_point():
                raise ValueError(
                    f"normalization must return floating targets of the features' shape {tuple(teacher.shape)}; "
                    f"{type(module).__name__} returned {checks.describe(target)}"
                )
            targets.append(
                target if teacher.dtype == torch.float64 or target.dtype != torch.float64 else target.float()
            )
    return replace(spec, normalization="none"), targets


def _with_targets(
    spec: LossSpec, execution: Execution, implementation: Implementation, rows: Rows
) -> tuple[LossSpec, Rows]:
    """What the implementations but the reference know nothing of: whitened targets."""
    if implementation is Implementation.REFERENCE or spec.normalization != "whiten":
        return spec, rows
    teachers = whiten_several(
        [y.to(rows.acc_dtype) for y in rows.teachers],
        list(rows.row_weights),
        method="zca",
        eps=spec.eps,
        group=execution.process_group,
    )
    return replace(spec, normalization="none"), replace(rows, teachers=tuple(teachers))


# ------------------------------------------------------------------------------------------------------ sums over rows


def _sums(spec: LossSpec, execution: Execution, implementation: Implementation, rows: Rows) -> Sums:
    """The rows' total weight where it is needed, and batch_norm's first sums, in one collective."""
    batch_norm = spec.normalization == "batch_norm" and implementation is not Implementation.REFERENCE
    if spec.reduction == "sum" and not batch_norm:
        return Sums(weight=(1.0,) * len(rows.students))
    totals = _own_totals(rows, on_device=execution.process_group is not None or batch_norm)
    if not isinstance(totals, torch.Tensor):
        return Sums(weight=totals)
    if not batch_norm:
        (total,) = all_reduce_several([totals], execution.process_group)
        return Sums(weight=total)
    row_statistics = _module(implementation)
    own_student = row_statistics.column_sums(rows.students, rows.row_weights)
    own_teacher = row_statistics.column_sums(rows.teachers, rows.row_weights)
    total, teacher, student = all_reduce_several([totals, own_teacher, own_student], execution.process_group)
    return Sums(weight=total, teacher=teacher, student=student, own_student=own_student)


def _own_totals(rows: Rows, on_device: bool) -> tuple[float, ...] | torch.Tensor:
    """Σ of the weights of this rank's rows, of each loss."""
    # A compiled graph for any number of rows takes tensors: an operator's number would be part of the graph.
    on_device = on_device or torch.compiler.is_compiling()
    if not on_device and all(w is None for w in rows.row_weights):
        return tuple(float(x.shape[0]) for x in rows.students)
    totals = [
        x.new_full((), x.shape[0], dtype=rows.acc_dtype) if w is None else w.sum()
        for x, w in zip(rows.students, rows.row_weights, strict=True)
    ]
    return torch.stack(totals) if len(totals) > 1 else totals[0][None]


def _standardized(
    spec: LossSpec,
    execution: Execution,
    implementation: Implementation,
    rows: Rows,
    sums: Sums,
    group: LossGroup,
) -> LossGroup:
    """The group whose losses, with normalization none, are those of batch_norm.

    It needs no pass over Z: mean(Z) = P mean(X) and var(Z)_j = p_j Cov(X) p_jᵀ, so standardizing Z is another weight
    and bias, whose gradients flow on through the student's statistics.
    """
    assert sums.teacher is not None and sums.student is not None
    row_statistics = _module(implementation)
    divisor: float | torch.Tensor  # (G, 1), or the number of rows of the only loss
    if isinstance(sums.weight, torch.Tensor):
        divisor = torch.where(sums.weight > 0, sums.weight, 1.0)[:, None]
    else:
        (divisor,) = sums.weight
    teacher_mean, student_mean = sums.teacher / divisor, sums.student / divisor
    squares = row_statistics.column_square_sums(rows.teachers, rows.row_weights, teacher_mean)
    student_sum, scatters = row_statistics.student_scatters(
        rows.students, rows.row_weights, sums.own_student, student_mean
    )
    squares, student_sum, scatters = all_reduce_several(
        [squares, student_sum, scatters],
        execution.process_group,
        trained=with_gradient(group.weights, execution.process_group),  # a rank's student may have no graph
    )
    student_mean = student_sum / divisor  # the same, with gradients
    p = group.weights.to(student_mean.dtype)
    dtype = rows.students[0].dtype
    if dtype != p.dtype:
        # The weight that the product sees is rounded, and its variance must be the one that divides: most of the loss's
        # gradient is along Z, where the derivative of the variance takes it off again.
        with torch.no_grad():
            to_unit = torch.rsqrt(_variance(p, scatters, divisor) + spec.eps)[:, :, None]
            seen = (p * to_unit).to(dtype) / to_unit
        p = _with_values(p, seen)
    p = p * torch.rsqrt(_variance(p, scatters, divisor) + spec.eps)[:, :, None]
    if dtype != p.dtype:
        p = _with_values(p, p.detach().to(dtype))
    # No product of matrices, which might be in TF32. A bias cancels, but for its gradient of 0.
    bias = -(p * student_mean[:, None, :]).sum(2)
    return replace(
        group,
        weights=p,
        bias=bias if group.bias is None else bias + 0.0 * group.bias,
        channel_shift=teacher_mean,
        channel_scale=torch.rsqrt(squares / divisor + spec.eps),
    )


def _variance(
    weights: torch.Tensor,  # (G, T, S)
    scatters: torch.Tensor,  # (G, S, S)
    divisor: float | torch.Tensor,  # (G, 1)
) -> torch.Tensor:  # (G, T)
    """var(Z)_j = p_j Cov(X) p_jᵀ."""
    return ((weights @ scatters) * weights).sum(2).clamp_min(0) / divisor


def _with_values(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What x was rounded to, with the derivative of x itself: that of a cast is rounded too, in float16 often to 0."""
    return values + (x - x.detach())


def _group_of_one(inputs: LossInputs) -> LossGroup:
    denominator = inputs.denominator
    return LossGroup(
        students=(inputs.student,),
        teachers=(inputs.teacher,),
        weights=inputs.weight.unsqueeze(0),
        denominators=denominator[None] if isinstance(denominator, torch.Tensor) else (denominator,),
        row_weights=(inputs.row_weight,),
        bias=None if inputs.bias is None else inputs.bias.unsqueeze(0),
    )
