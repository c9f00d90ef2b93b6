"""The projected feature loss: its public functions (validation.py checks, dispatch.py goes on)."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from . import dispatch, validation
from .spec import Execution, LossSpec
from .validation import LOSSES, NORMALIZATIONS, REDUCTIONS, check_options, check_scale_acts, loss_spec

__all__ = [
    "LOSSES",
    "NORMALIZATIONS",
    "REDUCTIONS",
    "check_options",
    "check_scale_acts",
    "loss_spec",
    "ortho_proj_loss",
    "ortho_proj_losses",
    "projected_loss",
    "projected_losses",
]


def ortho_proj_loss(
    student: torch.Tensor,  # (..., S)
    teacher: torch.Tensor,  # (..., T)
    weight: torch.Tensor,  # (T, S)
    *,
    scale: float | torch.Tensor | None = None,  # number, () or (T,)
    bias: torch.Tensor | None = None,  # (T,)
    mask: torch.Tensor | None = None,  # (...)
    normalization: str | nn.Module = "layer_norm",
    loss: str | Mapping[str, float] = "smooth_l1",
    beta: float = 1.0,
    eps: float = 1e-5,
    reduction: str = "mean",
    process_group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> torch.Tensor:
    r"""Distance between projected student features and normalized teacher features (V_kD, CVPR 2024, section 3).

    ::

        Z = student weightᵀ · scale + bias          T = normalize(teacher)
        L = mean over rows and channels of ρ(Z - T), or mean over rows of 1 - cos(z, t)

    The product is taken in the student's dtype (autocast's under autocast) and accumulated in float32; normalization
    and loss are float32. float64 works throughout when student, teacher and weight all are.

    Args:
        student, teacher: float32, bfloat16, float16 or float64; rows are all dimensions but the last. The teacher is a
            constant.
        weight: any matrix; gradients are those of any matrix.
        scale, bias: multiply and shift Z; with the cosine alone a ``scale`` of all channels must be 1.0.
        mask: bool, or finite float weights of at least 0, a constant. Rows of weight 0 count nowhere, whatever they
            hold; with no row left the loss is 0 with zero gradients. Other weights are an error on a CPU; on a GPU and
            in a compiled graph, where looking would stall, a negative one counts as 0, and NaN makes the loss NaN.
        normalization: of each teacher row: ``"layer_norm"`` (standardized over its channels), ``"l2"`` (divided by its
            norm) or ``"none"``; over the rows: ``"batch_norm"`` (each channel standardized, Z likewise, with gradients
            through its statistics) or ``"whiten"`` (ZCA with shrinkage ``eps``: choose it larger, 1e-3 say); or an
            ``nn.Module``, called as ``module(teacher, mask)`` for the targets.
        loss: ``"smooth_l1"`` (quadratic below ``beta``), ``"mse"``, ``"cosine"`` (norms of at least 1e-8, so that a row
            of zeros has the loss 1), or a mixture such as ``{"cosine": 0.9, "smooth_l1": 0.1}``.
        reduction: ``"mean"`` over the rows by their weights, or ``"sum"`` over rows and (but for cosine) channels.
        process_group: statistics and mean over the rows of all its ranks, which may differ in number. Every rank
            returns the global loss, and gradients that DDP averages are those of one process with all rows.
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
        student,
        teacher,
        weight,
        scale=scale,
        bias=bias,
        mask=mask,
        spec=loss_spec(normalization=normalization, loss=loss, beta=beta, eps=eps, reduction=reduction),
        execution=Execution(process_group=process_group, backend=backend),
    )


def ortho_proj_losses(
    students: Sequence[torch.Tensor],  # G of (..., S)
    teachers: Sequence[torch.Tensor],  # G of (..., T)
    weights: torch.Tensor,  # (G, T, S)
    *,
    scale: float | torch.Tensor | None = None,  # number, (), (G,) or (G, T)
    bias: torch.Tensor | None = None,  # (G, T)
    masks: Sequence[torch.Tensor | None] | None = None,  # G of (...)
    normalization: str | nn.Module = "layer_norm",
    loss: str | Mapping[str, float] = "smooth_l1",
    beta: float = 1.0,
    eps: float = 1e-5,
    reduction: str = "mean",
    process_group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> torch.Tensor:  # (G,)
    """Several losses of equal S and T at once: entry i is ``ortho_proj_loss(students[i], teachers[i], weights[i])``.

    For features of several layers or resolutions, which may differ in their rows. On a GPU losses of few rows share
    their launches. Across ranks all share their collectives (``backend="torch"``, the definition, has its own).

    Args:
        students: G tensors ``(..., S)`` of one dtype.
        teachers: G tensors ``(..., T)`` of one dtype, with the rows of ``students``.
        weights: ``(G, T, S)``, as ``cayley`` gives it for a batch.
        scale: one for all, one per loss, or one per loss and teacher channel.
        bias: one value per loss and teacher channel.
        masks: for each loss a mask of its rows or ``None``; ``None``: there are none.
        normalization, loss, beta, eps, reduction, process_group, backend: see ``ortho_proj_loss``.

    Returns:
        ``(G,)`` float32 (float64 for float64 inputs).

    Raises:
        As ``ortho_proj_loss``, naming the loss: ``students[2] must have the shape ...``.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> students, teachers = [torch.randn(n, 64) for n in (50, 20)], [torch.randn(n, 96) for n in (50, 20)]
        >>> weights = vk.cayley(torch.randn(2, 96, 64))
        >>> vk.functional.ortho_proj_losses(students, teachers, weights, normalization="batch_norm").shape
        torch.Size([2])
    """
    return projected_losses(
        students,
        teachers,
        weights,
        scale=scale,
        bias=bias,
        masks=masks,
        spec=loss_spec(normalization=normalization, loss=loss, beta=beta, eps=eps, reduction=reduction),
        execution=Execution(process_group=process_group, backend=backend),
    )


def projected_loss(
    student: torch.Tensor,  # (..., S)
    teacher: torch.Tensor,  # (..., T)
    weight: torch.Tensor,  # (T, S)
    *,
    scale: float | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    spec: LossSpec,
    execution: Execution,
) -> torch.Tensor:  # ()
    """ortho_proj_loss for the modules, which know more of how it is to be computed (Execution)."""
    validation.check_one(
        student, teacher, weight, scale=scale, bias=bias, mask=mask, process_group=execution.process_group
    )
    validation.check_scale_acts(spec, scale, channel_dims=1)
    return dispatch.loss(student, teacher, weight, scale=scale, bias=bias, mask=mask, spec=spec, execution=execution)


def projected_losses(
    students: Sequence[torch.Tensor],  # G of (..., S)
    teachers: Sequence[torch.Tensor],  # G of (..., T)
    weights: torch.Tensor,  # (G, T, S)
    *,
    scale: float | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    masks: Sequence[torch.Tensor | None] | None = None,
    spec: LossSpec,
    execution: Execution,
) -> torch.Tensor:  # (G,)
    """ortho_proj_losses for the modules, which know more of how they are to be computed (Execution)."""
    students, teachers, masks = validation.check_lists(students, teachers, masks)
    validation.check_group_of(
        students, teachers, weights, scale=scale, bias=bias, masks=masks, process_group=execution.process_group
    )
    validation.check_scale_acts(spec, scale, channel_dims=2)
    return dispatch.group_loss(
        students, teachers, weights, scale=scale, bias=bias, masks=masks, spec=spec, execution=execution
    )
