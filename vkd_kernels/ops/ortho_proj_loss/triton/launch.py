"""The fused loss for torch.library: operators, their shapes and autograd, and the launches of kernels.py.

tiles.py chooses between two forms of the same loss. Pooled (few rows): G is kept and one backward launch makes every
gradient. Chunked (many rows): the forward pass leaves the unscaled gradients, as operators.py says.
"""

import contextlib
import functools
from collections.abc import Sequence

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ...tf32 import tf32_allowed
from .. import chunks, operators
from . import kernels
from . import tiles as schedule

GROUP = 8  # row blocks that walk the columns together, so that the weight's tiles stay in L2
SUM_BLOCK = 4096
SCALE_BLOCK = 2048
# Triton 3.10 changes the default of fp_fusion; the accuracy that the tests hold is that of fused multiply-add.
OPTIONS = {"enable_fp_fusion": True}


def fused_loss(
    student: torch.Tensor,  # (N, S) float32, bfloat16 or float16, unit channel stride
    teacher: torch.Tensor,  # (N, T) likewise, of any of the dtypes; no gradient
    weight: torch.Tensor,  # (T, S), used in the student's dtype
    bias: torch.Tensor | None,  # (T,) float32
    row_weight: torch.Tensor | None,  # (N,) float32
    channel_shift: torch.Tensor | None,  # (T,) float32
    channel_scale: torch.Tensor | None,  # (T,) float32
    *,
    layer_norm: bool,
    eps: float,
    loss: str,
    beta: float,
    denominator: float | torch.Tensor,
    workspace_bytes: int = chunks.WORKSPACE_BYTES,
) -> torch.Tensor:  # () float32
    """What chunked.chunked_loss defines, by fused kernels: same arguments, same meaning.

    No temporary but G is N x T, and G only in the student's dtype and for as many rows as `workspace_bytes` allows.
    """
    row_weight, denominator, factor, needed = operators.operands(student, weight, bias, row_weight, denominator)
    student, teacher, weight = (unit_stride(x) for x in (student, teacher, weight))
    n, t = teacher.shape
    tensors = student, teacher, weight, bias, row_weight, channel_shift, channel_scale, denominator
    scalars = layer_norm, eps, loss == "smooth_l1", beta
    if schedule.choose(n, student.shape[1], t, student.dtype, workspace_bytes).pooled:
        return torch.ops.vkd_kernels.pooled_loss.default(*tensors, [factor], [n], *scalars, *needed)[0]
    return torch.ops.vkd_kernels.fused_loss.default(*tensors, factor, *scalars, workspace_bytes, *needed)[0]


def fused_losses(
    students: Sequence[torch.Tensor],  # G of (N, S), of one dtype
    teachers: Sequence[torch.Tensor],  # G of (N, T), of one dtype
    weight: torch.Tensor,  # (G, T, S), or (T, S) for one loss
    bias: torch.Tensor | None,  # (G, T) float32, as the other values of channels
    row_weights: Sequence[torch.Tensor | None],  # G of (N,) float32
    channel_shift: torch.Tensor | None,  # (G, T)
    channel_scale: torch.Tensor | None,  # (G, T)
    *,
    denominators: Sequence[float] | torch.Tensor,  # G
    workspace_bytes: int = chunks.WORKSPACE_BYTES,
    **options,
) -> torch.Tensor:  # (G,) float32, or ()
    """fused_loss of each of G losses; those of few rows in one launch for several, over their rows one after the other.

    A loss of many rows fills the GPU by itself: those go one by one.
    """
    one_by_one = functools.partial(_one_by_one, workspace_bytes=workspace_bytes, **options)
    if weight.dim() == 2:
        return one_by_one(students, teachers, weight, bias, row_weights, channel_shift, channel_scale,
                          denominators=denominators)  # fmt: skip
    rows, (_, t, s) = [x.shape[0] for x in students], weight.shape
    sizes = schedule.groups(rows, s, t, students[0].dtype, workspace_bytes)
    each = operators.parts((weight, bias, channel_shift, channel_scale), sizes)
    losses, first = [], 0
    for size, (p, b, shift, scale) in zip(sizes, each, strict=True):
        here = slice(first, first + size)
        first += size
        form = functools.partial(_pooled_losses, **options) if size > 1 else one_by_one
        losses.append(form(students[here], teachers[here], p, b, row_weights[here], shift, scale,
                           denominators=denominators[here]))  # fmt: skip
    return torch.cat(losses) if len(losses) > 1 else losses[0]


