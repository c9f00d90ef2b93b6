"""Row statistics in plain PyTorch, a chunk of rows at a time: what batch_norm needs of teacher and student.

mean(Z) = P mean(X) and var(Z)_j = p_j Cov(X) p_jᵀ, so the projected student's statistics are sums over the student's
rows and need no pass over Z. They are sums, not means, so that they can be added over ranks. A group's rows come as
sequences of G tensors (N, C) and of their weights (N,) or None.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..library import differentiable, operator, refuses_gradients
from ..tf32 import ieee_products
from . import chunks
from .chunks import NO_SECOND_ORDER, weighted_, without_masked_rows
from .spec import acc_dtype

Rows = Sequence[torch.Tensor]
RowWeights = Sequence[torch.Tensor | None]


def column_sums(rows: Rows, row_weights: RowWeights) -> torch.Tensor:  # (G, C)
    """Σ_n w_n x_n in acc_dtype; no gradient."""
    return torch.stack([column_sum(rows=x.detach(), row_weight=w) for x, w in zip(rows, row_weights, strict=True)])


def column_square_sums(rows: Rows, row_weights: RowWeights, means: torch.Tensor) -> torch.Tensor:  # (G, C)
    """Σ_n w_n (x_n - mean)² about means (G, C); no gradient."""
    entries = zip(rows, row_weights, means.detach(), strict=True)
    return torch.stack([column_square_sum(rows=x.detach(), row_weight=w, mean=mean) for x, w, mean in entries])


def student_scatters(
    students: Rows,  # G of (N, S)
    row_weights: RowWeights,
    sums: torch.Tensor,  # (G, S), the students' column_sums
    means: torch.Tensor,  # (G, S), of all rows (of all ranks)
) -> tuple[torch.Tensor, torch.Tensor]:  # (G, S), (G, S, S)
    """The sums again and Σ_n w_n (x_n - mean)(x_n - mean)ᵀ, both differentiable in students.

    The means must be those of all rows: the derivative with respect to them is then 0. Rows are centered before the
    product, which is never in TF32: sound where |mean| is much larger than the deviation.
    """
    entries = zip(students, row_weights, sums.detach(), means.detach(), strict=True)
    results = [student_scatter(student=x, row_weight=w, sums=total, mean=mean) for x, w, total, mean in entries]
    return torch.stack([total for total, _ in results]), torch.stack([scatter for _, scatter in results])


def _chunks(
    x: torch.Tensor, row_weight: torch.Tensor | None, temporaries: int
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """(rows, their weights or None) in chunks whose float32 temporaries fit the workspace."""
    bytes_per_row = temporaries * x.shape[1] * acc_dtype(x.dtype).itemsize
    step = chunks.even_chunk(x.shape[0], chunks.WORKSPACE_BYTES // bytes_per_row)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        yield rows, None if row_weight is None else row_weight[rows]


def _centered(x: torch.Tensor, mean: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    """Rows of x minus the mean, rows of weight 0 as zeros."""
    return without_masked_rows(x.to(mean.dtype) - mean, w)


def _column_sum_shapes(*, rows: torch.Tensor, **others: Any) -> torch.Tensor:
    return rows.new_empty(rows.shape[1:], dtype=acc_dtype(rows.dtype))


@operator(shapes=_column_sum_shapes)
def column_sum(*, rows: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:  # (N, C), (N,) -> (C,)
    """Σ_n w_n x_n."""
    acc = acc_dtype(rows.dtype)
    if row_weight is None:
        return rows.sum(0, dtype=acc)
    total = rows.new_zeros(rows.shape[1], dtype=acc)
    for chunk, w in _chunks(rows, row_weight, temporaries=2):
        total += weighted_(rows[chunk].to(acc, copy=True), w).sum(0)
    return total


def _like_mean(*, mean: torch.Tensor, **others: Any) -> torch.Tensor:
    return torch.empty_like(mean)


@operator(shapes=_like_mean)
def column_square_sum(
    *, rows: torch.Tensor, row_weight: torch.Tensor | None, mean: torch.Tensor
) -> torch.Tensor:  # (N, C), (N,), (C,) -> (C,)
    """Σ_n w_n (x_n - mean)²."""
    total = torch.zeros_like(mean)
    for chunk, w in _chunks(rows, row_weight, temporaries=2):
        total += weighted_((rows[chunk].to(mean.dtype) - mean).square_(), w).sum(0)
    return total


def _scatter_shapes(*, sums: torch.Tensor, mean: torch.Tensor, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(sums), mean.new_empty((mean.shape[0], mean.shape[0]))


@operator(shapes=_scatter_shapes)
def student_scatter(
    *,
    student: torch.Tensor,  # (N, S)
    row_weight: torch.Tensor | None,  # (N,)
    sums: torch.Tensor,  # (S,)
    mean: torch.Tensor,  # (S,)
) -> tuple[torch.Tensor, torch.Tensor]:  # (S,), (S, S)
    """The sums and Σ_n w_n (x_n - mean)(x_n - mean)ᵀ."""
    operand = chunks.operand_dtype(student)
    operand = torch.bfloat16 if operand == torch.float16 else operand  # where d and small weights do not underflow
    s = student.shape[1]
    total = mean.new_zeros((s, s))
    with ieee_products(student.device):
        for chunk, w in _chunks(student, row_weight, temporaries=4):
            d = _centered(student[chunk], mean, w)
            if w is not None:
                d = d * w.sqrt()[:, None]
            if operand == d.dtype:
                total.addmm_(d.T, d)
            else:  # 16-bit products of d = high + low
                high = d.to(operand)
                both = torch.cat([high, (d - high).to(operand)], 1)
                total += chunks.product(both.T, both).view(2, s, 2, s).sum((0, 2))
    return sums.clone(), total


def _like_student(*, student: torch.Tensor, **others: Any) -> torch.Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


@operator(shapes=_like_student)
def student_scatter_backward(
    *,
    grad_sums: torch.Tensor,  # (S,)
    grad_scatter: torch.Tensor,  # (S, S)
    student: torch.Tensor,  # (N, S)
    row_weight: torch.Tensor | None,  # (N,)
    mean: torch.Tensor,  # (S,)
) -> torch.Tensor:  # (N, S)
    """w_n ((C + Cᵀ)(x_n - mean) + s) for the incoming s and C."""
    # float16 would underflow: incoming gradients carry 1 / (N T).
    acc = acc_dtype(student.dtype)
    operand = chunks.operand_dtype(student) if student.dtype == torch.bfloat16 else acc
    symmetric = (grad_scatter + grad_scatter.T).to(operand)
    grad_student = torch.empty_like(student, memory_format=torch.contiguous_format)
    with ieee_products(student.device):
        for chunk, w in _chunks(student, row_weight, temporaries=3):
            d = chunks.product(_centered(student[chunk], mean, w).to(operand), symmetric)
            grad_student[chunk] = weighted_(d.add_(grad_sums), w)
    return grad_student


def _save(ctx: Any, inputs: dict[str, Any], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(inputs["student"], inputs["row_weight"], inputs["mean"])


def _backward(ctx: Any, grad_sums: torch.Tensor | None, grad_scatter: torch.Tensor | None) -> dict[str, torch.Tensor]:
    student, row_weight, mean = ctx.saved_tensors
    s = mean.shape[0]
    grad_student = student_scatter_backward(
        grad_sums=mean.new_zeros(s) if grad_sums is None else grad_sums,
        grad_scatter=mean.new_zeros(s, s) if grad_scatter is None else grad_scatter,
        student=student,
        row_weight=row_weight,
        mean=mean,
    )
    return {"student": grad_student}


differentiable(student_scatter, save=_save, backward=_backward)
refuses_gradients(student_scatter_backward, NO_SECOND_ORDER)
