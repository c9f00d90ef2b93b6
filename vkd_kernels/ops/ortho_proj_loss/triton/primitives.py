"""What the kernels of the loss share: products, tiles in memory, the rows of a group.

Everywhere: student X (N, S), teacher Y (N, T), weight P (T, S), row weights w (N,). Tiles are BLOCK_N rows by BLOCK_T
teacher channels or BLOCK_S student channels. Accumulation is in float32, offsets of rows are 64-bit, and sums over
programs go through buffers that are read in the order of their index: the same inputs give the same bits.

Several losses of equal S and T, a group, can share a launch, a dimension of whose grid is the index g. Their rows lie
one after the other, and weights and channels' values are (G, T, ...).
"""

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 operands of tl.dot as raw integers, so they are upcast there (and only there).
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """a b + accumulator."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def load_tile(
    matrix,
    first_row,
    first_column,
    stride,
    last_row,
    last_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """matrix[first_row : + BLOCK_ROWS, first_column : + BLOCK_COLUMNS], 0 from last_row and last_column on.

    EVEN: the columns are a multiple of the block. DESCRIPTOR: matrix is a tensor descriptor, not a pointer.
    """
    if DESCRIPTOR:
        return matrix.load([first_row, first_column])
    else:
        row = tl.arange(0, BLOCK_ROWS)
        offs_column = first_column + tl.arange(0, BLOCK_COLUMNS)
        mask = (first_row + row < last_row)[:, None]
        if not EVEN:
            mask = mask & (offs_column < last_column)[None, :]
        # One 64-bit offset: those within a tile fit 32 bits (launch.unit_stride sees to it), which saves registers.
        matrix += first_row.to(tl.int64) * stride
        return tl.load(matrix + row[:, None] * stride + offs_column[None, :], mask=mask, other=0.0)


@triton.jit
def swizzle(pid, blocks_n, blocks_t, GROUP_N: tl.constexpr):
    """Program -> (block of rows, block of columns), GROUP_N blocks of rows at a time, which share operands in L2."""
    width = GROUP_N * blocks_t
    first_n = (pid // width) * GROUP_N
    height = tl.minimum(blocks_n - first_n, GROUP_N)
    return first_n + (pid % width) % height, (pid % width) // height


@triton.jit
def entry(values, g):
    """values[g] of a tuple, for a g known when the kernel runs only."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(g == i, values[i], value)
    return value


@triton.jit
def rows_of(group_rows, g):
    """(first row, one past the last) of entry g of a group; group_rows is what launch.group_rows made."""
    first_row = 0
    last_row = 0
    for i in tl.static_range(len(group_rows)):
        rows = group_rows[i] // 2
        first_row += tl.where(i < g, rows, 0)
        last_row += tl.where(i <= g, rows, 0)
    return first_row, last_row


@triton.jit
def over(factor, denominator, g):
    """factor / denominator[g]; a missing denominator is 1."""
    if denominator is not None:
        factor = factor / tl.load(denominator + g).to(tl.float32)
    return factor


@triton.jit
def projected_tile(
    student,
    weight,
    bias,
    first_row,
    first_column,
    stride_student,
    stride_weight,
    last_row,
    channel,
    S,
    T,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_S: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A (BLOCK_N, BLOCK_T) tile of Z = X Pᵀ + b in float32. channel: the group's first in weight and bias."""
    tl.assume(S > 0)  # a path on which the loop never runs would make ptxas serialize its tensor-core instructions
    z = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for first in tl.range(0, S, BLOCK_S, num_stages=STAGES):
        x = load_tile(student, first_row, first, stride_student, last_row, S, BLOCK_N, BLOCK_S, EVEN_S, DESCRIPTOR)
        p = load_tile(
            weight, channel + first_column, first, stride_weight, channel + T, S, BLOCK_T, BLOCK_S, EVEN_S, DESCRIPTOR
        )
        z = dot(x, tl.trans(p.to(x.dtype)), z, PRECISION)
    if bias is not None:
        offs_t = first_column + tl.arange(0, BLOCK_T)
        z += tl.load(bias + channel + offs_t, mask=offs_t < T, other=0.0)[None, :]
    return z


@triton.jit
def target_tile(
    teacher,
    row_shift,
    row_scale,
    channel_shift,
    channel_scale,
    first_row,
    first_column,
    stride_teacher,
    last_row,
    channel,
    T,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EVEN_T: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """A (BLOCK_N, BLOCK_T) tile of the target in float32: (Y - shift) · scale by rows, then by channels."""
    t = load_tile(teacher, first_row, first_column, stride_teacher, last_row, T, BLOCK_N, BLOCK_T, EVEN_T, DESCRIPTOR)
    t = t.to(tl.float32)
    offs_n = first_row + tl.arange(0, BLOCK_N)
    mask_n = offs_n < last_row
    offs_t = first_column + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    if row_shift is not None:
        t -= tl.load(row_shift + offs_n, mask=mask_n, other=0.0)[:, None]
    if row_scale is not None:
        t *= tl.load(row_scale + offs_n, mask=mask_n, other=0.0)[:, None]
    if channel_shift is not None:
        t -= tl.load(channel_shift + channel + offs_t, mask=mask_t, other=0.0)[None, :]
    if channel_scale is not None:
        t *= tl.load(channel_scale + channel + offs_t, mask=mask_t, other=0.0)[None, :]
    return t


@triton.jit
def weighted(value, row_weight, first_row, last_row, BLOCK_N: tl.constexpr):
    """value (BLOCK_N, ...) times its rows' weights; rows of weight 0 become 0 whatever they hold."""
    if row_weight is not None:
        offs_n = first_row + tl.arange(0, BLOCK_N)
        w = tl.load(row_weight + offs_n, mask=offs_n < last_row, other=0.0)
        if len(value.shape) == 2:
            w = w[:, None]
        value = tl.where(w == 0, 0.0, w * value)
    return value


@triton.jit
def sum_in_order(values, count, BLOCK: tl.constexpr):
    """The sum of count values, in the same order whichever programs wrote them; read past the L1 cache."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(values + index, mask=index < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)