_one_by_one = operators.loss_by_loss(fused_loss)


def _pooled_losses(
    students, teachers, weight, bias, row_weights, channel_shift, channel_scale, *,
    denominators, layer_norm, eps, loss, beta,
):  # fmt: skip
    """fused_losses of the arguments, all of few rows, as one pooled_loss."""
    row_weights = _all_or_none(students, row_weights)
    balanced = [operators.balanced(*x) for x in zip(students, row_weights, denominators, strict=True)]
    row_weights, denominators = zip(*balanced, strict=True)
    factors, denominator = [1.0] * len(students), None
    if isinstance(denominators[0], torch.Tensor):
        denominator = torch.stack(denominators)
    else:
        factors = [operators.factor(d) for d in denominators]
    return torch.ops.vkd_kernels.pooled_loss.default(
        torch.cat(students), torch.cat(teachers), weight.contiguous(), bias,
        None if row_weights[0] is None else torch.cat(row_weights), channel_shift, channel_scale, denominator,
        factors, [x.shape[0] for x in students], layer_norm, eps, loss == "smooth_l1", beta,
        *operators.needed(students, weight, bias),
    )[0]  # fmt: skip


def _all_or_none(rows, row_weights) -> list[torch.Tensor | None]:
    """The rows' weights: of all, or of none."""
    if all(w is None for w in row_weights):
        return list(row_weights)
    return [x.new_ones(x.shape[0], dtype=torch.float32) if w is None else w
            for x, w in zip(rows, row_weights, strict=True)]  # fmt: skip


