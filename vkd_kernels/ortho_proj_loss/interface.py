"""The projected feature loss: validates, folds scales and statistics, chooses a backend (reference.py defines it)."""

import torch

from .. import _backend, _checks
from ..normalization.reference import sum_of_weights, total_weight, whiten
from ..normalization.synchronised import all_reduce, check_group, global_loss
from . import moments, reference
from .chunked import chunked_loss, orthonormal_mse

NORMALIZATIONS = ("layer_norm", "batch_norm", "whiten", "none")
LOSSES = ("smooth_l1", "mse")
REDUCTIONS = ("mean", "sum")
CHUNKED_FROM = 2**24  # elements of N x T (64 MiB in float32) from which PyTorch goes by chunks of rows


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


def projected_loss(
    student, teacher, weight, *, scale, bias, mask, normalization, loss, beta, eps, reduction, process_group, backend,
    orthonormal,
):  # fmt: skip
    """ortho_proj_loss, told by OrthoProjLoss whether weightᵀ weight = I: squared error then needs no Z.

    That form's weight gradient leaves out a part that vanishes through the parametrisation of an orthonormal weight.
    """
    rows = _check(student, teacher, weight, scale, bias, process_group)
    check_options(normalization, loss, beta, eps, reduction)

    device = student.device.type
    precise = torch.promote_types(student.dtype, torch.float32)
    row_weight = _checks.row_weights("mask", mask, rows, student, precise)
    autocast = None if precise == torch.float64 else _backend.autocast_dtype(device)
    product_dtype = autocast or student.dtype
    chosen, asked = _backend.choose("ortho_proj_loss", backend, device, product_dtype)

    with _backend.no_autocast(device):
        student = student.reshape(-1, student.shape[-1]).to(product_dtype)
        teacher = teacher.detach().reshape(-1, teacher.shape[-1])
        denominator = _denominator(teacher, row_weight, precise, reduction, process_group)
        core, core_without_z, statistics = _cores(chosen, asked, teacher, process_group)
        if core is not None and orthonormal and loss == "mse" and normalization != "batch_norm":
            if normalization == "whiten":
                teacher = whiten(teacher.to(precise), row_weight, method="zca", eps=eps, group=process_group)
            share = core_without_z(
                student, teacher, weight, row_weight, scale=1.0 if scale is None else scale,
                layer_norm=normalization == "layer_norm", eps=eps, denominator=denominator,
            )  # fmt: skip
            return global_loss(share, process_group)
        if scale is not None:
            weight = weight * (scale.to(weight.dtype).reshape(-1, 1) if isinstance(scale, torch.Tensor) else scale)
        options = {"normalization": normalization, "loss": loss, "beta": beta, "eps": eps, "group": process_group}
        if core is None:
            share = reference.loss_sum(student, teacher, weight, bias, row_weight, **options) / denominator
        else:
            share = _folded(
                core, statistics, student, teacher, weight, bias, row_weight, denominator=denominator, **options
            )
        return global_loss(share, process_group)


def _cores(chosen: str, asked: bool, teacher: torch.Tensor, group):
    """What computes the loss, squared error with an orthonormal weight, and (a module) statistics over the rows:
    Triton's kernels, the same schedules in PyTorch, or None for the reference."""
    if chosen == "triton":
        from . import triton_op  # here, because Triton need not be installed

        return triton_op.fused_loss, triton_op.fused_orthonormal_mse, triton_op
    # Asked for by name, PyTorch is the reference (which has second-order gradients). Left to choose, large problems
    # avoid its N x T temporaries; and ranks, which may differ in size, all take the path with the same collectives.
    large = group is not None or teacher.numel() > CHUNKED_FROM
    return (chunked_loss, orthonormal_mse, moments) if large and not asked else (None, None, None)


