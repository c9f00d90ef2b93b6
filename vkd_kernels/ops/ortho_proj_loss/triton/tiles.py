"""How the fused loss runs: the launches for a shape, and the one table of tiles (kernels: kernels.py)."""

from typing import Any, NamedTuple

import torch

from ..chunks import even_chunk

POOLED_ROWS = 1024
LEVELS = 8  # losses in one launch, at most: each takes arguments of the kernel


class LossTile(NamedTuple):
    """loss_tile: rows x columns of Z, `inner` of S a step."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    descriptors: bool = False


class GradientTiles(NamedTuple):
    """gradient_tiles: the tile of dX and its step over T, the tile of dP and its step over N."""

    x_rows: int
    x_columns: int
    x_inner: int
    p_rows: int
    p_columns: int
    p_inner: int
    warps: int
    stages: int


class RowsTile(NamedTuple):
    """orthonormal_mse_rows: rows x (up to `blocks` times `columns`) of T P, `inner` of T a step."""

    rows: int
    columns: int
    blocks: int
    inner: int
    warps: int
    stages: int


class ColumnsTile(NamedTuple):
    """column_sums: rows x columns of X a step."""

    rows: int
    columns: int
    warps: int


class ScatterTile(NamedTuple):
    """scatter_tiles: columns x columns of Xᵀ X, `rows` of X a step."""

    rows: int
    columns: int
    warps: int
    stages: int


class MomentsTile(NamedTuple):
    """moment_gradients: rows x columns of dX, `inner` of S a step."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# Tiles that compile without spills (held by tests/ops/test_ortho_proj_loss_aot.py), by kernel and operand bits,
# for compute capabilities from the given one on. "descriptor" and "pointer": rows start on 16-byte boundaries;
# "ragged": they do not.
TILES: dict[tuple[str, int], dict[int, Any]] = {
    ("descriptor", 16): {90: LossTile(128, 128, 64, 8, 3, descriptors=True)},
    ("pointer", 16): {80: LossTile(128, 128, 64, 8, 3)},
    ("pointer", 32): {80: LossTile(64, 128, 32, 8, 3)},
    ("ragged", 16): {80: LossTile(64, 64, 64, 8, 3)},
    ("ragged", 32): {80: LossTile(64, 128, 32, 8, 3)},
    # The same on every architecture, so that shapes of saved tensors can be told without a device.
    ("pooled", 16): {80: LossTile(64, 64, 64, 4, 3)},
    ("pooled", 32): {80: LossTile(64, 64, 32, 8, 3)},
    ("gradients", 16): {80: GradientTiles(64, 64, 64, 64, 64, 64, 4, 4)},
    ("gradients", 32): {80: GradientTiles(64, 64, 32, 64, 64, 32, 8, 3)},
    ("columns", 16): {80: ColumnsTile(32, 128, 4)},
    ("columns", 32): {80: ColumnsTile(32, 64, 4)},
    ("scatter", 16): {80: ScatterTile(64, 64, 4, 3)},
    ("scatter", 32): {80: ScatterTile(32, 64, 8, 3)},
    ("moment gradients", 16): {80: MomentsTile(64, 64, 64, 4, 3)},
    ("moment gradients", 32): {80: MomentsTile(64, 64, 32, 8, 3)},
    ("rows", 16): {80: RowsTile(64, 64, 2, 64, 8, 3), 90: RowsTile(64, 64, 4, 64, 8, 3)},
    ("rows", 32): {80: RowsTile(64, 32, 4, 32, 8, 3)},
    ("ragged rows", 16): {80: RowsTile(64, 32, 4, 32, 8, 3)},
}
COLUMN_PARTIALS = 512  # partial sums over rows, at most
SCATTER_PROGRAMS = 1024  # of scatter_tiles, about: each keeps a tile of partial sums
STATISTICS_ELEMENTS = 4096  # of a block of row_statistics, in 4 warps


def tile(kernel: str, dtype: torch.dtype, capability: int = 80):
    """The tile of a kernel for this dtype on this compute capability (90 for sm_90), or None."""
    table = TILES.get((kernel, 8 * dtype.itemsize), {})
    fitting = [least for least in table if least <= capability]
    return table[max(fitting)] if fitting else None


def loss_tile(dtype: torch.dtype, capability: int, aligned: bool) -> LossTile:
    """The tile of loss_tile for many rows. Descriptors (tensor memory access) save registers where a chip has them."""
    if not aligned:
        return tile("ragged", dtype, capability)
    return tile("descriptor", dtype, capability) or tile("pointer", dtype, capability)


def rows_tile(dtype: torch.dtype, capability: int, aligned: bool) -> RowsTile:
    """The tile of orthonormal_mse_rows."""
    ragged = None if aligned else tile("ragged rows", dtype, capability)
    return ragged or tile("rows", dtype, capability)


class Schedule(NamedTuple):
    pooled: bool  # all rows at once, G kept for one backward launch; else gradients in the forward pass, chunk by chunk
    chunk: int  # rows per chunk


def choose(n: int, s: int, t: int, dtype: torch.dtype, workspace_bytes: int, rows_of_tile: int = 128) -> Schedule:
    """Few rows are bound by launches, many by the chunks.

    Up to POOLED_ROWS rows whose G fits the workspace: row statistics, loss, gradients, one launch each. More: chunks
    whose G (n, t), statistics and masked copy of X fit the workspace, with library products for the gradients.
    """
    if n <= POOLED_ROWS and n * t * dtype.itemsize <= workspace_bytes:
        return Schedule(True, n)
    bytes_per_row = (t + 8 + s) * dtype.itemsize + 8 + 4 * -(-t // rows_of_tile)
    return Schedule(False, even_chunk(n, workspace_bytes // bytes_per_row, rows_of_tile))


def groups(rows: list[int], s: int, t: int, dtype: torch.dtype, workspace_bytes: int) -> list[int]:
    """How many losses of equal S and T each launch takes, in their order: neighbours of few rows together, up to LEVELS
    of them whose G fits the workspace; one of many rows by itself."""
    sizes: list[int] = []
    held = None  # rows of the launch that is open to more; None: there is none
    for n in rows:
        pooled = choose(n, s, t, dtype, workspace_bytes).pooled
        if pooled and held is not None and sizes[-1] < LEVELS and (held + n) * t * dtype.itemsize <= workspace_bytes:
            sizes[-1] += 1
            held += n
        else:
            sizes.append(1)
            held = n if pooled else None
    return sizes