def unit_stride(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(-1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


# ------------------------------------------------------------------------------------------------------------ launches


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _on(device: torch.device):
    """Triton launches on the current device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _capability(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _precision(dtype: torch.dtype) -> str:
    """float32 products are IEEE unless PyTorch's setting allows TF32."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def _aligned(*matrices: torch.Tensor) -> bool:
    """Every row starts on a 16-byte boundary."""
    return all(m.data_ptr() % 16 == 0 and m.stride(0) * m.element_size() % 16 == 0 for m in matrices)


def _statistics(teacher, mean, rstd, counter, eps):
    n, t = teacher.shape
    columns = min(1 << (t - 1).bit_length(), schedule.STATISTICS_ELEMENTS)
    rows = schedule.STATISTICS_ELEMENTS // columns
    kernels.row_statistics[(_blocks(n, rows),)](
        teacher, mean, rstd, counter, n, t, teacher.stride(0), eps, ROWS=rows, COLUMNS=columns, num_warps=4, **OPTIONS
    )


class _Loss:
    """What the launches of one loss, or of the losses of several levels, share: tile, partial sums, counter, constants.

    rows: of each level, whose losses one launch makes; without, launches are of chunks of one loss.
    """

    def __init__(self, tile, student, teacher, weight, bias, channels, denominator, factors, scalars, rows=None):
        n, t = teacher.shape
        self.layer_norm, self.eps, self.smooth_l1, self.beta = scalars
        self.tile, self.weight, self.bias, self.channels = tile, weight, bias, channels
        self.denominator, self.factors = denominator, tuple(factors)
        self.levels, self.grid, self.most = _levels(rows)
        self.column_blocks = _blocks(t, tile.columns)
        self.programs = _blocks(self.most or n, tile.rows) * self.column_blocks * len(self.factors)
        self.partial = student.new_empty(self.programs, dtype=torch.float32)
        # The last program to arrive adds the partial sums; row_statistics clears the counter where it runs.
        counter = student.new_empty if self.layer_norm else student.new_zeros
        self.counter = counter(1, dtype=torch.int32)
        self.loss = student.new_empty(weight.shape[:-2], dtype=torch.float32)

    def launch(self, first_program, student, teacher, row_weight, gradient, column_sums):
        """The rows of one chunk, or of all levels: their partial sums, G into `gradient`, its sums over row blocks."""
        n, s = student.shape
        t = teacher.shape[1]
        mean = rstd = None
        if self.layer_norm:
            mean, rstd = student.new_empty((2, n), dtype=torch.float32)
            _statistics(teacher, mean, rstd, None if first_program else self.counter, self.eps)
        tile = self.tile
        matrices = [student, self.weight, teacher, gradient]
        if tile.descriptors:
            blocks = [(tile.rows, tile.inner), (tile.columns, tile.inner)] + [(tile.rows, tile.columns)] * 2
            matrices = [
                m if m is None else TensorDescriptor(m, m.shape, m.stride(), list(block))
                for m, block in zip(matrices, blocks, strict=True)
            ]
        n = self.most or n
        kernels.loss_tile[(_blocks(n, tile.rows) * self.column_blocks, *self.grid)](
            *matrices[:3], self.bias, row_weight, mean, rstd, *self.channels,
            matrices[3], column_sums, self.partial, self.counter, self.loss, self.denominator, self.levels,
            n, s, t, student.stride(0), self.weight.stride(-2), teacher.stride(0),
            0 if gradient is None else gradient.stride(0), first_program, self.programs,
            self.beta, 1.0 / self.beta, self.factors,
            ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner, STAGES=tile.stages,
            EVEN_S=s % tile.inner == 0, EVEN_T=t % tile.columns == 0, DESCRIPTOR=tile.descriptors,
            SMOOTH_L1=self.smooth_l1, PRECISION=_precision(student.dtype), GROUP=GROUP, SUM_BLOCK=SUM_BLOCK,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip


def _levels(rows):
    """The kernels' argument `levels`, the second dimension of their grid and the most rows, for each level's rows."""
    if rows is None or len(rows) == 1:
        return None, (), None
    return _levels_table(rows), (len(rows),), max(rows)


def _levels_table(rows):
    return tuple(2 * n + 1 for n in rows)  # odd: see _rows_of in kernels.py


def _empty_gradient(student, n, t):
    """G (n, T) in the student's dtype, its rows a multiple of 16 bytes apart whatever T is."""
    return student.new_empty((n, -(-t // 8) * 8))[:, :t]


# ---------------------------------------------------------------------------------------- many rows: fused_loss, chunks


def _fused_forward(
    student, teacher, weight, bias, row_weight, channel_shift, channel_scale, denominator, factor,
    layer_norm, eps, smooth_l1, beta, workspace_bytes, need_student, need_weight, need_bias,
):  # fmt: skip
    """loss, unscaled dX, dP, db: per chunk of rows, statistics, loss and G, then two library products."""
    (n, s), t = student.shape, teacher.shape[1]
    weight = unit_stride(weight.to(student.dtype))
    dx = student.new_empty((n, s) if need_student else 0, dtype=operators.saved_dtype(student.dtype))
    dp = weight.new_zeros((t, s) if need_weight else 0, dtype=torch.float32)
    db = weight.new_zeros(t if need_bias else 0, dtype=torch.float32)
    if n == 0:
        return student.new_zeros((), dtype=torch.float32), dx, dp, db

    with _on(student.device):
        tile = schedule.loss_tile(student.dtype, _capability(student.device), _aligned(student, teacher, weight))
        loss = _Loss(
            tile, student, teacher, weight, bias, (channel_shift, channel_scale), denominator, [factor],
            (layer_norm, eps, smooth_l1, beta),
        )  # fmt: skip
        step = schedule.choose(n, s, t, student.dtype, workspace_bytes, tile.rows).chunk
        g = column_sums = None
        if need_student or need_weight:
            g = _empty_gradient(student, min(step, n), t)
        if need_bias:
            column_sums = student.new_empty((_blocks(min(step, n), tile.rows), t), dtype=torch.float32)
        first_program = 0
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            x, w = student[rows], None if row_weight is None else row_weight[rows]
            here = x.shape[0]
            g_here = None if g is None else g[:here]
            blocks = _blocks(here, tile.rows)
            loss.launch(first_program, x, teacher[rows], w, g_here, column_sums)
            first_program += blocks * loss.column_blocks
            if need_student:
                chunks.product(g_here, weight, out=dx[rows])
            if need_weight:
                chunks.add_product(dp, g_here.T, chunks.without_masked_rows(x, w))
            if need_bias:
                db += column_sums[:blocks].sum(0)
    return loss.loss, dx, dp, db


def _scale(grad_output, student, weight, third, denominator, factor, student_dtype, weight_dtype):
    """alpha times each unscaled gradient, one launch each, into new tensors."""
    results = []
    for source, dtype in ((student, student_dtype), (weight, weight_dtype), (third, third.dtype)):
        result = torch.empty_like(source, dtype=dtype)
        if source.numel():
            with _on(source.device):
                kernels.scale[(_blocks(source.numel(), SCALE_BLOCK),)](
                    source, result, grad_output, denominator, source.numel(), factor,
                    BLOCK=SCALE_BLOCK, num_warps=4, **OPTIONS,
                )  # fmt: skip
        results.append(result)
    return tuple(results)


operators.register_backward("fused_backward", _scale)
operators.register_loss("fused_loss", operators.LOSS_ARGUMENTS, _fused_forward, "fused_backward")


# ---------------------------------------------------------------------- few rows: pooled_loss, one launch for backward


def _pooled_forward(
    student, teacher, weight, bias, row_weight, channel_shift, channel_scale, denominator, factors, rows,
    layer_norm, eps, smooth_l1, beta, need_student, need_weight, need_bias,
):  # fmt: skip
    """loss, G (N, T), the sums of G over blocks of rows."""
    g, column_sums = _pooled_saved(student, weight, rows, need_student or need_weight, need_bias)
    if student.shape[0] == 0:
        return student.new_zeros(weight.shape[:-2], dtype=torch.float32), g, column_sums
    with _on(student.device):
        launches = _Loss(
            schedule.tile("pooled", student.dtype), student, teacher, weight, bias, (channel_shift, channel_scale),
            denominator, factors, (layer_norm, eps, smooth_l1, beta), rows,
        )  # fmt: skip
        launches.launch(
            0, student, teacher, row_weight, g if need_student or need_weight else None,
            column_sums if need_bias else None,
        )  # fmt: skip
    return launches.loss, g, column_sums


def _pooled_saved(student, weight, rows, need_gradient, need_bias):
    """Room for G and for its sums over each level's blocks of rows, of which all have as many as the largest."""
    t = weight.shape[-2]
    blocks = _blocks(functools.reduce(torch.sym_max, rows), schedule.tile("pooled", student.dtype).rows)
    return (
        _empty_gradient(student, student.shape[0], t) if need_gradient else student.new_empty((0, 0)),
        student.new_empty((*weight.shape[:-2], blocks, t) if need_bias else (0, 0), dtype=torch.float32),
    )


def _pooled_fake(student, teacher, weight, *rest):
    need_student, need_weight, need_bias = rest[-3:]
    return (
        student.new_empty(weight.shape[:-2], dtype=torch.float32),
        *_pooled_saved(student, weight, rest[6], need_student or need_weight, need_bias),
    )


def _pooled_backward(
    grad_output, gradient, column_sums, student, weight, row_weight, denominator, factors, rows,
    need_student, need_weight, need_bias,
):  # fmt: skip
    """dX, dP and db in one launch, alpha read on the device."""
    needed = need_student, need_weight, need_bias
    dx, dp, db = _pooled_backward_fake(grad_output, gradient, column_sums, student, weight, *needed)
    (n, s), t = student.shape, weight.shape[-2]
    if n == 0:
        return dx, dp.zero_(), db.zero_()
    tile = schedule.tile("gradients", student.dtype)
    levels, grid, most = _levels(rows)
    n = most or n
    programs = 0
    if need_student:
        programs += _blocks(n, tile.x_rows) * _blocks(s, tile.x_columns)
    if need_weight:
        programs += _blocks(t, tile.p_rows) * _blocks(s, tile.p_columns)
    if need_bias:
        programs += _blocks(t, tile.p_rows)
    with _on(student.device):
        kernels.gradient_tiles[(programs, *grid)](
            gradient, student, weight, row_weight, column_sums, grad_output, denominator,
            dx if need_student else None, dp if need_weight else None, db if need_bias else None, levels,
            n, s, t, column_sums.shape[-2], grad_output.stride(0) if grid else 0,
            gradient.stride(0), student.stride(0), weight.stride(-2), tuple(factors),
            X_ROWS=tile.x_rows, X_COLUMNS=tile.x_columns, X_INNER=tile.x_inner,
            P_ROWS=tile.p_rows, P_COLUMNS=tile.p_columns, P_INNER=tile.p_inner, STAGES=tile.stages,
            EVEN_S=s % max(tile.x_columns, tile.p_columns) == 0, EVEN_T=t % max(tile.x_inner, tile.p_rows) == 0,
            PRECISION=_precision(student.dtype), num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return dx, dp, db


def _pooled_backward_fake(grad_output, gradient, column_sums, student, weight, *rest):
    need_student, need_weight, need_bias = rest[-3:]
    return (
        student.new_empty(student.shape if need_student else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        student.new_empty(weight.shape[:-1] if need_bias else (0,), dtype=torch.float32),
    )


def _save_pooled(ctx, inputs, output):
    student, _, weight, _, row_weight, _, _, denominator, factors, rows, _, _, smooth_l1 = inputs[:13]
    _, gradient, column_sums = output
    ctx.save_for_backward(gradient, column_sums, student, weight, row_weight, denominator)
    ctx.scalars = (factors if smooth_l1 else [2 * f for f in factors], rows, *inputs[-3:])


def _differentiate_pooled(ctx, grad_output, *_):
    grads = torch.ops.vkd_kernels.pooled_loss_backward.default(grad_output, *ctx.saved_tensors, *ctx.scalars)
    dx, dp, db = (grad if needed else None for grad, needed in zip(grads, ctx.scalars[2:], strict=True))
    return dx, None, dp, db, *[None] * 13


operators.define(
    "pooled_loss",
    "(Tensor student, Tensor teacher, Tensor weight, Tensor? bias, Tensor? row_weight, Tensor? channel_shift, "
    "Tensor? channel_scale, Tensor? denominator, float[] factors, SymInt[] rows, bool layer_norm, float eps, "
    "bool smooth_l1, float beta, bool need_student, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _pooled_forward,
    _pooled_fake,
)
operators.define(
    "pooled_loss_backward",
    "(Tensor grad_output, Tensor gradient, Tensor column_sums, Tensor student, Tensor weight, Tensor? row_weight, "
    "Tensor? denominator, float[] factors, SymInt[] rows, bool need_student, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _pooled_backward,
    _pooled_backward_fake,
)
operators.differentiate("pooled_loss", _save_pooled, _differentiate_pooled)
operators.refuse_second_order("pooled_loss_backward")


# ---------------------------------------------- squared error with an orthonormal weight, S <= T: fused_orthonormal_mse


def fused_orthonormal_mse(
    student: torch.Tensor,  # (N, S)
    teacher: torch.Tensor,  # (N, T), no gradient
    weight: torch.Tensor,  # (T, S) with orthonormal columns
    row_weight: torch.Tensor | None,  # (N,) float32
    *,
    scale: float | torch.Tensor = 1.0,  # number or 0-d float32 tensor
    layer_norm: bool,
    eps: float,
    denominator: float | torch.Tensor,
    workspace_bytes: int = chunks.WORKSPACE_BYTES,
) -> torch.Tensor:  # () float32
    """What chunked.orthonormal_mse defines, in two reads of the teacher and without a tensor of N x T.

    The gradient of the weight leaves out its part normal to PᵀP = I; see there. Few rows, which the launches bound,
    and mixed dtypes, for which the teacher would have to be rounded first, take fused_loss, whose gradient is whole.
    """
    (n, s), t = student.shape, teacher.shape[1]
    if teacher.dtype != student.dtype or schedule.choose(n, s, t, student.dtype, workspace_bytes).pooled:
        return fused_loss(
            student, teacher, weight * scale, None, row_weight, None, None, layer_norm=layer_norm, eps=eps, loss="mse",
            beta=1.0, denominator=denominator, workspace_bytes=workspace_bytes,
        )  # fmt: skip
    return operators.call_orthonormal_mse(
        torch.ops.vkd_kernels.fused_orthonormal_mse.default, unit_stride(student), unit_stride(teacher), weight,
        row_weight, scale, layer_norm, eps, denominator, workspace_bytes,
    )  # fmt: skip


_mse_by_mse = operators.mse_by_mse(fused_orthonormal_mse)


def fused_orthonormal_mses(students, teachers, weight, row_weights, *, scale, layer_norm, eps, denominators):
    """fused_orthonormal_mse of each of G losses (G,), or of one (); where all are of few rows, as fused_losses."""
    s, t = weight.shape[-1], weight.shape[-2]
    few = [schedule.choose(x.shape[0], s, t, x.dtype, chunks.WORKSPACE_BYTES).pooled for x in students]
    if weight.dim() == 2 or not all(few):
        return _mse_by_mse(
            students, teachers, weight, row_weights, scale=scale, layer_norm=layer_norm, eps=eps,
            denominators=denominators,
        )  # fmt: skip
    if isinstance(scale, torch.Tensor):
        scale = scale.view(-1, 1, 1)
    return fused_losses(
        students, teachers, weight * scale, None, row_weights, None, None, layer_norm=layer_norm, eps=eps, loss="mse",
        beta=1.0, denominators=denominators,
    )  # fmt: skip


def _orthonormal_mse(
    student, teacher, weight, scale, row_weight, denominator, factor, layer_norm, eps, workspace_bytes,
    need_student, need_weight, need_scale,
):  # fmt: skip
    """loss, dX, dP, dc without their factors 2: per chunk of rows one launch, then dP's library product."""
    (n, s), t = student.shape, teacher.shape[1]
    weight = unit_stride(weight.to(student.dtype))
    weight_sums = weight.sum(0, dtype=torch.float32) if layer_norm else None
    tile = schedule.rows_tile(student.dtype, _capability(student.device), _aligned(teacher, weight))
    blocks = min(tile.blocks, _blocks(s, tile.columns))
    column_blocks = _blocks(s, blocks * tile.columns)
    bytes_per_row = student.element_size() * (s + (0 if row_weight is None else t))  # X', and Y without masked rows
    step = chunks.even_chunk(n, workspace_bytes // bytes_per_row, tile.rows)
    row_blocks = _blocks(step, tile.rows)

    dx = student.new_empty((n, s) if need_student else 0, dtype=operators.saved_dtype(student.dtype))
    dp = weight.new_zeros((t, s) if need_weight else 0, dtype=torch.float32)
    operand = student.new_empty((step, s)) if need_weight else None
    mean_sums = student.new_empty((row_blocks, s), dtype=torch.float32) if need_weight and layer_norm else None
    partial = student.new_empty(_blocks(n, tile.rows) * column_blocks, dtype=torch.float32)
    scale_partial = torch.empty_like(partial) if need_scale else None
    mean_total = student.new_zeros(s, dtype=torch.float32) if mean_sums is not None else None

    with _on(student.device):
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            x, y, w = student[rows], teacher[rows], None if row_weight is None else row_weight[rows]
            here = x.shape[0]
            kernels.orthonormal_mse_rows[(_blocks(here, tile.rows), column_blocks)](
                x, y, weight, weight_sums, scale, w,
                dx[rows] if need_student else None, operand, mean_sums, partial, scale_partial,
                here, s, t, start // tile.rows, x.stride(0), weight.stride(0), y.stride(0), eps,
                ROWS=tile.rows, COLUMNS=tile.columns, BLOCKS=blocks, INNER=tile.inner, STAGES=tile.stages,
                EVEN_S=s % (blocks * tile.columns) == 0, EVEN_T=t % tile.inner == 0, LAYER_NORM=layer_norm,
                PRECISION=_precision(student.dtype), num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
            )  # fmt: skip
            if need_weight:
                chunks.add_product(dp, chunks.without_masked_rows(y, w).T, operand[:here])
                if layer_norm:
                    mean_total += mean_sums[: _blocks(here, tile.rows)].sum(0)
    if need_weight:
        dp = (dp - mean_total if layer_norm else dp).mul_(-scale)
    dc = scale_partial.sum() if need_scale else student.new_empty(0, dtype=torch.float32)
    return operators.over(partial.sum(), factor, denominator), dx, dp, dc


operators.register_loss("fused_orthonormal_mse", operators.MSE_ARGUMENTS, _orthonormal_mse, "fused_backward")


# ---------------------------------------------------------------- statistics over the rows: the names of statistics.py


def column_sums(xs, row_weights) -> torch.Tensor:
    """statistics.column_sums, all in one read and one launch."""
    rows = [unit_stride(x.detach()) for x in xs]
    return torch.ops.vkd_kernels.fused_column_sums.default(rows, _weights(xs, row_weights), None)


def column_centred_square_sums(xs, row_weights, means: torch.Tensor) -> torch.Tensor:
    """statistics.column_centred_square_sums, all in one read and one launch."""
    rows = [unit_stride(x.detach()) for x in xs]
    return torch.ops.vkd_kernels.fused_column_sums.default(rows, _weights(xs, row_weights), means.detach())


def student_moments(students, row_weights, sums: torch.Tensor, means: torch.Tensor):
    """statistics.student_moments, all in one launch."""
    rows = [unit_stride(x) for x in students]
    op = torch.ops.vkd_kernels.fused_moments.default
    return op(rows, _weights(students, row_weights), sums.detach(), means.detach())


def _weights(rows, row_weights):
    """As an operator takes them: of every set of rows, or an empty list."""
    return [w for w in _all_or_none(rows, row_weights) if w is not None]


def _by_launch(xs, row_weights, *others):
    """What each launch over rows of xs takes: at most LEVELS of them, (xs, row_weights or None, levels, strides) as the
    kernels take them, their most rows, and as many entries of others."""
    for first in range(0, len(xs), schedule.LEVELS):
        here = slice(first, first + schedule.LEVELS)
        rows, strides = zip(*((x.shape[0], x.stride(0)) for x in xs[here]), strict=True)
        tables = tuple(xs[here]), tuple(row_weights[here]) or None, _levels_table(rows), strides
        yield *tables, max(rows), *(None if x is None else x[here] for x in others)


def _column_sums(xs, row_weights, means):
    sums, t = [], xs[0].shape[1]
    tile = schedule.tile("columns", xs[0].dtype)
    for x, weights, levels, strides, most, centres in _by_launch(xs, row_weights, means):
        rows_per_program = max(_blocks(_blocks(most, schedule.COLUMN_PARTIALS), tile.rows), 1) * tile.rows
        partial = x[0].new_empty((len(x), max(_blocks(most, rows_per_program), 1), t), dtype=torch.float32)
        with _on(x[0].device):
            kernels.column_sums[(partial.shape[1], _blocks(t, tile.columns), len(x))](
                x, weights, centres, partial, levels, strides, t, rows_per_program,
                ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, **OPTIONS,
            )  # fmt: skip
        sums.append(partial.sum(1))
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _moments(xs, row_weights, sums, means):
    scatters, s = [], xs[0].shape[1]
    tile = schedule.tile("scatter", xs[0].dtype)
    tiles = _blocks(s, tile.columns) ** 2
    for x, weights, levels, strides, most, centres in _by_launch(xs, row_weights, means):
        row_blocks = max(schedule.SCATTER_PROGRAMS // (tiles * len(x)), 1)
        rows_per_program = max(_blocks(_blocks(most, row_blocks), tile.rows), 1) * tile.rows
        partial = x[0].new_empty((len(x), max(_blocks(most, rows_per_program), 1), s, s), dtype=torch.float32)
        with _on(x[0].device):
            kernels.scatter_tiles[(tiles, partial.shape[1], len(x))](
                x, weights, centres, partial, levels, strides, s, rows_per_program,
                ROWS=tile.rows, COLUMNS=tile.columns, STAGES=tile.stages, HALVES=x[0].dtype != torch.float32,
                num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
            )  # fmt: skip
        scatter = partial.sum(1)
        scatters.append((scatter + scatter.mT).mul_(0.5))
    return sums.clone(), scatters[0] if len(scatters) == 1 else torch.cat(scatters)


def _moments_backward(grad_sums, grad_scatters, xs, row_weights, means):
    """dX_n = w_n ((C + Cᵀ)(x_n - m) + s) for the incoming s and C of each level."""
    dtype, s = xs[0].dtype, xs[0].shape[1]
    # float16 would underflow: incoming gradients carry 1 / (N T). TF32 has as many bits.
    symmetric = (grad_scatters + grad_scatters.mT).to(dtype if dtype == torch.bfloat16 else torch.float32)
    precision = "tf32" if dtype == torch.float16 else "ieee"
    tile = schedule.tile("moment gradients", symmetric.dtype)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    launches = _by_launch(xs, row_weights, means, grad_sums.contiguous(), symmetric, grads)
    for x, weights, levels, strides, most, *tensors, grad_xs in launches:
        if most == 0:
            continue
        with _on(x[0].device):
            kernels.moment_gradients[(_blocks(most, tile.rows) * _blocks(s, tile.columns), len(x))](
                x, weights, *tensors, tuple(grad_xs), levels, strides, s,
                ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner, STAGES=tile.stages, PRECISION=precision,
                num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
            )  # fmt: skip
    return grads


def _save_moments(ctx, inputs, output):
    rows, row_weights, _, means = inputs
    ctx.save_for_backward(*rows, *row_weights, means)


def _differentiate_moments(ctx, *grads):
    *saved, means = ctx.saved_tensors
    backward = torch.ops.vkd_kernels.fused_moments_backward.default
    grads = operators.moment_gradients(grads, means)
    return backward(*grads, saved[: ctx.count], saved[ctx.count :], means), None, None, None


operators.define(
    "fused_column_sums", "(Tensor[] rows, Tensor[] row_weights, Tensor? means) -> Tensor", _column_sums,
    lambda xs, ws, means: xs[0].new_empty((len(xs), xs[0].shape[1]), dtype=torch.float32),
)  # fmt: skip
operators.define(
    "fused_moments", "(Tensor[] rows, Tensor[] row_weights, Tensor sums, Tensor means) -> (Tensor, Tensor)", _moments,
    lambda xs, ws, sums, means: (torch.empty_like(sums), sums.new_empty((*sums.shape, sums.shape[1]))),
)  # fmt: skip
operators.define(
    "fused_moments_backward",
    "(Tensor grad_sums, Tensor grad_scatters, Tensor[] rows, Tensor[] row_weights, Tensor means) -> Tensor[]",
    _moments_backward,
    lambda s, c, xs, ws, means: [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs],
)  # fmt: skip
operators.differentiate("fused_moments", _save_moments, _differentiate_moments)
operators.refuse_second_order("fused_moments_backward")
