"""Host time of one call of an operator with a loss's 17 arguments, by how its gradient is declared.

    pytest benchmarks/bench_operators.py --benchmark-only       a table, and the record
    python -m benchmarks.bench_operators                        the record alone (report.py's page shows it)

The operator does next to nothing, so a row is what the declaration costs. The record in results/cpu is why
vkd_kernels/ops/library.py declares gradients by an autograd.Function of its own.
"""

import sys
from typing import Any

import torch

from benchmarks import floors, harness
from vkd_kernels.ops import library

LIMITS = {"output": 0.0, "gradients": 0.0}


def loss_like(
    *,
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    channel_shift: torch.Tensor | None,
    channel_scale: torch.Tensor | None,
    denominator: torch.Tensor | None,
    factor: float,
    normalization: str,
    eps: float,
    smooth_l1: float,
    beta: float,
    workspace_bytes: int,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return student.new_ones(()), torch.ones_like(student), torch.ones_like(weight)


def save(ctx: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])


def gradients(ctx: Any, *grad_outputs: torch.Tensor | None) -> dict[str, torch.Tensor]:
    grad_student, grad_weight = ctx.saved_tensors
    return {"student": grad_student, "weight": grad_weight}


def in_order(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    of = gradients(ctx, *grad_outputs)
    return of["student"], None, of["weight"], *[None] * 14


def by_custom_op() -> Any:
    function = library.by_position(loss_like)
    op = torch.library.custom_op("vkd_kernels_bench::by_custom_op", function, mutates_args=())
    op.register_fake(function)
    op.register_autograd(in_order, setup_context=save)
    return op


def by_register_autograd() -> Any:
    name, function = "vkd_kernels_bench::by_register_autograd", library.by_position(loss_like)
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "CompositeExplicitAutograd")(function)
    torch.library.register_fake(name, function)
    torch.library.register_autograd(name, in_order, setup_context=save)
    return torch.ops.vkd_kernels_bench.by_register_autograd.default


def by_this_package() -> Any:
    op = library.operator(shapes=loss_like)(loss_like)
    library.differentiable(op, save=save, backward=gradients)
    return op.overload  # the record is of the path through the dispatcher


def candidate(name: str, op: Any) -> harness.Candidate:
    def build(inputs: list[torch.Tensor]) -> harness.Calls:
        student, teacher, weight = inputs
        rest = (None, None, None, None, None, 1.0, "layer_norm", 1e-5, 1.0, 1.0, 1 << 20, True, True, False)
        upstream = torch.ones(())
        return harness.autograd_calls(lambda: op(student, teacher, weight, *rest)[0], [student, weight], upstream)

    return harness.Candidate(name, build, harness_check)


def harness_check(truth: Any, output: torch.Tensor, grads: Any) -> dict[str, float]:
    return harness.compare(output, grads, truth)


def cases(device: str) -> list[harness.Case]:
    def inputs(seed: int) -> list[torch.Tensor]:
        return [torch.ones(4, 4, device=device, requires_grad=need) for need in (True, False, True)]

    return [
        harness.Case(
            name="an operator of 17 arguments",
            parameters={"arguments": 17},
            dtype="float32",
            cost=floors.Cost(flops=0, bytes=3 * 64),
            inputs=inputs,
            input_bytes=3 * 64,
            candidates=[
                candidate("vkd_kernels", by_this_package()),
                candidate("torch.library.custom_op", by_custom_op()),
                candidate("torch.library.register_autograd", by_register_autograd()),
            ],
            limits=LIMITS,
            truth=lambda inputs: (torch.ones(()), [torch.ones(4, 4)] * 2),
        )
    ]


def test_operators(measured, case, candidate, which):
    measured(case, candidate, which)


def main(arguments: list[str] | None = None) -> int:
    return harness.main("operators", cases, lambda device: (torch.float32,), arguments)


if __name__ == "__main__":
    sys.exit(main())
