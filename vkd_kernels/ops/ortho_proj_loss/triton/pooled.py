"""The loss of few rows, or several losses of few rows each, in one launch a step: row statistics, loss, gradients.

G of all rows is kept, and one launch of gradient_tiles makes every gradient in the backward pass::

    dX = alpha G P      dP = alpha Gᵀ X      db = alpha Σ_n G_n      alpha = grad_output unit / denominator
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ... import library
from ..chunks import NO_SECOND_ORDER
from . import rows, tiles
from .launch import Launch, blocks, group_rows, on, precision, prepared, row_stride
from .loss_tiles import TERMS, LossTiles, Terms
from .many_rows import empty_gradient
from .primitives import dot, entry, load_tile, over, rows_of


@triton.jit(do_not_specialize=["N", "blocks_n"])
def gradient_tiles(
    gradient,
    gradient_scale,
    row_unit,
    student,
    weight,
    row_weight,
    column_sums,
    grad_output,
    denominator,
    grad_student,
    grad_weight,
    grad_bias,
    group_rows,
    N,
    S,
    T,
    blocks_n,
    stride_grad_output,
    stride_gradient,
    stride_student,
    stride_weight,
    factors,
    STUDENT_N: tl.constexpr,
    STUDENT_S: tl.constexpr,
    STUDENT_T: tl.constexpr,
    WEIGHT_T: tl.constexpr,
    WEIGHT_S: tl.constexpr,
    WEIGHT_N: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_S: tl.constexpr,
    EVEN_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dX (N, S), dP (T, S) and db (T,) in one launch.

    The first programs make (STUDENT_N, STUDENT_S) tiles of dX (the longer loop starts first), the next ones
    (WEIGHT_T, WEIGHT_S) tiles of dP, the last ones WEIGHT_T entries of db. An output that is None has no programs.
    N is the largest number of rows in the group, blocks_n each one's number of blocks in column_sums.
    """
    tl.assume(T > 0)
    pid = tl.program_id(0)
    g = tl.program_id(1)
    group_first = 0
    group_last = N
    if group_rows is not None:
        group_first, group_last = rows_of(group_rows, g)
    channel = g * T
    alpha = tl.load(grad_output + g * stride_grad_output).to(tl.float32) * over(entry(factors, g), denominator, g)
    alpha_products = alpha
    if gradient_scale is not None:
        alpha_products = alpha / tl.load(gradient_scale)
    student_blocks = tl.cdiv(S, STUDENT_S)
    weight_blocks = tl.cdiv(S, WEIGHT_S)
    student_programs = 0
    weight_programs = 0
    if grad_student is not None:
        student_programs = tl.cdiv(N, STUDENT_N) * student_blocks
    if grad_weight is not None:
        weight_programs = tl.cdiv(T, WEIGHT_T) * weight_blocks

    # dX = alpha G P
    if pid < student_programs:
        if grad_student is not None:
            first_row = group_first + (pid // student_blocks) * STUDENT_N
            first_column = (pid % student_blocks) * STUDENT_S
            if first_row < group_last:
                dx = tl.zeros((STUDENT_N, STUDENT_S), tl.float32)
                for first in tl.range(0, T, STUDENT_T, num_stages=STAGES):
                    start = tl.full((), first, tl.int32)
                    grad = load_tile(
                        gradient, first_row, start, stride_gradient, group_last, T, STUDENT_N, STUDENT_T, EVEN_T, False
                    )
                    p = load_tile(
                        weight,
                        channel + start,
                        first_column,
                        stride_weight,
                        channel + T,
                        S,
                        STUDENT_T,
                        STUDENT_S,
                        EVEN_S,
                        False,
                    )
                    dx = dot(grad, p.to(grad.dtype), dx, PRECISION)
                offs_n = first_row.to(tl.int64) + tl.arange(0, STUDENT_N)
                offs_s = first_column + tl.arange(0, STUDENT_S)
                if row_unit is not None:
                    dx /= tl.load(row_unit + offs_n, mask=offs_n < group_last, other=1.0)[:, None]
                tl.store(
                    grad_student + offs_n[:, None] * S + offs_s[None, :],
                    (alpha_products * dx).to(grad_student.dtype.element_ty),
                    mask=(offs_n < group_last)[:, None] & (offs_s < S)[None, :],
                )
    # dP = alpha Gᵀ X
    elif pid < student_programs + weight_programs:
        if grad_weight is not None:
            first_row = ((pid - student_programs) // weight_blocks) * WEIGHT_T
            first_column = ((pid - student_programs) % weight_blocks) * WEIGHT_S
            dp = tl.zeros((WEIGHT_T, WEIGHT_S), tl.float32)
            for first in tl.range(0, group_last - group_first, WEIGHT_N, num_stages=STAGES):
                start = tl.full((), group_first + first, tl.int32)
                grad = load_tile(
                    gradient, start, first_row, stride_gradient, group_last, T, WEIGHT_N, WEIGHT_T, EVEN_T, False
                )
                x = load_tile(
                    student, start, first_column, stride_student, group_last, S, WEIGHT_N, WEIGHT_S, EVEN_S, False
                )
                if row_weight is not None:  # 0 * NaN is NaN: a row that is out must not be multiplied
                    offs_n = start + tl.arange(0, WEIGHT_N)
                    w = tl.load(row_weight + offs_n, mask=offs_n < group_last, other=0.0)
                    x = tl.where((w == 0)[:, None], 0.0, x)
                if row_unit is not None:
                    offs_n = start + tl.arange(0, WEIGHT_N)
                    unit = tl.load(row_unit + offs_n, mask=offs_n < group_last, other=1.0)
                    x = (x.to(tl.float32) / unit[:, None]).to(x.dtype)
                dp = dot(tl.trans(grad), x, dp, PRECISION)
            offs_t = first_row + tl.arange(0, WEIGHT_T)
            offs_s = first_column + tl.arange(0, WEIGHT_S)
            tl.store(
                grad_weight + (channel + offs_t)[:, None].to(tl.int64) * S + offs_s[None, :],
                (alpha_products * dp).to(grad_weight.dtype.element_ty),
                mask=(offs_t < T)[:, None] & (offs_s < S)[None, :],
            )
    # db = alpha Σ_n G_n
    else:
        if grad_bias is not None:
            offs_t = (pid - student_programs - weight_programs) * WEIGHT_T + tl.arange(0, WEIGHT_T)
            total = tl.zeros((WEIGHT_T,), tl.float32)
            sums = column_sums + g.to(tl.int64) * blocks_n * T + offs_t
            for _ in range(0, blocks_n):
                total += tl.load(sums, mask=offs_t < T, other=0.0)
                sums += T
            tl.store(grad_bias + channel + offs_t, alpha * total, mask=offs_t < T)


def _largest(group: list[int]) -> Any:
    """The largest number of rows, which may be a symbol of torch.compile."""
    largest: Any = group[0]
    for rows_of_loss in group[1:]:
        largest = torch.sym_max(largest, rows_of_loss)
    return largest


def _kept(
    *,
    student: torch.Tensor,
    normalization: str,
    mse: float,
    smooth_l1: float,
    cosine: float,
    beta: float,
    channel_scale: torch.Tensor | None,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
    **others: Any,
) -> list[str]:
    """Of the outputs of pooled_loss, what the backward pass needs."""
    names = []
    if need_student or need_weight:
        names.append("gradient")
    if need_bias:
        names.append("column_sums")
    if student.dtype == torch.float16 and (need_student or need_weight):
        terms = Terms.of(mse=mse, smooth_l1=smooth_l1, cosine=cosine, beta=beta)
        if terms.may_overflow_float16(normalization, channel_scale):
            names.append("gradient_scale")
        if terms.cosine:
            names.append("row_unit")
    return names


def _outputs(
    *, student: torch.Tensor, weight: torch.Tensor, group: list[int], **others: Any
) -> dict[str, torch.Tensor]:
    """The outputs of pooled_loss, to be written: the losses, and what the backward pass needs."""
    *entries, t, _ = weight.shape
    outputs = {"losses": student.new_empty(entries, dtype=torch.float32)}
    for name in _kept(student=student, **others):
        if name == "gradient":
            outputs[name] = empty_gradient(student, student.shape[0], t)
            continue
        blocks_n = blocks(_largest(group), tiles.tile("pooled", student.dtype).block_n)  # all entries have as many
        shapes = {"column_sums": (*entries, blocks_n, t), "gradient_scale": (), "row_unit": student.shape[:1]}
        outputs[name] = student.new_empty(shapes[name], dtype=torch.float32)
    return outputs


def _shapes(**inputs: Any) -> list[torch.Tensor]:
    return [*_outputs(**inputs).values()]


@library.operator(shapes=_shapes)
def pooled_loss(
    *,
    student: torch.Tensor,  # (N, S), the rows of all losses one after the other
    teacher: torch.Tensor,  # (N, T)
    weight: torch.Tensor,  # (T, S), or (G, T, S) for a group, as what follows
    bias: torch.Tensor | None,  # (T,)
    row_weight: torch.Tensor | None,  # (N,)
    channel_shift: torch.Tensor | None,  # (T,)
    channel_scale: torch.Tensor | None,  # (T,)
    denominator: torch.Tensor | None,  # ()
    factors: list[float],  # G
    group: list[int],  # rows of each loss
    normalization: str,
    eps: float,
    mse: float,
    smooth_l1: float,
    cosine: float,
    beta: float,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[torch.Tensor]:
    """[losses () or (G,), G (N, T), sums of G over blocks of rows, what G () and its rows (N,) are multiplied by]: of
    the last four those that the backward pass needs."""
    terms = Terms.of(mse=mse, smooth_l1=smooth_l1, cosine=cosine, beta=beta)
    outputs = _outputs(
        student=student,
        weight=weight,
        group=group,
        normalization=normalization,
        mse=mse,
        smooth_l1=smooth_l1,
        cosine=cosine,
        beta=beta,
        channel_scale=channel_scale,
        need_student=need_student,
        need_weight=need_weight,
        need_bias=need_bias,
    )
    if student.shape[0] == 0:
        return [output.zero_() for output in outputs.values()]
    with on(student.device):
        if "gradient_scale" in outputs:
            outputs["gradient_scale"] = rows.gradient_scale(teacher, row_weight)
        launches = LossTiles(
            tiles.tile("pooled", student.dtype),
            terms,
            student=student,
            teacher=teacher,
            weight=weight,
            bias=bias,
            row_weight=row_weight,
            channel_shift=channel_shift,
            channel_scale=channel_scale,
            group=group,
            normalization=normalization,
            eps=eps,
            denominator=denominator,
            factors=tuple(terms.unit * factor for factor in factors),
            losses=outputs["losses"],
            gradient=outputs.get("gradient"),
            gradient_scale=outputs.get("gradient_scale"),
            row_unit=outputs.get("row_unit"),
            column_sums=outputs.get("column_sums"),
        )
        launches.launch(0, max(group))
    return [*outputs.values()]


def _gradients(
    *,
    student: torch.Tensor,
    weight: torch.Tensor,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
    **others: Any,
) -> dict[str, torch.Tensor]:
    """The outputs of pooled_loss_backward, to be written."""
    gradients = {}
    if need_student:
        gradients["grad_student"] = torch.empty_like(student, memory_format=torch.contiguous_format)
    if need_weight:
        gradients["grad_weight"] = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if need_bias:
        gradients["grad_bias"] = student.new_empty(weight.shape[:-1], dtype=torch.float32)
    return gradients


def _backward_shapes(**inputs: Any) -> list[torch.Tensor]:
    return [*_gradients(**inputs).values()]


@functools.lru_cache(maxsize=1024)
def _gradient_launch(
    *,
    tile: tiles.GradientTiles,
    precision: str,
    s: int,
    t: int,
    stride_grad_output: int,
    stride_gradient: int,
    stride_student: int,
    stride_weight: int,
) -> Launch:
    """gradient_tiles with what is the same for every call, whatever its number of rows."""
    return prepared(
        gradient_tiles,
        S=s,
        T=t,
        stride_grad_output=stride_grad_output,
        stride_gradient=stride_gradient,
        stride_student=stride_student,
        stride_weight=stride_weight,
        STUDENT_N=tile.student[0],
        STUDENT_S=tile.student[1],
        STUDENT_T=tile.student[2],
        WEIGHT_T=tile.weight[0],
        WEIGHT_S=tile.weight[1],
        WEIGHT_N=tile.weight[2],
        STAGES=tile.stages,
        EVEN_S=s % max(tile.student[1], tile.weight[1]) == 0,
        EVEN_T=t % max(tile.student[2], tile.weight[0]) == 0,
        PRECISION=precision,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@library.operator(shapes=_backward_shapes)
def pooled_loss_backward(
    *,
    grad_output: torch.Tensor,  # () or (G,)
    student: torch.Tensor,  # (N, S)
    weight: torch.Tensor,  # (T, S) or (G, T, S)
    factors: list[float],  # G
    group: list[int],
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
    row_weight: torch.Tensor | None = None,  # (N,)
    denominator: torch.Tensor | None = None,  # () or (G,)
    gradient: torch.Tensor | None = None,  # (N, T), for student and weight
    gradient_scale: torch.Tensor | None = None,  # ()
    row_unit: torch.Tensor | None = None,  # (N,)
    column_sums: torch.Tensor | None = None,  # (blocks of rows, T) or (G, blocks of rows, T), for the bias
) -> list[torch.Tensor]:
    """Of [dX, dP, db] those that are needed; alpha is read on the device."""
    gradients = _gradients(
        student=student, weight=weight, need_student=need_student, need_weight=need_weight, need_bias=need_bias
    )
    n, s, t = max(group), student.shape[1], weight.shape[-2]
    if n == 0:
        return [grad.zero_() for grad in gradients.values()]
    tile = tiles.tile("gradients", student.dtype, tiles.chip(student.device))
    programs = 0
    if need_student:
        programs += blocks(n, tile.student[0]) * blocks(s, tile.student[1])
    if need_weight:
        programs += blocks(t, tile.weight[0]) * blocks(s, tile.weight[1])
    if need_bias:
        programs += blocks(t, tile.weight[0])
    launch = _gradient_launch(
        tile=tile,
        precision=precision(student.dtype, tiles.chip(student.device)),
        s=s,
        t=t,
        stride_grad_output=grad_output.stride(0) if grad_output.dim() else 0,
        stride_gradient=0 if gradient is None else gradient.stride(0),
        stride_student=student.stride(0),
        stride_weight=row_stride(weight),
    )
    with on(student.device):
        launch(
            (programs, len(group)),
            gradient=gradient,
            gradient_scale=gradient_scale,
            row_unit=row_unit,
            student=student,
            weight=weight,
            row_weight=row_weight,
            column_sums=column_sums,
            grad_output=grad_output,
            denominator=denominator,
            grad_student=gradients.get("grad_student"),
            grad_weight=gradients.get("grad_weight"),
            grad_bias=gradients.get("grad_bias"),
            group_rows=group_rows(group),
            factors=tuple(factors),
            N=n,
            blocks_n=0 if column_sums is None else column_sums.shape[-2],
        )
    return [*gradients.values()]


def _save(ctx: Any, inputs: dict[str, Any], outputs: list[torch.Tensor]) -> None:
    need = {"student": inputs["need_student"], "weight": inputs["need_weight"], "bias": inputs["need_bias"]}
    ctx.names = ["student", "weight", "row_weight", "denominator"]
    ctx.save_for_backward(*(inputs[name] for name in ctx.names), *outputs[1:])
    ctx.names += _kept(**inputs)
    unit = Terms.of(**{name: inputs[name] for name in TERMS}).unit
    ctx.factors, ctx.group, ctx.need = [unit * factor for factor in inputs["factors"]], inputs["group"], need


def _backward(ctx: Any, grad_output: torch.Tensor, *unused: Any) -> dict[str, torch.Tensor]:
    gradients = pooled_loss_backward(
        grad_output=grad_output,
        factors=ctx.factors,
        group=ctx.group,
        need_student=ctx.need["student"],
        need_weight=ctx.need["weight"],
        need_bias=ctx.need["bias"],
        **dict(zip(ctx.names, ctx.saved_tensors, strict=True)),
    )
    return dict(zip((name for name, need in ctx.need.items() if need), gradients, strict=True))


library.differentiable(pooled_loss, save=_save, backward=_backward)
library.refuses_gradients(pooled_loss_backward, NO_SECOND_ORDER)
