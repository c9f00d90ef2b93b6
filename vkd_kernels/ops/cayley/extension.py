"""The extension's operators for torch.library: fake tensors and autograd (kernels: csrc/)."""

from typing import Any

import torch

from .. import implementations


def cayley(weight: torch.Tensor) -> torch.Tensor:  # (..., T, S), T >= S -> (..., T, S)
    """What reference.cayley defines, by the extension; api.py has checked the arguments."""
    return torch.ops.vkd_kernels.cayley_forward(weight)[0]


def _forward_fake(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (..., T, S) -> the same, (..., S, S)
    s = weight.shape[-1]
    return (
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        weight.new_empty((*weight.shape[:-2], s, s), dtype=torch.float64),
    )


def _backward_fake(grad_q: torch.Tensor, weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    (weight,) = inputs
    _, r = output
    ctx.mark_non_differentiable(r)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, r)


def _backward(ctx: Any, grad_q: torch.Tensor | None, grad_r: torch.Tensor | None) -> torch.Tensor | None:
    weight, r = ctx.saved_tensors
    return None if grad_q is None else torch.ops.vkd_kernels.cayley_backward(grad_q, weight, r)


def _forward_vmap(
    info: Any, in_dims: tuple[int], weight: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int]]:
    return torch.ops.vkd_kernels.cayley_forward(weight.movedim(in_dims[0], 0)), (0, 0)


def _backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], grad_q: torch.Tensor, weight: torch.Tensor, r: torch.Tensor
) -> tuple[torch.Tensor, int]:
    batched = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip((grad_q, weight, r), in_dims, strict=True)
    ]
    return torch.ops.vkd_kernels.cayley_backward(*batched), 0


def _refuse_second_order(ctx: Any, *grads: torch.Tensor) -> None:
    raise RuntimeError(
        "the extension's Cayley transform has no second-order gradient: "
        'use vkd_kernels.functional.cayley(..., backend="torch") or VKD_KERNELS_BACKEND=torch'
    )


if implementations.extension()[0] is not None:
    torch.library.register_fake("vkd_kernels::cayley_forward", _forward_fake)
    torch.library.register_fake("vkd_kernels::cayley_backward", _backward_fake)
    torch.library.register_autograd("vkd_kernels::cayley_forward", _backward, setup_context=_save_for_backward)
    torch.library.register_autograd("vkd_kernels::cayley_backward", _refuse_second_order)
    torch.library.register_vmap("vkd_kernels::cayley_forward", _forward_vmap)
    torch.library.register_vmap("vkd_kernels::cayley_backward", _backward_vmap)
