"""The projected feature loss: validates, folds scales and statistics, chooses a backend (reference.py defines it)."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from .. import checks, implementations
from ..normalization.all_reduce import all_reduce_together, check_group, global_loss
from ..normalization.reference import whiten_each
from . import reference, statistics
from .chunked import chunked_losses, orthonormal_mses
from .operators import by_level, together

NORMALIZATIONS = ("layer_norm", "batch_norm", "whiten", "none")
LOSSES = ("smooth_l1", "mse")
REDUCTIONS = ("mean", "sum")
CHUNKED_FROM = 2**23  # elements of N x T (32 MiB in float32) from which PyTorch goes by chunks of rows


def ortho_proj_loss(
    student: torch.Tensor,  # (..., S)
    teacher: torch.Tensor,  # (..., T)
    weight: torch.Tensor,  # (T, S)
    *,
    scale: float | torch.Tensor | None = None,  # number, () or (T,)
    bias: torch.Tensor | None = None,  # (T,)
    mask: torch.Tensor | None = None,  # (...)
    normalization: str = "layer_norm",
    loss: str = "smooth_l1",
    beta: float = 1.0,
    eps: float = 1e-5,
    reduction: str = "mean",
    process_group=None,
    backend: str | None = None,
) -> torch.Tensor:
    r"""Distance between projected student features and normalised teacher features (V_kD, CVPR 2024, section 3).

    ::

        Z = student weightᵀ · scale + bias          T = normalise(teacher)
        L = mean over rows and channels of ρ(Z - T)

    ======================  =======================================================================================
    ``normalization``       T
    ======================  =======================================================================================
    ``"layer_norm"``        every row standardised over its T channels (biased variance + eps)
    ``"batch_norm"``        every channel standardised over the rows (biased variance + eps), and Z likewise, with
                            gradients through its statistics
    ``"whiten"``            centred and decorrelated (ZCA) with shrinkage ``eps``: choose it larger, 1e-3 say, and
                            certainly where there are fewer rows than channels
    ``"none"``              teacher as it is
    ======================  =======================================================================================

    The product is taken in the student's dtype (autocast's under autocast) and accumulated in float32; normalisation
    and loss are float32. float64 works throughout when student, teacher and weight all are.

    Args:
        student: ``(..., S)`` float32, bfloat16, float16 or float64. Rows are all dimensions but the last.
        teacher: ``(..., T)`` with the same rows. A constant: no gradient flows to it.
        weight: ``(T, S)``, any matrix; gradients are those of any matrix.
        scale: multiplies Z: a number, a 0-d tensor, or one value per teacher channel. Folded into the weight.
        bias: one value per teacher channel.
        mask: bool, or non-negative float weights, one per row. Rows of weight 0 count nowhere, whatever they hold;
            with no row left the loss is 0 with zero gradients. Non-negativity is not checked: it would stall a GPU.
        loss: ``"smooth_l1"`` (quadratic below ``beta`` > 0) or ``"mse"``.
        eps: see the table.
        reduction: ``"mean"`` divides by the rows' total weight times T, ``"sum"`` does not.
        process_group: statistics and mean over the rows of all its ranks (pass ``torch.distributed.group.WORLD``).
            Every rank returns the global loss, and gradients averaged over the ranks, as DDP does, are those of one
            process with all rows. Ranks may hold different numbers of rows, also none. ``None``: this process alone.
        backend: ``None`` chooses; ``"triton"`` or ``"torch"`` asks for one, and is an error where it can't serve.

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: naming the argument, with what came; ValueError also for no rows.
        RuntimeError: the requested backend can't serve; the message says why.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> student, teacher = torch.randn(32, 192), torch.randn(32, 1024)
        >>> weight = vk.cayley(torch.randn(1024, 192))
        >>> vk.functional.ortho_proj_loss(student, teacher, weight).shape
        torch.Size([])
    """
    return projected_loss(
        student, teacher, weight, scale=scale, bias=bias, mask=mask, normalization=normalization, loss=loss, beta=beta,
        eps=eps, reduction=reduction, process_group=process_group, backend=backend, orthonormal=False,
    )  # fmt: skip


def ortho_proj_losses(
    students: Sequence[torch.Tensor],  # G of (..., S)
    teachers: Sequence[torch.Tensor],  # G of (..., T)
    weights: torch.Tensor,  # (G, T, S)
    *,
    scale: float | torch.Tensor | None = None,  # number, (), (G,) or (G, T)
    bias: torch.Tensor | None = None,  # (G, T)
    masks: Sequence[torch.Tensor | None] | None = None,  # G of (...)
    normalization: str = "layer_norm",
    loss: str = "smooth_l1",
    beta: float = 1.0,
    eps: float = 1e-5,
    reduction: str = "mean",
    process_group=None,
    backend: str | None = None,
) -> torch.Tensor:  # (G,)
    """Several losses of equal S and T at once: entry i is ``ortho_proj_loss(students[i], teachers[i], weights[i])``.

    For features of several layers or levels, which may differ in their rows. On a GPU levels of few rows share their
    launches. Across ranks all levels share their collectives (``backend="torch"``, the definition, has its own).

    Args:
        students: G tensors ``(..., S)`` of one dtype.
        teachers: G tensors ``(..., T)`` of one dtype, with the rows of ``students``.
        weights: ``(G, T, S)``, as ``cayley`` gives it for a batch.
        scale: one for all, one per level, or one per level and teacher channel.
        bias: one value per level and teacher channel.
        masks: for each level a mask of its rows or ``None``; ``None``: there are none.
        normalization, loss, beta, eps, reduction, process_group, backend: see ``ortho_proj_loss``.

    Returns:
        ``(G,)`` float32 (float64 for float64 inputs).

    Raises:
        As ``ortho_proj_loss``, naming the level: ``students[2] must have the shape ...``.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> students, teachers = [torch.randn(n, 64) for n in (50, 20)], [torch.randn(n, 96) for n in (50, 20)]
        >>> weights = vk.cayley(torch.randn(2, 96, 64))
        >>> vk.functional.ortho_proj_losses(students, teachers, weights, normalization="batch_norm").shape
        torch.Size([2])
    """
    return projected_losses(
        students, teachers, weights, scale=scale, bias=bias, masks=masks, normalization=normalization, loss=loss,
        beta=beta, eps=eps, reduction=reduction, process_group=process_group, backend=backend, orthonormal=False,
    )  # fmt: skip


def projected_loss(student, teacher, weight, *, mask, **options):
    """ortho_proj_loss, told by OrthoProjLoss whether weightᵀ weight = I: squared error then needs no Z.

    That form's weight gradient leaves out a part that vanishes through the parametrisation of an orthonormal weight.
    """
    _check([student], [teacher], weight, options["scale"], options["bias"], options["process_group"], several=False)
    return _losses([student], [teacher], weight, [mask], **options)


def projected_losses(students, teachers, weights, *, masks, **options):
    """ortho_proj_losses, told by FeatureDistiller whether the weights are orthonormal, as projected_loss is."""
    lists = {"students": students, "teachers": teachers} | ({} if masks is None else {"masks": masks})
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple of tensors; got {checks.describe(values)}")
        if not values or len(values) != len(students):
            raise ValueError(f"students, teachers and masks must have an entry for each loss; got {len(students)} "
                             f"students and {len(values)} {name}")  # fmt: skip
    _check(students, teachers, weights, options["scale"], options["bias"], options["process_group"], several=True)
    return _losses(students, teachers, weights, masks or [None] * len(students), **options)


class Core(NamedTuple):
    """What computes the losses once the options are folded, those of squared error with orthonormal weights, and
    (a module) statistics over the rows."""

    losses: Callable
    mses: Callable
    statistics: ModuleType


def _losses(
    students, teachers, weight, masks, *, scale, bias, normalization, loss, beta, eps, reduction, process_group,
    backend, orthonormal,
):  # fmt: skip
    """G losses (G,) for a weight (G, T, S), or one () for (T, S): bias and scale have the same first dimension."""
    check_options(normalization, loss, beta, eps, reduction)
    device, t = students[0].device.type, weight.shape[-2]
    precise = torch.promote_types(students[0].dtype, torch.float32)
    row_weights = [
        checks.row_weights(_name("mask", weight, i), mask, x.shape[:-1], x, precise)
        for i, (x, mask) in enumerate(zip(students, masks, strict=True))
    ]
    autocast = None if precise == torch.float64 else implementations.autocast_dtype(device)
    product_dtype = autocast or students[0].dtype
    chosen, asked = implementations.choose("ortho_proj_loss", backend, device, product_dtype)

    with implementations.no_autocast(device):
        students = [x.reshape(-1, x.shape[-1]).to(product_dtype) for x in students]
        teachers = [y.detach().reshape(-1, y.shape[-1]) for y in teachers]
        core = _core(chosen, asked, teachers, process_group)
        batch_norm = core is not None and normalization == "batch_norm"
        without_z = core is not None and orthonormal and loss == "mse" and not batch_norm

        local, sums, denominators = [], [], [1.0] * len(students)
        if reduction == "mean" or batch_norm:
            local = [_totals(students, row_weights, precise, process_group, batch_norm)]
            if batch_norm:
                local += [core.statistics.column_sums(rows, row_weights) for rows in (teachers, students)]
            sums = all_reduce_together(local, process_group)
        if reduction == "mean":
            denominators = _denominators(sums[0], t)

        if core is not None and normalization == "whiten":
            teachers = whiten_each(
                [y.to(precise) for y in teachers], row_weights, method="zca", eps=eps, group=process_group
            )
        if isinstance(scale, torch.Tensor) and not without_z:
            scale = scale.to(weight.dtype).reshape(*scale.shape, *[1] * (weight.dim() - scale.dim()))
        if scale is not None and not without_z:
            weight = weight * scale
        if core is None:
            share = _referenced(
                students, teachers, weight, bias, row_weights, denominators=denominators,
                normalization=normalization, loss=loss, beta=beta, eps=eps, group=process_group,
            )  # fmt: skip
        elif without_z:
            share = core.mses(
                students, teachers, weight, row_weights, scale=1.0 if scale is None else scale,
                layer_norm=normalization == "layer_norm", eps=eps, denominators=denominators,
            )  # fmt: skip
        else:
            bias, shift, inverse_std = None if bias is None else bias.to(precise), None, None
            if batch_norm:
                weight, bias, shift, inverse_std = _standardised(
                    core.statistics, students, teachers, weight, bias, row_weights, sums, local[2], eps, process_group
                )
            share = core.losses(
                students, teachers, weight, bias, row_weights, shift, inverse_std,
                layer_norm=normalization == "layer_norm", eps=eps, loss=loss, beta=beta, denominators=denominators,
            )  # fmt: skip
        return global_loss(share, process_group)


def _core(chosen: str, asked: bool, teachers, group) -> Core | None:
    """Triton's kernels, the same schedules in PyTorch, or None for the reference."""
    if chosen == "triton":
        from .triton import launch  # here, because Triton need not be installed

        return Core(launch.fused_losses, launch.fused_orthonormal_mses, launch)
    # Asked for by name, PyTorch is the reference (which has second-order gradients). Left to choose, large problems
    # avoid its N x T temporaries; and ranks, which may differ in size, all take the path with the same collectives.
    large = group is not None or max(y.numel() for y in teachers) > CHUNKED_FROM
    return Core(chunked_losses, orthonormal_mses, statistics) if large and not asked else None


