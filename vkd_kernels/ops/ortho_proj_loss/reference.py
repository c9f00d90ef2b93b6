"""The definition of the projected feature loss, in plain PyTorch; the other implementations compute the same."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..normalization import reference as normalization_reference
from ..normalization.all_reduce import with_gradient
from ..normalization.reference import standardize, weighted, without_masked_rows
from .spec import NORM_FLOOR, LossInputs, LossSpec


def loss(spec: LossSpec, inputs: LossInputs, process_group: "dist.ProcessGroup | None" = None) -> torch.Tensor:  # ()
    """Σ_n w_n · (the loss of row n) / denominator; row statistics are those of all ranks of the group.

    ::

        Z = student weightᵀ + bias     T = normalize(teacher)     batch_norm: Z likewise, with gradients
        mse: Σ_j (Z - T)²     smooth_l1: Σ_j h_β(Z - T)     cosine: (1 - ⟨z, t⟩ / (‖z‖ ‖t‖)), norms of at least 1e-8
    """
    w = inputs.row_weight
    acc = torch.promote_types(inputs.student.dtype, torch.float32)
    z = (without_masked_rows(inputs.student, w) @ inputs.weight.to(inputs.student.dtype).mT).to(acc)
    z = z if inputs.bias is None else z + inputs.bias
    t = without_masked_rows(inputs.teacher, w).to(acc)
    if spec.normalization == "layer_norm":
        t = F.layer_norm(t, t.shape[-1:], eps=spec.eps)
    elif spec.normalization == "l2":
        t = F.normalize(t, dim=-1, eps=spec.eps)
    elif spec.normalization == "batch_norm":
        t = standardize(t, w, eps=spec.eps, group=process_group)
        z = standardize(with_gradient(z, process_group), w, eps=spec.eps, group=process_group)
    elif spec.normalization == "whiten":
        t = normalization_reference.whiten(t, w, method="zca", eps=spec.eps, group=process_group)
    t = without_masked_rows(t, w)  # with eps = 0 a row of zeros has become NaN
    if inputs.channel_shift is not None:
        t = t - inputs.channel_shift
    if inputs.channel_scale is not None:
        t = t * inputs.channel_scale
    coefficients = spec.coefficients(t.shape[1])
    sums = []  # (coefficient, the weighted sum over the rows) of every term
    if coefficients.mse:
        sums.append((coefficients.mse, weighted(F.mse_loss(z, t, reduction="none"), w).sum()))
    if coefficients.smooth_l1:
        huber = F.smooth_l1_loss(z, t, beta=spec.beta, reduction="none")
        sums.append((coefficients.smooth_l1, weighted(huber, w).sum()))
    if coefficients.cosine:
        # Clamped before the root, whose second derivative at 0 (a masked row) would be NaN.
        z_norm, t_norm = (x.square().sum(1).clamp_min(NORM_FLOOR**2).sqrt() for x in (z, t))
        distance = 1 - (z * t).sum(1) / (z_norm * t_norm)
        sums.append((coefficients.cosine, weighted(distance[:, None], w).sum()))
    first, *others = (total if coefficient == 1.0 else coefficient * total for coefficient, total in sums)
    return sum(others, start=first) / inputs.denominator
