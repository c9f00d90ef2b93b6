"""Squared error and cosine with a semi-orthogonal weight, which need no projected features, against eager PyTorch.

    pytest benchmarks/bench_semi_orthogonal.py --benchmark-only        a table per case, and records
    python -m benchmarks.bench_semi_orthogonal [-k NAME]               the records alone

``eager`` is what a user would write, ``any weight`` the same loss where it is not known that weightᵀ weight = I. The
gradient of a semi-orthogonal weight is compared in the part that its parametrization lets through.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import floors, harness
from benchmarks.bench_ortho_proj_loss import LIMITS, features
from vkd_kernels.ops.ortho_proj_loss import api
from vkd_kernels.ops.ortho_proj_loss.spec import Execution, LossSpec

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
CPU_SIZE = (16384, 192, 3024)
GPU_SIZE = (100352, 192, 3024)


def fused(inputs: Inputs, loss: str, semi_orthogonal: bool) -> torch.Tensor:
    student, teacher, weight = inputs
    spec = LossSpec(loss=((loss, 1.0),))
    execution = Execution(semi_orthogonal=semi_orthogonal)
    return api.projected_loss(student, teacher, weight, spec=spec, execution=execution)


def eager(inputs: Inputs, loss: str) -> torch.Tensor:
    student, teacher, weight = inputs
    with torch.autocast(student.device.type, student.dtype, enabled=student.dtype != torch.float32):
        z = F.linear(student, weight)
        target = F.layer_norm(teacher, teacher.shape[-1:])
        if loss == "mse":
            return F.mse_loss(z, target)
        return (1 - F.cosine_similarity(z.float(), target.float())).mean()


def true_loss(inputs: Inputs, loss: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(loss, gradients in student and, along the manifold, weight) of the reference in float64."""
    student, teacher, weight = inputs
    leaves = [student.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    spec = LossSpec(loss=((loss, 1.0),))
    value = api.projected_loss(leaves[0], teacher.double(), leaves[1], spec=spec, execution=Execution(backend="torch"))
    grad_student, grad_weight = torch.autograd.grad(value, leaves)
    return value.detach(), [grad_student, along_manifold(grad_weight, leaves[1].detach())]


def along_manifold(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The part of a weight's gradient that an orthogonal parametrization lets through: G - P sym(Pᵀ G)."""
    inner = weight.T @ gradient
    return gradient - weight @ (inner + inner.T) / 2


def candidate(name: str, function: Callable[[Inputs], torch.Tensor]) -> harness.Candidate:
    weights: list[torch.Tensor] = []

    def build(inputs: Inputs) -> harness.Calls:
        student, _, weight = inputs
        weights.append(weight.detach().double())
        upstream = torch.ones((), device=student.device)
        return harness.autograd_calls(lambda: function(inputs), [student, weight], upstream)

    def check(truth: Any, output: torch.Tensor, gradients: Any) -> dict[str, float]:
        along = along_manifold(gradients[1].double(), weights[0])
        return harness.compare(output, [gradients[0], along], truth)

    return harness.Candidate(name, build, check)


def loss_case(size: tuple[int, int, int], loss: str, dtype: torch.dtype, device: str) -> harness.Case:
    n, s, t = size
    short = str(dtype).removeprefix("torch.")
    products = floors.loss_cost(n, s, t, dtype.itemsize)
    candidates = [
        candidate("vkd_kernels", functools.partial(fused, loss=loss, semi_orthogonal=True)),
        candidate("any weight", functools.partial(fused, loss=loss, semi_orthogonal=False)),
        candidate("eager", functools.partial(eager, loss=loss)),
    ]
    return harness.Case(
        name=f"{loss} {n} x {s} -> {t} {short}",
        parameters={"loss": loss, "n": n, "s": s, "t": t, "normalization": "layer_norm"},
        dtype=short,
        cost=floors.Cost(products.flops * 2 // 3, products.bytes),  # T P and its gradient in P
        inputs=lambda seed: features(n, s, t, dtype, device, seed),
        input_bytes=n * (s + t) * dtype.itemsize,
        candidates=candidates,
        limits=LIMITS[dtype],
        truth=functools.partial(true_loss, loss=loss),
    )


def cases(device: str) -> list[harness.Case]:
    size, dtype = (GPU_SIZE, torch.bfloat16) if device == "cuda" else (CPU_SIZE, torch.float32)
    return [loss_case(size, loss, dtype, device) for loss in ("cosine", "mse")]


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16,) if device == "cuda" else (torch.float32,)


def test_semi_orthogonal(measured, case, candidate, which):
    measured(case, candidate, which)


if __name__ == "__main__":
    sys.exit(harness.main("semi_orthogonal", cases, dtypes))
