"""The fused loss as Triton kernels; launch.py launches them, tiles.py has their tiles, reference.py defines it.

Everywhere: student X (N, S), teacher Y (N, T), weight P (T, S), Z = X Pᵀ + b, D = Z - normalise(Y), row weights w (N,),

    loss = sum_n w_n sum_j rho(D_nj) / denominator        G_nj = w_n rho'(D_nj), unscaled, in the student's dtype
    dX = alpha G P      dP = alpha Gᵀ X      db = alpha sum_n G_n      alpha = grad_output * factor / denominator

Accumulation is in float32. Sums over programs go through buffers that one program reads in index order: the same
inputs give the same bits. A row of weight 0 contributes nothing, whatever it holds; any other NaN or Inf goes through.

Several losses of equal S and T, levels, run as one launch, a dimension of whose grid is the level. `levels` has each
one's number of rows. In the loss and its gradients their rows lie one after the other, and weights and channels' values
are (levels, T, ...); the statistics over rows take a tuple of tensors.
"""

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 operands of tl.dot as raw integers, so they are upcast there (and only there).
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, accumulator, PRECISION: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def _load_tile(
    source, first_row, first_column, stride, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """source[first_row : + ROWS, first_column : + COLUMNS], 0 outside (rows, columns); EVEN: no column is outside."""
    if DESCRIPTOR:
        return source.load([first_row, first_column])
    else:
        row = tl.arange(0, ROWS)
        column = first_column + tl.arange(0, COLUMNS)
        inside = (first_row + row < rows)[:, None]
        if not EVEN:
            inside = inside & (column < columns)[None, :]
        source += first_row.to(tl.int64) * stride  # one 64-bit offset; those within the tile fit in 32 bits
        return tl.load(source + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _grouped(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Program -> (row block, column block), GROUP row blocks at a time so that neighbours share operands in L2."""
    width = GROUP * column_blocks
    first = (program // width) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    return first + (program % width) % height, (program % width) // height


@triton.jit
def _over(factor, denominator, level=0):
    """factor / denominator (a missing one is 1), and 0 for 0: with every row masked, loss and gradients are 0."""
    if denominator is not None:
        value = tl.load(denominator + level).to(tl.float32)
        factor = tl.where(value == 0, 0.0, factor / value)
    return factor


@triton.jit
def _of(values, level):
    """values[level] of a tuple, for a level known when the kernel runs only."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(level == i, values[i], value)
    return value


@triton.jit
def _rows_of(levels, level):
    """(first row, one past the last) of a level. levels has 2 n + 1 for n rows: an argument that is 1 or a multiple of
    16 would be compiled for, and batches of images differ in their rows."""
    first = 0
    last = 0
    for i in tl.static_range(len(levels)):
        rows = levels[i] // 2
        first += tl.where(i < level, rows, 0)
        last += tl.where(i <= level, rows, 0)
    return first, last


@triton.jit(do_not_specialize=["N"])
def row_statistics(teacher, mean, rstd, counter, N, T, stride_y, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Y (N, T) -> mean (N,), rstd (N,) = 1 / sqrt(var + eps), biased variance. Also clears the counter of loss_tile."""
    program = tl.program_id(0)
    if counter is not None:
        if program == 0:
            tl.store(counter, 0)
    first_row = program.to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside_rows = first_row + row < N
    teacher += first_row * stride_y + row[:, None] * stride_y
    average = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)  # sum of squared deviations from the average so far
    count = 0.0
    for first in range(0, T, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = inside_rows[:, None] & (column < T)[None, :]
        y = tl.load(teacher + column[None, :], mask=inside, other=0.0).to(tl.float32)
        # Chan's merge of two blocks: sound when |mean| >> std, which a sum of squares is not.
        here = tl.minimum(T - first, COLUMNS).to(tl.float32)
        average_here = tl.sum(y, 1) / here
        deviation = tl.where(inside, y - average_here[:, None], 0.0)
        rounding = tl.sum(deviation, 1) / here  # what the sum of large values lost
        difference = average_here + rounding - average
        total = count + here
        average += difference * (here / total)
        square += tl.sum(deviation * deviation, 1) - here * rounding * rounding
        square += difference * difference * (count * here / total)
        count = total
    tl.store(mean + first_row + row, average, mask=inside_rows)
    tl.store(rstd + first_row + row, 1.0 / tl.sqrt(square / T + eps), mask=inside_rows)


@triton.jit(do_not_specialize=["N", "first_program", "total_programs"])
def loss_tile(
    student, weight, teacher, bias, row_weight, mean, rstd, channel_shift, channel_scale,
    gradient, column_sums, partial, counter, loss,
    denominator, levels, N, S, T, stride_x, stride_w, stride_y, stride_g,
    first_program, total_programs, beta, inverse_beta, factors,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr, EVEN_S: tl.constexpr,
    EVEN_T: tl.constexpr, DESCRIPTOR: tl.constexpr, SMOOTH_L1: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """One (ROWS, COLUMNS) tile of D: its G, column sums of G and share of the loss; the last program adds the shares.

    student, weight, teacher and gradient are pointers, or tensor descriptors with DESCRIPTOR. first_program: the
    number of programs in earlier launches (chunks) of the same loss; the counter runs on through all of them.
    With levels, N is the most rows of one: programs past a level's own rows have nothing inside and add zeros.
    """
    LEVELS: tl.constexpr = 1 if levels is None else len(levels)
    program = tl.program_id(0)
    row_blocks = tl.cdiv(N, ROWS)
    row_block, column_block = _grouped(program, row_blocks, tl.cdiv(T, COLUMNS), GROUP)
    first_row = row_block * ROWS
    first_column = column_block * COLUMNS
    last_row = N
    channel = 0  # of the level's first entry in bias, shift and scale, and in the rows of the weight
    steps = S
    if levels is not None:
        level = tl.program_id(1)
        before, last_row = _rows_of(levels, level)
        first_row += before
        channel = level * T
        program += level * tl.num_programs(0)
        row_block += level * row_blocks
        steps = tl.where(first_row < last_row, S, 0)

    # Z = X Pᵀ + b
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, steps, INNER, num_stages=STAGES):
        x = _load_tile(student, first_row, first, stride_x, last_row, S, ROWS, INNER, EVEN_S, DESCRIPTOR)
        p = _load_tile(
            weight, channel + first_column, first, stride_w, channel + T, S, COLUMNS, INNER, EVEN_S, DESCRIPTOR
        )
        z = _dot(x, tl.trans(p.to(x.dtype)), z, PRECISION)

    row = tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    long_row = first_row.to(tl.int64) + row
    inside_rows = long_row < last_row
    inside_columns = column < T
    inside = inside_rows[:, None] & inside_columns[None, :]
    if bias is not None:
        z += tl.load(bias + channel + column, mask=inside_columns, other=0.0)[None, :]

    # T = (Y - mean) * rstd per row, and / or (Y - shift) * scale per channel
    y = _load_tile(teacher, first_row, first_column, stride_y, last_row, T, ROWS, COLUMNS, EVEN_T, DESCRIPTOR).to(
        tl.float32
    )
    if mean is not None:
        row_mean = tl.load(mean + long_row, mask=inside_rows, other=0.0)
        row_rstd = tl.load(rstd + long_row, mask=inside_rows, other=0.0)
        y = (y - row_mean[:, None]) * row_rstd[:, None]
    if channel_shift is not None:
        y -= tl.load(channel_shift + channel + column, mask=inside_columns, other=0.0)[None, :]
    if channel_scale is not None:
        y *= tl.load(channel_scale + channel + column, mask=inside_columns, other=0.0)[None, :]
    d = tl.where(inside, z - y, 0.0)

    # smooth L1: g = clamp(d / beta, -1, 1), rho = g (d - beta g / 2): both branches in one. Squared error: g = d (its
    # factor 2 is in alpha), rho = d d. The clamp must let NaN through, or a gradient scaler misses an overflow.
    if SMOOTH_L1:
        g = tl.clamp(d * inverse_beta, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        rho = g * (d - 0.5 * beta * g)
    else:
        g = d
        rho = d * d
    if row_weight is not None:
        w = tl.load(row_weight + long_row, mask=inside_rows, other=0.0)[:, None]
        g = tl.where(w == 0, 0.0, w * g)
        rho = tl.where(w == 0, 0.0, w * rho)

    if column_sums is not None:
        tl.store(column_sums + row_block.to(tl.int64) * T + column, tl.sum(g, 0), mask=inside_columns)
    if gradient is not None:
        if DESCRIPTOR:
            gradient.store([first_row, first_column], g.to(gradient.dtype))
        else:
            gradient += first_row.to(tl.int64) * stride_g
            tl.store(gradient + row[:, None] * stride_g + column[None, :], g.to(gradient.dtype.element_ty), mask=inside)

    # loss = (sum of a level's partial losses) / denominator, by the program that arrives last
    tl.store(partial + first_program + program, tl.sum(rho))
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == total_programs - 1:
        programs = total_programs // LEVELS
        for i in tl.static_range(LEVELS):
            total = tl.zeros((SUM_BLOCK,), tl.float32)
            for first in range(0, programs, SUM_BLOCK):
                index = first + tl.arange(0, SUM_BLOCK)
                part = partial + i * programs + index
                total += tl.load(part, mask=index < programs, other=0.0, cache_modifier=".cg")
            tl.store(loss + i, tl.sum(total, 0) * _over(factors[i], denominator, i))


@triton.jit(do_not_specialize=["N", "row_blocks"])
def gradient_tiles(
    gradient, student, weight, row_weight, column_sums, grad_output, denominator,
    grad_student, grad_weight, grad_bias,
    levels, N, S, T, row_blocks, stride_grad_output, stride_g, stride_x, stride_w, factors,
    X_ROWS: tl.constexpr, X_COLUMNS: tl.constexpr, X_INNER: tl.constexpr,
    P_ROWS: tl.constexpr, P_COLUMNS: tl.constexpr, P_INNER: tl.constexpr,
    STAGES: tl.constexpr, EVEN_S: tl.constexpr, EVEN_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX = alpha G P (N, S), dP = alpha Gᵀ X (T, S) and db = alpha (sum of column sums) (T,), in one launch.

    The first programs each make an (X_ROWS, X_COLUMNS) tile of dX (the longer loop starts first), the next a
    (P_ROWS, P_COLUMNS) tile of dP, the last P_ROWS entries of db. An output that is None has no programs.
    With levels, N is the most rows of one, row_blocks the number of each one's blocks in column_sums.
    """
    program = tl.program_id(0)
    first_of_level = 0
    last_of_level = N
    channel = 0  # of the level's first row in P and dP, and entry in db
    if levels is None:
        alpha = tl.load(grad_output).to(tl.float32) * _over(factors[0], denominator)
    else:
        level = tl.program_id(1)
        first_of_level, last_of_level = _rows_of(levels, level)
        channel = level * T
        column_sums += level.to(tl.int64) * row_blocks * T
        alpha = tl.load(grad_output + level * stride_grad_output).to(tl.float32)
        alpha *= _over(_of(factors, level), denominator, level)
    x_columns = tl.cdiv(S, X_COLUMNS)
    p_columns = tl.cdiv(S, P_COLUMNS)
    x_programs = 0
    p_programs = 0
    if grad_student is not None:
        x_programs = tl.cdiv(N, X_ROWS) * x_columns
    if grad_weight is not None:
        p_programs = tl.cdiv(T, P_ROWS) * p_columns

    # dX = alpha G P
    if program < x_programs:
        if grad_student is not None:
            first_row = first_of_level + (program // x_columns) * X_ROWS
            first_column = (program % x_columns) * X_COLUMNS
            steps = T
            if levels is not None:
                steps = tl.where(first_row < last_of_level, T, 0)
            dx = tl.zeros((X_ROWS, X_COLUMNS), tl.float32)
            for first in tl.range(0, steps, X_INNER, num_stages=STAGES):
                g = _load_tile(gradient, first_row, first, stride_g, last_of_level, T, X_ROWS, X_INNER, EVEN_T, False)
                p_row = tl.full((), channel + first, tl.int32)
                p = _load_tile(weight, p_row, first_column, stride_w, channel + T, S, X_INNER, X_COLUMNS, EVEN_S, False)
                dx = _dot(g, p.to(g.dtype), dx, PRECISION)
            row = first_row.to(tl.int64) + tl.arange(0, X_ROWS)
            column = first_column + tl.arange(0, X_COLUMNS)
            tl.store(
                grad_student + row[:, None] * S + column[None, :],
                (alpha * dx).to(grad_student.dtype.element_ty),
                mask=(row < last_of_level)[:, None] & (column < S)[None, :],
            )
    # dP = alpha Gᵀ X
    elif program < x_programs + p_programs:
        if grad_weight is not None:
            first_row = ((program - x_programs) // p_columns) * P_ROWS
            first_column = ((program - x_programs) % p_columns) * P_COLUMNS
            dp = tl.zeros((P_ROWS, P_COLUMNS), tl.float32)
            for first in tl.range(0, last_of_level - first_of_level, P_INNER, num_stages=STAGES):
                start = tl.full((), first_of_level + first, tl.int32)
                g = _load_tile(gradient, start, first_row, stride_g, last_of_level, T, P_INNER, P_ROWS, EVEN_T, False)
                x = _load_tile(
                    student, start, first_column, stride_x, last_of_level, S, P_INNER, P_COLUMNS, EVEN_S, False
                )
                if row_weight is not None:  # 0 * NaN is NaN: a row that is out must not be multiplied
                    n = start + tl.arange(0, P_INNER)
                    w = tl.load(row_weight + n, mask=n < last_of_level, other=0.0)
                    x = tl.where((w == 0)[:, None], 0.0, x)
                dp = _dot(tl.trans(g), x, dp, PRECISION)
            row = first_row + tl.arange(0, P_ROWS)
            column = first_column + tl.arange(0, P_COLUMNS)
            tl.store(
                grad_weight + (channel + row)[:, None].to(tl.int64) * S + column[None, :],
                (alpha * dp).to(grad_weight.dtype.element_ty),
                mask=(row < T)[:, None] & (column < S)[None, :],
            )
    # db = alpha sum_n G_n
    else:
        if grad_bias is not None:
            column = (program - x_programs - p_programs) * P_ROWS + tl.arange(0, P_ROWS)
            total = tl.zeros((P_ROWS,), tl.float32)
            sums = column_sums + column
            for _ in range(0, row_blocks):
                total += tl.load(sums, mask=column < T, other=0.0)
                sums += T
            tl.store(grad_bias + channel + column, alpha * total, mask=column < T)


@triton.jit(do_not_specialize=["size"])
def scale(source, result, grad_output, denominator, size, factor, BLOCK: tl.constexpr):
    """result = alpha * source over `size` elements, in float32, into the result's dtype."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    alpha = tl.load(grad_output).to(tl.float32) * _over(factor, denominator)
    value = tl.load(source + index, mask=index < size, other=0.0).to(tl.float32)
    tl.store(result + index, (alpha * value).to(result.dtype.element_ty), mask=index < size)


@triton.jit(do_not_specialize=["N", "first_row_block"])
def orthonormal_mse_rows(
    student, teacher, weight, weight_sums, scale, row_weight,
    grad_student, scaled_student, mean_sums, partial, scale_partial,
    N, S, T, first_row_block, stride_x, stride_w, stride_y, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
    EVEN_S: tl.constexpr, EVEN_T: tl.constexpr, LAYER_NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w |c x Pᵀ - t|² = w (c x · (c x - 2 t P) + |t|²) for ROWS rows and BLOCKS * COLUMNS of the S columns, PᵀP = I.

    One read of the teacher: with mean m and r = 1 / sqrt(var + eps), t = r (y - m) and t P = r (y P - m (1ᵀP)).
    Also leaves dX / 2 = w c (c x - t P), the operand x' = w r x of dP = -c (Y - m)ᵀ X', and sums over the rows
    of m x' (S,) and of w x (c x - t P) for the scale c.
    """
    row_block = tl.program_id(0)
    column_block = tl.program_id(1)
    first_row = row_block * ROWS
    row = tl.arange(0, ROWS)
    long_row = first_row.to(tl.int64) + row
    inside_rows = long_row < N
    first_column = column_block * (BLOCKS * COLUMNS)

    # y P, and the row's moments about its first channel: sums of squares are sound about a value near the mean.
    products = ()
    for _ in tl.static_range(BLOCKS):
        products += (tl.zeros((ROWS, COLUMNS), tl.float32),)
    origin = tl.zeros((ROWS,), tl.float32)
    if LAYER_NORM:
        origin = tl.load(teacher + long_row * stride_y, mask=inside_rows, other=0.0).to(tl.float32)
    moment1 = tl.zeros((ROWS,), tl.float32)
    moment2 = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, T, INNER, num_stages=STAGES):
        start = tl.full((), first, tl.int32)
        y = _load_tile(teacher, first_row, start, stride_y, N, T, ROWS, INNER, EVEN_T, False)
        updated = ()
        for block in tl.static_range(BLOCKS):
            p = _load_tile(weight, start, first_column + block * COLUMNS, stride_w, T, S, INNER, COLUMNS, EVEN_S, False)
            updated += (_dot(y, p, products[block], PRECISION),)
        products = updated
        about = y.to(tl.float32) - origin[:, None]
        if LAYER_NORM and not EVEN_T:
            about = tl.where((start + tl.arange(0, INNER) < T)[None, :], about, 0.0)
        moment1 += tl.sum(about, 1)
        moment2 += tl.sum(about * about, 1)

    w = tl.full((ROWS,), 1.0, tl.float32)
    if row_weight is not None:
        w = tl.load(row_weight + long_row, mask=inside_rows, other=0.0)
    keep = inside_rows & (w != 0)  # NaN weights stay in
    mean = tl.zeros((ROWS,), tl.float32)
    rstd = tl.full((ROWS,), 1.0, tl.float32)
    square = moment2  # |t|²
    if LAYER_NORM:
        mean = origin + moment1 / T
        square = tl.maximum(moment2 - moment1 * (moment1 / T), 0.0, propagate_nan=tl.PropagateNan.ALL)
        rstd = 1.0 / tl.sqrt(square / T + eps)
        square *= rstd * rstd
    c = tl.load(scale).to(tl.float32)
    rho = tl.where(column_block == 0, square, 0.0)
    for_scale = tl.zeros((ROWS,), tl.float32)
    for block in tl.static_range(BLOCKS):
        first = first_column + block * COLUMNS
        column = first + tl.arange(0, COLUMNS)
        inside = keep[:, None] & (column < S)[None, :]
        x = tl.load(student + long_row[:, None] * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
        tp = products[block]
        if LAYER_NORM:
            tp -= mean[:, None] * tl.load(weight_sums + column, mask=column < S, other=0.0)[None, :]
            tp *= rstd[:, None]
        tp = tl.where(inside, tp, 0.0)
        cx = c * x
        rho += tl.sum(cx * (cx - 2.0 * tp), 1)
        for_scale += tl.sum(x * (cx - tp), 1)
        at = long_row[:, None] * S + column[None, :]
        written = inside_rows[:, None] & (column < S)[None, :]
        if grad_student is not None:
            dx = tl.where(inside, w[:, None] * (c * (cx - tp)), 0.0)
            tl.store(grad_student + at, dx.to(grad_student.dtype.element_ty), mask=written)
        if scaled_student is not None:
            operand = tl.where(inside, x * (w * rstd)[:, None], 0.0).to(scaled_student.dtype.element_ty)
            tl.store(scaled_student + at, operand, mask=written)
            if LAYER_NORM:  # of the rounded operand, so that the mean drops out of dP exactly
                sums = tl.sum(tl.where(inside, operand.to(tl.float32) * mean[:, None], 0.0), 0)
                tl.store(mean_sums + row_block.to(tl.int64) * S + column, sums, mask=column < S)
    program = (first_row_block + row_block) * tl.num_programs(1) + column_block
    # Sums of a column: Triton 3.6 can't reduce a vector that a tensor-core layout was reduced to, on sm_100.
    tl.store(partial + program, tl.sum(tl.where(keep, w * rho, 0.0)[:, None]))
    if scale_partial is not None:
        tl.store(scale_partial + program, tl.sum(tl.where(keep, w * for_scale, 0.0)[:, None]))


@triton.jit(do_not_specialize=["rows_per_program"])
def column_sums(
    xs, row_weights, means, partial, levels, strides, T, rows_per_program,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sum_n w_n x_n, or with means sum_n w_n (x_n - mean)², over rows_per_program rows of a level's X (N, T).

    xs, row_weights and strides are tuples with an entry for each level; partial is (levels, row blocks, T).
    """
    level = tl.program_id(2)
    x = _of(xs, level)
    stride = _of(strides, level)
    N = _of(levels, level) // 2
    row_block = tl.program_id(0)
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_columns = (column < T)[None, :]
    centre = tl.zeros((COLUMNS,), tl.float32)
    if means is not None:
        centre = tl.load(means + level * T + column, mask=column < T, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first_row = row_block.to(tl.int64) * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, N)
    for start in range(0, last_row - first_row, ROWS):
        long_row = first_row + start + row
        inside = (long_row < last_row)[:, None] & inside_columns
        value = tl.load(x + long_row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if means is not None:
            value = tl.where(inside, value - centre[None, :], 0.0)
            value *= value
        if row_weights is not None:
            w = tl.load(_of(row_weights, level) + long_row, mask=long_row < last_row, other=0.0)[:, None]
            value = tl.where(w == 0, 0.0, w * value)
        total += value
    part = level * tl.num_programs(0) + row_block
    tl.store(partial + part.to(tl.int64) * T + column, tl.sum(total, 0), mask=column < T)


@triton.jit
def _centred(
    x, stride, mean, row_weight, first_row, last_row, first_column, S,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x - mean (ROWS, COLUMNS) in float32; 0 outside and, with row weights, in rows of weight 0."""
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < last_row)[:, None] & (column < S)[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value -= tl.load(mean + column, mask=column < S, other=0.0)[None, :]
    if row_weight is not None:
        inside = inside & (tl.load(row_weight + row, mask=row < last_row, other=0.0) != 0)[:, None]
    return tl.where(inside, value, 0.0)


@triton.jit
def _weights(row_weight, first_row, last_row, ROWS: tl.constexpr):
    """w (ROWS, 1), 0 outside."""
    row = first_row + tl.arange(0, ROWS)
    return tl.load(row_weight + row, mask=row < last_row, other=0.0)[:, None]


@triton.jit(do_not_specialize=["rows_per_program"])
def scatter_tiles(
    xs, row_weights, means, partial, levels, strides, S, rows_per_program,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One (COLUMNS, COLUMNS) tile of sum_n w_n (x_n - mean)(x_n - mean)ᵀ over rows_per_program rows of a level's X.

    With HALVES, products are of 16 bits: √w (x - mean) = h + l, and C = hᵀ(h + 2 l), whose symmetric part is the sum
    but for lᵀl, which is as small as h + l's own rounding. partial is (levels, row blocks, S, S).
    """
    level = tl.program_id(2)
    x = _of(xs, level)
    stride = _of(strides, level)
    row_weight = None
    if row_weights is not None:
        row_weight = _of(row_weights, level)
    mean = means + level * S
    row_block = tl.program_id(1)
    column_blocks = tl.cdiv(S, COLUMNS)
    first_i = (tl.program_id(0) // column_blocks) * COLUMNS
    first_j = (tl.program_id(0) % column_blocks) * COLUMNS
    first_row = row_block.to(tl.int64) * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, _of(levels, level) // 2)
    # C_ij += (√w (x_i - m_i)) (√w (x_j - m_j))
    total = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    for start in tl.range(0, (last_row - first_row).to(tl.int32), ROWS, num_stages=STAGES):
        row = first_row + start
        a = _centred(x, stride, mean, row_weight, row, last_row, first_i, S, ROWS, COLUMNS)
        b = _centred(x, stride, mean, row_weight, row, last_row, first_j, S, ROWS, COLUMNS)
        if row_weight is not None:
            root = tl.sqrt(_weights(row_weight, row, last_row, ROWS))
            a *= root
            b *= root
        if HALVES:
            high = b.to(tl.bfloat16)
            low = (2.0 * (b - high.to(tl.float32))).to(tl.bfloat16)
            a = tl.trans(a.to(tl.bfloat16))
            total = _dot(a, low, _dot(a, high, total, "ieee"), "ieee")
        else:
            total = _dot(tl.trans(a), b, total, "ieee")
    i = (first_i + tl.arange(0, COLUMNS))[:, None]
    j = (first_j + tl.arange(0, COLUMNS))[None, :]
    part = (level * tl.num_programs(1) + row_block).to(tl.int64)
    tl.store(partial + (part * S + i) * S + j, total, mask=(i < S) & (j < S))


@triton.jit
def moment_gradients(
    xs, row_weights, means, grad_sums, grad_scatters, grad_xs, levels, strides, S,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (ROWS, COLUMNS) tile of a level's dX_n = w_n (C (x_n - mean) + s): s (levels, S), symmetric C (levels, S, S).

    The product is in C's dtype.
    """
    level = tl.program_id(1)
    x = _of(xs, level)
    stride = _of(strides, level)
    row_weight = None
    if row_weights is not None:
        row_weight = _of(row_weights, level)
    mean = means + level * S
    column_blocks = tl.cdiv(S, COLUMNS)
    first_row = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS
    first_column = (tl.program_id(0) % column_blocks) * COLUMNS
    last_row = _of(levels, level) // 2
    column = first_column + tl.arange(0, COLUMNS)
    dx = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, S, INNER, num_stages=STAGES):
        d = _centred(x, stride, mean, row_weight, first_row, last_row, first, S, ROWS, INNER)
        inner = first + tl.arange(0, INNER)
        inside = (inner < S)[:, None] & (column < S)[None, :]
        c = tl.load(grad_scatters + (level * S + inner[:, None]) * S + column[None, :], mask=inside, other=0.0)
        dx = _dot(d.to(c.dtype), c, dx, PRECISION)
    dx += tl.load(grad_sums + level * S + column, mask=column < S, other=0.0)[None, :]
    if row_weight is not None:
        w = _weights(row_weight, first_row, last_row, ROWS)
        dx = tl.where(w == 0, 0.0, w * dx)
    row = first_row + tl.arange(0, ROWS)
    grad_x = _of(grad_xs, level)
    tl.store(
        grad_x + row[:, None] * S + column[None, :],
        dx.to(grad_x.dtype.element_ty),
        mask=(row < last_row)[:, None] & (column < S)[None, :],
    )