def _referenced(students, teachers, weight, bias, row_weights, *, denominators, **options):
    return together(weight, [
        reference.loss_sum(x, y, p, b, w, **options) / denominator
        for x, y, (p, b), w, denominator in zip(
            students, teachers, by_level(weight, bias), row_weights, denominators, strict=True)
    ])  # fmt: skip


def _standardised(statistics, students, teachers, weight, bias, row_weights, sums, student_sum, eps, group):
    """(weight, bias, shift, 1 / std) with which a core that knows constant statistics of the teacher's channels, and
    no others, gives the loss of batch_norm.

    It needs no pass over Z: mean(Z) = P mean(X) and var(Z)_j = p_j Cov(X) p_jᵀ, so standardising Z is another weight
    and bias, whose gradients flow on through the student's statistics. student_sum is that of this process, sums are of
    all ranks: of weights, teachers, students.
    """
    total = sums[0]
    divisor = torch.where(total > 0, total, 1.0)[:, None] if isinstance(total, torch.Tensor) else total[0]
    shift, mean = (x / divisor for x in sums[1:])
    squares = statistics.column_centred_square_sums(teachers, row_weights, shift)
    moments = statistics.student_moments(students, row_weights, student_sum, mean)
    squares, student_sum, scatters = all_reduce_together([squares, *moments], group)
    mean = student_sum / divisor  # the same, with gradients
    p = weight.reshape(-1, *weight.shape[-2:]).to(mean.dtype)
    variance = ((p @ scatters) * p).sum(2).clamp_min(0) / divisor
    p = p * torch.rsqrt(variance + eps)[:, :, None]
    # The mean of what the product will see: its weight is rounded to the student's dtype. No product of matrices, which
    # might be in TF32. A bias cancels.
    unbiased = -(p.to(students[0].dtype).to(mean.dtype) * mean[:, None, :]).sum(2)
    bias = unbiased if bias is None else unbiased + 0.0 * bias
    folded = p, bias, shift, torch.rsqrt(squares / divisor + eps)
    return folded if weight.dim() == 3 else [x.squeeze(0) for x in folded]


