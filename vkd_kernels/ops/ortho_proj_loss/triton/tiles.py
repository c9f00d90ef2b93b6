"""The one table of tiles, and how many rows a launch takes.

Tiles compile without spills and without serialized tensor-core instructions for every chip of the table (held by
tests/ops/test_ortho_proj_loss_aot.py). None has been timed: that needs a GPU.
"""

import functools
from typing import Any, NamedTuple

import torch

from ..chunks import even_chunk

POOLED_ROWS = 1024
GROUP = 8  # losses in one launch, at most: each takes arguments of the kernel
COLUMN_PARTIALS = 512  # partial sums over rows, at most
SCATTER_PROGRAMS = 1024  # of scatter_tiles, about: each keeps a tile of partial sums
CHUNK_BLOCK = 128  # rows of a chunk of the semi-orthogonal form are a multiple of this
STATISTICS_ELEMENTS, STATISTICS_ROWS = 4096, 128  # of a block of row_statistics at most, in 4 warps
# For benchmarks to compare: the wide tile of ("wide descriptor", 16), from this many student channels on, and the
# row-stationary kernel, for up to as many. Both are ready; neither is chosen before a record shows that it wins.
WIDE_FROM: int | None = None
ROW_STATIONARY_UP_TO: int | None = None


class Chip(NamedTuple):
    """What the choice of tiles depends on: "cuda" and 90 for sm_90, "hip" and 942 for gfx942."""

    kind: str
    capability: int
    processors: int = 132

    @property
    def has_tf32(self) -> bool:
        """Whether Triton can multiply in TF32: of AMD's GPUs on MI300 alone."""
        return self.kind != "hip" or self.capability == 942


