"""The definition of the projected feature loss, in plain PyTorch; triton/launch.py and chunked.py compute the same."""

import torch
import torch.nn.functional as F

from ..normalization import reference as normalization_reference
from ..normalization.reference import standardize, weighted, without_masked_rows


def loss_sum(
    student: torch.Tensor,  # (N, S)
    teacher: torch.Tensor,  # (N, T)
    weight: torch.Tensor,  # (T, S), scale folded in
    bias: torch.Tensor | None,  # (T,)
    row_weight: torch.Tensor | None,  # (N,)
    *,
    normalization: str,
    loss: str,
    beta: float,
    eps: float,
    group=None,
) -> torch.Tensor:  # ()
    """Σ_n w_n Σ_j ρ(Z - T)_nj with Z = student weightᵀ + bias and T = normalise(teacher)."""
    precise = row_weight.dtype if row_weight is not None else torch.promote_types(student.dtype, torch.float32)
    z = (without_masked_rows(student, row_weight) @ weight.to(student.dtype).mT).to(precise)
    z = z if bias is None else z + bias
    target = without_masked_rows(teacher, row_weight).to(precise)
    if normalization == "layer_norm":
        target = F.layer_norm(target, target.shape[-1:], eps=eps)
    elif normalization == "batch_norm":
        target = standardize(target, row_weight, eps=eps, group=group)
        z = standardize(z, row_weight, eps=eps, group=group)
    elif normalization == "whiten":
        target = normalization_reference.whiten(target, row_weight, method="zca", eps=eps, group=group)
    rho = (
        F.mse_loss(z, target, reduction="none")
        if loss == "mse"
        else F.smooth_l1_loss(z, target, beta=beta, reduction="none")
    )
    return weighted(rho, row_weight).sum()
