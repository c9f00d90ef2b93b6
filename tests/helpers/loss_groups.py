"""Inputs of several losses at once, and the losses in a group beside each alone."""

import torch

import vkd_kernels as vk
from vkd_kernels.functional import ortho_proj_loss, ortho_proj_losses
from vkd_kernels.ops.ortho_proj_loss.spec import acc_dtype

ROWS = [70, 1, 33, 64]  # more than a tile, one, ragged, a tile


def arguments(rows=ROWS, s=5, t=9, dtype=torch.float64, device="cpu"):
    """students, teachers, weights, scale, bias"""
    random = lambda *size: torch.randn(*size, dtype=torch.float64, device=device).to(dtype)  # noqa: E731
    acc = acc_dtype(dtype)
    return (
        [random(n, s).requires_grad_() for n in rows],
        [2 * random(n, t) + 1 for n in rows],
        vk.cayley(random(len(rows), t, s).to(acc)).to(dtype).to(acc).requires_grad_(),
        (random(len(rows), t).to(acc).abs() + 0.5).requires_grad_(),
        random(len(rows), t).to(acc).requires_grad_(),
    )


def masks_of(kind, rows=ROWS, device="cpu"):
    keep = [torch.arange(n, device=device) % 3 != 1 for n in rows]
    return {
        "no masks": None,
        "bool": keep,
        "weights": [k * torch.rand(len(k), device=device) for k in keep],
        "some": [None if i % 2 else k for i, k in enumerate(keep)],
        "one of them masked": [k & (i != 2) for i, k in enumerate(keep)],
    }[kind]


def in_a_group_and_alone(students, teachers, weights, scale, bias, masks, **options):
    """[(losses, gradients), the same of each alone]: of a weighted sum, as a training step takes it."""
    leaves = [*students, *(x for x in (weights, scale, bias) if isinstance(x, torch.Tensor) and x.requires_grad)]
    upstream = torch.linspace(0.5, 2, len(students), dtype=torch.float64, device=weights.device)
    grouped = ortho_proj_losses(students, teachers, weights, scale=scale, bias=bias, masks=masks, **options)
    alone = torch.stack(
        [
            ortho_proj_loss(
                x,
                y,
                weights[i],
                bias=None if bias is None else bias[i],
                mask=None if masks is None else masks[i],
                scale=scale[i] if isinstance(scale, torch.Tensor) and scale.dim() else scale,
                **options,
            )
            for i, (x, y) in enumerate(zip(students, teachers, strict=True))
        ]
    )
    return [(v.detach(), torch.autograd.grad(v, leaves, upstream.to(v.dtype))) for v in (grouped, alone)]


def assert_equal(results, **tolerance):
    (grouped, gradients), (alone, expected) = results
    assert grouped.shape == alone.shape and grouped.dtype == alone.dtype
    torch.testing.assert_close(grouped, alone, **tolerance)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