def _folded(
    core, statistics, student, teacher, weight, bias, row_weight, *, normalization, loss, beta, eps, denominator, group
):
    """The loss by a core that knows a bias, layer norm and constant statistics of the teacher's channels.

    batch_norm needs no pass over Z: mean(Z) = P mean(X) and var(Z)_j = p_j Cov(X) p_jᵀ, so standardising Z is another
    weight and bias, whose gradients flow on through the student's moments.
    """
    precise = torch.promote_types(student.dtype, torch.float32)
    shift = inverse_std = None
    bias = None if bias is None else bias.to(precise)
    if normalization == "whiten":
        teacher = whiten(teacher.to(precise), row_weight, method="zca", eps=eps, group=group)
    elif normalization == "batch_norm":
        total = total_weight(teacher[:, :0].to(precise), row_weight, group)
        shift = all_reduce(statistics.column_sum(teacher, row_weight), group) / total
        variance = all_reduce(statistics.column_centred_square_sum(teacher, row_weight, shift), group) / total
        inverse_std = torch.rsqrt(variance + eps)
        mean = all_reduce(statistics.student_sum(student, row_weight), group) / total
        covariance = all_reduce(statistics.student_scatter(student, row_weight, mean), group) / total
        p = weight.to(precise)
        weight = p * torch.rsqrt(((p @ covariance) * p).sum(1).clamp_min(0) + eps)[:, None]
        # The mean of what the product will see: its weight is rounded to the student's dtype. A bias cancels.
        unbiased = -(weight.to(student.dtype).to(precise) @ mean)
        bias = unbiased if bias is None else unbiased + 0.0 * bias
    return core(
        student, teacher, weight, bias, row_weight, shift, inverse_std,
        layer_norm=normalization == "layer_norm", eps=eps, loss=loss, beta=beta, denominator=denominator,
    )  # fmt: skip


def _denominator(teacher, row_weight, precise, reduction, group):
    """What the sum over this process's rows is divided by: a number, or a 0-d tensor that is never 0."""
    if reduction == "sum":
        return 1.0
    # A compiled graph for any number of rows takes it as a tensor: an operator's number would be part of the graph.
    if row_weight is None and group is None and not torch.compiler.is_compiling():
        return float(teacher.numel())
    total = sum_of_weights(teacher[:, :0].to(precise), row_weight, group)
    return torch.where(total > 0, total * teacher.shape[1], 1.0)


def check_options(normalization, loss, beta, eps, reduction) -> None:
    _checks.check_choice("normalization", normalization, NORMALIZATIONS)
    _checks.check_choice("loss", loss, LOSSES)
    _checks.check_choice("reduction", reduction, REDUCTIONS)
    _checks.check_number("beta", beta, above=0)
    _checks.check_number("eps", eps, at_least=0, at_most=1 if normalization == "whiten" else None)


def _check(student, teacher, weight, scale, bias, process_group) -> torch.Size:
    """Dtypes, shapes and devices of the tensors; returns the shape of the rows."""
    for name, value in (("student", student), ("teacher", teacher), ("weight", weight)):
        _checks.check_tensor(name, value)
    if weight.dim() != 2:
        raise ValueError(f"weight must have the shape (T, S); got {tuple(weight.shape)}")
    t, s = weight.shape
    for name, value, size, letter in (("student", student, s, "S"), ("teacher", teacher, t, "T")):
        if value.dim() < 2 or value.shape[-1] != size:
            raise ValueError(
                f"{name} must have the shape (..., {letter}) with {letter} = {size}, as weight {tuple(weight.shape)} "
                f"says; got {tuple(value.shape)}"
            )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student and teacher must have the same rows; got student of shape "
            f"{tuple(student.shape)} and teacher of shape {tuple(teacher.shape)}"
        )
    if t == 0 or s == 0 or (student.numel() == 0 and process_group is None):
        raise ValueError(f"student is empty: got student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    double = [v.dtype == torch.float64 for v in (student, teacher, weight)]
    if any(double) and not all(double):
        raise TypeError(
            "student, teacher and weight must all be float64 or none; got "
            f"student {student.dtype}, teacher {teacher.dtype}, weight {weight.dtype}"
        )
    _checks.check_same_device("teacher", teacher, "student", student)
    _checks.check_same_device("weight", weight, "student", student)
    if bias is not None:
        _checks.check_tensor("bias", bias)
        if tuple(bias.shape) != (t,):
            raise ValueError(f"bias must have the shape (T,) = ({t},); got {tuple(bias.shape)}")
        _checks.check_same_device("bias", bias, "student", student)
    if isinstance(scale, torch.Tensor):
        _checks.check_tensor("scale", scale)
        if tuple(scale.shape) not in ((), (t,)):
            raise ValueError(
                f"scale must be a number, or a tensor of shape () or (T,) = ({t},); got {tuple(scale.shape)}"
            )
        _checks.check_same_device("scale", scale, "student", student)
    elif scale is not None:
        _checks.check_number("scale", scale)
    check_group(process_group)
    return student.shape[:-1]