def _totals(students, row_weights, dtype, group, batch_norm) -> list[float] | torch.Tensor:
    """Σ of the weights of this process's rows, for each loss: numbers, or (G,) where it must be known on the device."""
    # A compiled graph for any number of rows takes tensors: an operator's number would be part of the graph.
    on_device = group is not None or (batch_norm and len(students) > 1) or torch.compiler.is_compiling()
    if not on_device and all(w is None for w in row_weights):
        return [float(x.shape[0]) for x in students]
    sums = [
        x.new_full((), x.shape[0], dtype=dtype) if w is None else w.sum()
        for x, w in zip(students, row_weights, strict=True)
    ]
    return torch.stack(sums) if len(sums) > 1 else sums[0][None]


def _denominators(total: list[float] | torch.Tensor, t: int):
    """What each loss's sum over this process's rows is divided by: numbers, or a tensor (G,) that is nowhere 0."""
    if isinstance(total, torch.Tensor):
        return torch.where(total > 0, total * t, 1.0)
    return [n * t for n in total]


def check_options(normalization, loss, beta, eps, reduction) -> None:
    checks.check_choice("normalization", normalization, NORMALIZATIONS)
    checks.check_choice("loss", loss, LOSSES)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_number("beta", beta, above=0)
    checks.check_number("eps", eps, at_least=0, at_most=1 if normalization == "whiten" else None)