@functools.cache
def chip(device: torch.device) -> Chip:
    if device.type != "cuda":  # the interpreter
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0].removeprefix("gfx")
        return Chip("hip", int(name) if name.isdigit() else 900, properties.multi_processor_count)
    return Chip("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


class LossTile(NamedTuple):
    """loss_tile and cosine_rows: block_n x block_t of Z, block_s of S a step."""

    block_n: int
    block_t: int
    block_s: int
    warps: int
    stages: int
    descriptors: bool = False


class GradientTiles(NamedTuple):
    """gradient_tiles: the (n, s) tile of dX and its step over t, the (t, s) tile of dP and its step over n."""

    student: tuple[int, int, int]
    weight: tuple[int, int, int]
    warps: int
    stages: int


class ProductsTile(NamedTuple):
    """teacher_products and row_stationary: block_n rows, `blocks` times block_s of S, block_t of T a step."""

    block_n: int
    block_s: int
    blocks: int
    block_t: int
    warps: int
    stages: int


class ColumnsTile(NamedTuple):
    """column_sums: block_n x block_c of X a step."""

    block_n: int
    block_c: int
    warps: int


class ScatterTile(NamedTuple):
    """scatter_tiles: block_s x block_s of Xᵀ X, block_n rows of X a step."""

    block_n: int
    block_s: int
    warps: int
    stages: int


class ScatterGradientsTile(NamedTuple):
    """scatter_gradients: block_n x block_s of dX, block_k of S a step."""

    block_n: int
    block_s: int
    block_k: int
    warps: int
    stages: int


# By kernel and bits of the operands: for compute capabilities from the given one on, and for AMD's chips ("hip"), whose
# programs have 64 KiB of shared memory on gfx942. "descriptor" and "pointer": rows start on 16-byte boundaries;
# "ragged": they do not.
TILES: dict[tuple[str, int], dict[int | str, Any]] = {
    ("descriptor", 16): {90: LossTile(128, 128, 64, 8, 3, descriptors=True)},
    ("descriptor, options", 16): {90: LossTile(64, 128, 64, 8, 3, descriptors=True)},
    ("wide descriptor", 16): {90: LossTile(128, 256, 64, 8, 3, descriptors=True)},
    ("pointer", 16): {80: LossTile(128, 128, 64, 8, 3), "hip": LossTile(128, 128, 32, 8, 2)},
    ("pointer", 32): {80: LossTile(64, 128, 32, 8, 3), "hip": LossTile(64, 128, 32, 8, 2)},
    # "options": what takes registers, a cosine or several terms (or, of pointers, student channels off the block).
    ("pointer, options", 16): {80: LossTile(64, 128, 64, 8, 3), "hip": LossTile(64, 64, 64, 4, 2)},
    ("ragged", 16): {80: LossTile(64, 64, 64, 8, 3), "hip": LossTile(64, 64, 64, 4, 2)},
    ("ragged", 32): {80: LossTile(64, 128, 32, 8, 3), "hip": LossTile(64, 128, 32, 8, 2)},
    ("ragged, options", 32): {80: LossTile(64, 64, 32, 8, 3), "hip": LossTile(64, 64, 32, 8, 2)},
    ("cosine", 16): {80: LossTile(64, 64, 64, 4, 3), "hip": LossTile(64, 64, 64, 4, 2)},
    ("cosine", 32): {80: LossTile(64, 32, 32, 8, 3), "hip": LossTile(64, 32, 32, 8, 2)},
    ("ragged cosine", 16): {80: LossTile(64, 32, 32, 8, 3), "hip": LossTile(64, 32, 32, 8, 2)},
    # The same on every chip, so that shapes of saved tensors can be told without a device.
    ("pooled", 16): {80: LossTile(64, 64, 64, 4, 3)},
    ("pooled", 32): {80: LossTile(64, 64, 32, 8, 3)},
    ("gradients", 16): {
        80: GradientTiles((64, 64, 64), (64, 64, 64), 4, 4),
        "hip": GradientTiles((64, 64, 64), (64, 64, 64), 4, 2),
    },
    ("gradients", 32): {
        80: GradientTiles((64, 64, 32), (64, 64, 32), 8, 3),
        "hip": GradientTiles((64, 64, 32), (64, 64, 32), 8, 2),
    },
    ("columns", 16): {80: ColumnsTile(32, 128, 4)},
    ("columns", 32): {80: ColumnsTile(32, 64, 4)},
    ("scatter", 16): {80: ScatterTile(64, 64, 4, 3), "hip": ScatterTile(64, 64, 4, 2)},
    ("scatter, weighted", 16): {80: ScatterTile(32, 64, 4, 3), "hip": ScatterTile(32, 64, 4, 2)},
    ("scatter", 32): {80: ScatterTile(32, 64, 8, 3), "hip": ScatterTile(32, 64, 8, 2)},
    ("scatter gradients", 16): {
        80: ScatterGradientsTile(64, 64, 64, 4, 3),
        "hip": ScatterGradientsTile(64, 64, 64, 4, 2),
    },
    ("scatter gradients", 32): {
        80: ScatterGradientsTile(64, 64, 32, 8, 3),
        "hip": ScatterGradientsTile(64, 64, 32, 8, 2),
    },
    ("row stationary", 16): {90: ProductsTile(64, 64, 3, 64, 4, 2), 120: None},  # no wgmma there: it would spill
    ("products", 16): {
        80: ProductsTile(64, 64, 2, 64, 8, 3),
        90: ProductsTile(64, 64, 4, 64, 8, 3),
        "hip": ProductsTile(64, 64, 2, 64, 8, 2),
    },
    ("products", 32): {80: ProductsTile(64, 32, 4, 32, 8, 3), "hip": ProductsTile(64, 32, 4, 32, 8, 2)},
    ("ragged products", 16): {80: ProductsTile(64, 32, 4, 32, 8, 3), "hip": ProductsTile(64, 32, 4, 32, 8, 2)},
}


INTERPRETER = Chip("cuda", 80)


@functools.lru_cache(maxsize=1024)
def tile(kernel: str, dtype: torch.dtype, chip: Chip = INTERPRETER) -> Any:
    """The tile of a kernel for this dtype on this chip, or None."""
    table = TILES.get((kernel, 8 * dtype.itemsize), {})
    if chip.kind == "hip" and "hip" in table:
        return table["hip"]
    capability = chip.capability if chip.kind == "cuda" else 80
    fitting = [least for least in table if isinstance(least, int) and least <= capability]
    return table[max(fitting)] if fitting else None


def loss_tile(dtype: torch.dtype, s: int, chip: Chip, *, aligned: bool, several: bool = False) -> LossTile:
    """The tile of loss_tile for many rows. Descriptors (tensor memory access) save registers where a chip has them."""
    kinds = ["ragged, options", "ragged"] if several else ["ragged"]
    if aligned:
        kinds = ["descriptor", "pointer"]
        if several:
            kinds = ["descriptor, options", "pointer, options", *kinds]
        elif WIDE_FROM is not None and s >= WIDE_FROM:
            kinds = ["wide descriptor", *kinds]
        elif s % 64 and tile("descriptor", dtype, chip) is None:
            kinds = ["pointer, options", *kinds]
    return next(loss_tile for kind in kinds if (loss_tile := tile(kind, dtype, chip)) is not None)


def cosine_tile(dtype: torch.dtype, s: int, t: int, chip: Chip) -> LossTile:
    """The tile of cosine_rows."""
    ragged = tile("ragged cosine", dtype, chip) if s % 64 or t % 64 else None
    return ragged or tile("cosine", dtype, chip)


def scatter_tile(dtype: torch.dtype, chip: Chip, *, weighted: bool) -> ScatterTile:
    """The tile of scatter_tiles."""
    return (tile("scatter, weighted", dtype, chip) if weighted else None) or tile("scatter", dtype, chip)


def row_stationary_tile(dtype: torch.dtype, s: int, chip: Chip, aligned: bool) -> ProductsTile | None:
    """The tile of row_stationary, or None where it does not serve."""
    chosen = tile("row stationary", dtype, chip)
    if chosen is None or not aligned or s > min(ROW_STATIONARY_UP_TO or 0, chosen.blocks * chosen.block_s):
        return None
    return chosen


def products_tile(dtype: torch.dtype, chip: Chip, aligned: bool) -> ProductsTile:
    """The tile of teacher_products."""
    ragged = None if aligned else tile("ragged products", dtype, chip)
    return ragged or tile("products", dtype, chip)


def is_pooled(n: int, t: int, dtype: torch.dtype, workspace_bytes: int) -> bool:
    """Few rows are bound by launches, many by the products: up to POOLED_ROWS rows whose G fits the workspace."""
    return n <= POOLED_ROWS and n * t * dtype.itemsize <= workspace_bytes


def chunk_rows(bytes_per_row: int, n: int, workspace_bytes: int, block_n: int, processors: int) -> int:
    """Rows of a chunk: what fits the workspace, as even as can be, in whole waves of one block of rows a processor.

    A product of the chunk has a program for a block of rows: one more than there are processors costs a second wave.
    """
    most = max(workspace_bytes // (bytes_per_row * block_n), 1)
    if most > processors:
        most -= most % processors
    return even_chunk(n, most * block_n, block_n)


def loss_chunk(
    n: int, s: int, t: int, dtype: torch.dtype, *, workspace_bytes: int, block_n: int, processors: int
) -> int:
    """Rows of a chunk of the loss, which keeps G, a copy of X without masked rows, and sums of G."""
    bytes_per_row = (t + 8 + s) * dtype.itemsize + 4 * -(-t // block_n)
    return chunk_rows(bytes_per_row, n, workspace_bytes, block_n, processors)


def groups(rows: list[int], t: int, dtype: torch.dtype, workspace_bytes: int) -> list[int]:
    """How many losses of equal S and T each launch takes, in their order: neighbors of few rows, up to GROUP of them
    whose G fits the workspace; one of many rows by itself."""
    sizes: list[int] = []
    open_rows: int | None = None  # rows of the launch that is open to more; None: there is none
    for n in rows:
        pooled = is_pooled(n, t, dtype, workspace_bytes)
        fits = open_rows is not None and (open_rows + n) * t * dtype.itemsize <= workspace_bytes
        if pooled and open_rows is not None and fits and sizes[-1] < GROUP:
            sizes[-1] += 1
            open_rows += n
        else:
            sizes.append(1)
            open_rows = n if pooled else None
    return sizes