def _name(argument: str, weight: torch.Tensor, level: int) -> str:
    """How an error names a level's argument."""
    return f"{argument}s[{level}]" if weight.dim() == 3 else argument


def _check(students, teachers, weight, scale, bias, process_group, several: bool) -> None:
    """Dtypes, shapes and devices of the tensors."""
    plural, shape = ("s", "(G, T, S)") if several else ("", "(T, S)")
    weight_name = "weight" + plural
    checks.check_tensor(weight_name, weight)
    if weight.dim() != 2 + several or (several and weight.shape[0] != len(students)):
        expected = f" with G = {len(students)}, the number of students" if several else ""
        raise ValueError(f"{weight_name} must have the shape {shape}{expected}; got {tuple(weight.shape)}")
    for level, rows in enumerate(zip(students, teachers, strict=True)):
        _check_level(*rows, weight, weight_name, level, process_group)
        for name, value, first in zip(("students", "teachers"), rows, (students[0], teachers[0]), strict=True):
            if value.dtype != first.dtype:
                raise TypeError(
                    f"{name} must have one dtype; got {name}[0] {first.dtype}, {name}[{level}] {value.dtype}"
                )
            checks.check_same_device(f"{name}[{level}]", value, f"{name}[0]", first)
    student, teacher = students[0], teachers[0]
    double = [v.dtype == torch.float64 for v in (student, teacher, weight)]
    if any(double) and not all(double):
        raise TypeError(
            f"student{plural}, teacher{plural} and {weight_name} must all be float64 or none; got "
            f"student{plural} {student.dtype}, teacher{plural} {teacher.dtype}, {weight_name} {weight.dtype}"
        )
    checks.check_same_device(weight_name, weight, _name("student", weight, 0), student)
    channels, shape = tuple(weight.shape[:-1]), shape.replace(", S", "" if several else ",")
    if bias is not None:
        checks.check_tensor("bias", bias)
        if tuple(bias.shape) != channels:
            raise ValueError(f"bias must have the shape {shape} = {channels}; got {tuple(bias.shape)}")
        checks.check_same_device("bias", bias, "student", student)
    if isinstance(scale, torch.Tensor):
        checks.check_tensor("scale", scale)
        if tuple(scale.shape) not in ((), channels[:1], channels):
            shapes = ("(), (G,)" if several else "()") + f" or {shape} = {channels}"
            raise ValueError(f"scale must be a number, or a tensor of shape {shapes}; got {tuple(scale.shape)}")
        checks.check_same_device("scale", scale, "student", student)
    elif scale is not None:
        checks.check_number("scale", scale)
    check_group(process_group)


def _check_level(student, teacher, weight, weight_name, level, process_group) -> None:
    t, s = weight.shape[-2:]
    names = [_name(name, weight, level) for name in ("student", "teacher")]
    for name, value, size, letter in ((names[0], student, s, "S"), (names[1], teacher, t, "T")):
        checks.check_tensor(name, value)
        if value.dim() < 2 or value.shape[-1] != size:
            raise ValueError(
                f"{name} must have the shape (..., {letter}) with {letter} = {size}, as {weight_name} "
                f"{tuple(weight.shape)} says; got {tuple(value.shape)}"
            )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same rows; got {names[0]} of shape "
            f"{tuple(student.shape)} and {names[1]} of shape {tuple(teacher.shape)}"
        )
    if t == 0 or s == 0 or (student.numel() == 0 and process_group is None):
        raise ValueError(
            f"{names[0]} is empty: got {names[0]} {tuple(student.shape)}, {names[1]} {tuple(teacher.shape)}"
        )
    checks.check_same_device(names[1], teacher, names[0], student)
