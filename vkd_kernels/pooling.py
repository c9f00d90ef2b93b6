"""From what a tapped module returned to the rows that are compared: pooling, grids, resampling, and their masks."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from .ops import checks
from .pairs import Pair, Side

MOST_PREFIX_TOKENS = 16  # class, distillation and register tokens of known models
LAYOUTS_OF_POOLINGS = {
    None: "(N, C)",
    "class_token": "(N, tokens, C)",
    "mean_tokens": "(N, tokens, C)",
    "tokens": "(N, tokens, C)",
    "spatial_mean": "(N, C, H, W)",
    "spatial": "(N, C, H, W)",
}
MEANS = ("mean_tokens", "spatial_mean")


@dataclass(frozen=True)
class Rows:
    """Features of one side, channels last, and the mask of their rows."""

    values: torch.Tensor  # (N, C), (N, tokens, C), (N, H, W, C), or what a function returned
    mask: torch.Tensor | None = None  # bool or weights, of the rows
    grid: tuple[int, int] | None = None  # of tokens, where the pair says it


@dataclass(frozen=True)
class ComparedRows:
    """What a pair compares in one step."""

    student: torch.Tensor  # (..., S)
    teacher: torch.Tensor  # (..., T), with the rows of student
    mask: torch.Tensor | None = None  # (...)
    skipped: bool = False  # a masked row in place of an optional pair that did not run


def masks_of_sides(pair: Pair, given: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What a caller gave as the mask of a pair, for the student and for the teacher: one object if it was one mask."""
    masks = given if isinstance(given, (tuple, list)) else (given, given)
    if len(masks) != 2 or not all(mask is None or isinstance(mask, torch.Tensor) for mask in masks):
        raise TypeError(f"masks[{pair.name!r}] must be a tensor or two; got {checks.describe(given)}")
    of_student, of_teacher = masks
    student = _usable(pair, of_student)
    return student, student if of_teacher is of_student else _usable(pair, of_teacher)


def _usable(pair: Pair, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Checked before masks are multiplied or resampled."""
    if mask is None:
        return None
    checks.check_weights(f"masks[{pair.name!r}]", mask)
    return checks.at_least_0(mask)


def pooled(side: Side, output: Any, mask: torch.Tensor | None) -> Rows:
    """The rows of what a module returned: a tensor, or anything where ``side.pool`` is a function."""
    if callable(side.pool):
        values = side.pool(output)
        checks.check_tensor(f"what {side.side}_pool of pair {side.pair!r} returns", values)
        return Rows(values, _mask_beside(side, values, mask), grid_of(side, values))
    if output.is_nested:
        raise TypeError(
            f"{side.where} is a nested tensor, which nn.TransformerEncoder makes of padded inputs in eval mode: build "
            "the encoder with enable_nested_tensor=False, or tap the encoder itself"
        )
    mask = _mask_beside(side, output, mask)
    layout = LAYOUTS_OF_POOLINGS[side.pool]
    if output.dim() != layout.count(",") + 1:
        fitting = [repr(pool) for pool, other in LAYOUTS_OF_POOLINGS.items() if other.count(",") + 1 == output.dim()]
        raise ValueError(
            f"{side.where} must have the layout {layout} for {side.side}_pool={side.pool!r}; got "
            f"{tuple(output.shape)}, which suits {', '.join([*fitting, 'a function'])}"
        )
    if side.pool is None:
        return Rows(output, mask)
    if mask is not None:
        check_samples_of(mask, side, output)
    per_sample = mask is None or mask.dim() == 1
    if side.pool == "class_token":
        return Rows(output[:, 0], mask if mask is None or per_sample else mask[:, 0])
    if output.dim() == 3:
        if side.skip >= output.shape[1]:
            raise ValueError(f"{side.where}: {side.side}_skip={side.skip} leaves none of {output.shape[1]} tokens")
        values = output[:, side.skip :]
        mask = mask if mask is None or per_sample else mask[:, side.skip :]
    else:
        _warn_of_channels_last(side, output)
        values = output.permute(0, 2, 3, 1) if side.layout == "NCHW" else output
    positions = tuple(range(1, values.dim() - 1))
    if side.pool in ("tokens", "spatial"):
        return Rows(values, mask if mask is None else of_positions(mask, values), grid_of(side, values))
    if mask is None or per_sample:
        return Rows(values.mean(positions), mask)
    return _masked_mean(f"mask of {side.where}", values, mask)


def _mask_beside(side: Side, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask; for a teacher where its features are, as its inputs are moved there too."""
    if mask is None or side.side == "student" or mask.device == values.device:
        return mask
    return mask.to(values.device, non_blocking=values.device.type != "cpu")


def _warn_of_channels_last(side: Side, output: torch.Tensor) -> None:  # (N, C, H, W) or (N, H, W, C)
    """A square map, but for its last dimension, that is read as channels first."""
    _, first, second, last = output.shape
    if side.layout == "NCHW" and not torch.compiler.is_compiling() and first == second < last:
        warnings.warn(
            f"{side.where} has the shape (N, {first}, {second}, {last}) and is read as {first} channels of a "
            f"{second} x {last} map. If its channels come last, as in Swin, say "
            f"{side.side}_layout='NHWC'",
            stacklevel=2,
        )


def check_samples_of(mask: torch.Tensor, side: Side, values: torch.Tensor) -> None:  # values (N, ...)
    """An error if the mask is not one of so many samples, or of their positions."""
    if mask.dim() == 0 or len(mask) != len(values):
        raise ValueError(
            f"masks[{side.pair!r}] must have the shape ({len(values)},) or that of the {side.side}'s positions, "
            f"({len(values)}, ...); got {tuple(mask.shape)}"
        )


def of_positions(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:  # (N,) or (N, ...), (N, ..., C)
    """A mask of the samples as one of all their positions."""
    if mask.dim() > 1:
        return mask
    return mask.reshape(-1, *(1 for _ in values.shape[1:-1])).expand(values.shape[:-1])


def _masked_mean(name: str, values: torch.Tensor, mask: torch.Tensor) -> Rows:  # (N, ..., C), (N, ...)
    """The mean over the positions that are left; a sample without any is no row."""
    acc_dtype = torch.promote_types(values.dtype, torch.float32)
    row_weights = checks.row_weights(name, mask, values.shape[:-1], values, acc_dtype)
    assert row_weights is not None  # for there is a mask
    weights = row_weights.view(*values.shape[:-1], 1)
    positions = tuple(range(1, values.dim() - 1))
    total = weights.sum(positions)
    mean = (torch.where(weights > 0, values, 0) * weights).sum(positions) / torch.where(total > 0, total, 1.0)
    return Rows(mean.to(values.dtype), total.squeeze(-1) > 0)


def grid_of(side: Side, values: torch.Tensor) -> tuple[int, int] | None:
    """The grid that the pair says these tokens are."""
    if side.grid is None or values.dim() != 3:
        return None
    if math.prod(side.grid) != values.shape[1]:
        raise ValueError(
            f"pair {side.pair!r}: {side.side}_grid={side.grid} has {math.prod(side.grid)} positions, but there are "
            f"{values.shape[1]} tokens"
        )
    return side.grid


def compared(pair: Pair, student: Rows, teacher: Rows, *, one_mask: bool) -> ComparedRows:
    """Both sides with the same positions, on the student's device; a row counts where both masks let it through.

    ``one_mask``: both sides were given the same mask, which then counts for the side that it fits, its weights once.
    Where its means are taken, a side may have no row of a sample, for its positions or its skip are others.
    """
    teacher = _beside(student.values, teacher)
    if _shape(student) != _shape(teacher):
        student, teacher = _on_one_grid(pair, student, teacher)
    x, y = student.values, teacher.values
    x_mask, y_mask = student.mask, teacher.mask
    if one_mask and x_mask is not None and y_mask is not None:
        fits_student, fits_teacher = (mask.shape == x.shape[:-1] for mask in (x_mask, y_mask))
        if fits_teacher and not fits_student:
            x_mask = None
        elif not (fits_teacher and torch.bool in (x_mask.dtype, y_mask.dtype)):
            y_mask = None
    if x_mask is not None:
        checks.check_same_device(f"masks[{pair.name!r}]", x_mask, "the student's features", x)
    mask = _both_masks(pair, x_mask, y_mask)
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(
            f"masks[{pair.name!r}] must have the shape of the rows {tuple(x.shape[:-1])}; got {tuple(mask.shape)}"
        )
    return ComparedRows(x, y, mask)


def _beside(x: torch.Tensor, teacher: Rows) -> Rows:
    """The teacher's rows on the device of the student's; in float64 where, and only where, the student's are."""
    y, mask = teacher.values, teacher.mask
    dtype = x.dtype if (x.dtype == torch.float64) != (y.dtype == torch.float64) else y.dtype
    asynchronous = x.device.type != "cpu"
    if y.device != x.device or y.dtype != dtype:  # in one step: the device may have no float64
        y = y.to(device=x.device, dtype=dtype, non_blocking=asynchronous)
    if mask is not None and mask.device != x.device:
        mask = mask.to(x.device, non_blocking=asynchronous)
    return replace(teacher, values=y, mask=mask)


def _shape(rows: Rows) -> tuple[int, ...]:
    """The shape of the rows; of tokens on a known grid, as a map."""
    shape = tuple(rows.values.shape[:-1])
    return (shape[0], *rows.grid) if rows.grid is not None and len(shape) == 2 else shape


def _on_one_grid(pair: Pair, student: Rows, teacher: Rows) -> tuple[Rows, Rows]:
    x, y = as_map(student, teacher), as_map(teacher, student)
    if x is None or y is None or len(x.values) != len(y.values):
        raise ValueError(
            f"pair {pair.name!r}: student and teacher must have the same positions; got student rows of shape "
            f"{tuple(student.values.shape)} and teacher rows of shape {tuple(teacher.values.shape)} (channels last)"
            f"{_hint_of_tokens(pair, student, teacher) or _hint_of_grids(pair, student, x, teacher, y)}"
        )
    sizes = x.values.shape[1:3], y.values.shape[1:3]
    if sizes[0] == sizes[1]:
        return x, y
    if pair.resample is None:
        raise ValueError(
            f"pair {pair.name!r}: student and teacher must have the same positions; got student rows of shape "
            f"{tuple(student.values.shape)} and teacher rows of shape {tuple(teacher.values.shape)} (channels last); "
            f"resample='student' or 'teacher' makes them equal, as maps of {tuple(sizes[0])} and {tuple(sizes[1])}"
        )
    return (resampled(x, y.values), y) if pair.resample == "student" else (x, resampled(y, x.values))


def _hint_of_tokens(pair: Pair, student: Rows, teacher: Rows) -> str:
    """A few tokens more on one side are most likely class and register tokens."""
    if student.values.dim() == teacher.values.dim() == 3:
        more = student.values.shape[1] - teacher.values.shape[1]
        if 0 < abs(more) <= MOST_PREFIX_TOKENS:
            side = "student" if more > 0 else "teacher"
            return (
                f"; {side}_skip={pair.side(side).skip + abs(more)} (or more) leaves out what may be class and register "
                "tokens: see num_prefix_tokens of timm's models"
            )
    return ""


def _hint_of_grids(pair: Pair, student: Rows, student_map: Rows | None, teacher: Rows, teacher_map: Rows | None) -> str:
    flat = [
        (side, rows, other)
        for side, rows, as_grid, other in (
            ("student", student, student_map, teacher),
            ("teacher", teacher, teacher_map, student),
        )
        if as_grid is None and rows.values.dim() == 3 and other.values.dim() > 2
    ]
    skips = [_hint_of_prefix(pair, side, rows.values.shape[1], other) for side, rows, other in flat]
    grids = " and ".join(f"{side}_grid=(H, W)" for side, _, _ in flat)
    return "".join(skips) + (f"; {grids} says which map the tokens are" if flat else "")


def _hint_of_prefix(pair: Pair, side: str, tokens: int, other: Rows) -> str:
    """The fewest first tokens without which the others are a map."""
    for skip in range(1, min(MOST_PREFIX_TOKENS + 1, tokens)):
        height, width = _grid_like(_grid_of(other), tokens - skip)
        if height * width == tokens - skip:
            return (
                f"; if the first ones are class and register tokens (num_prefix_tokens of timm's models), "
                f"{side}_skip={pair.side(side).skip + skip} leaves {tokens - skip}, a map of {height} x {width}"
            )
    return ""


def as_map(rows: Rows, other: Rows) -> Rows | None:
    """Tokens (N, H·W, C) as (N, H, W, C): on their own grid, else on the other side's or one of its proportions."""
    if rows.values.dim() == 4:
        return rows
    if rows.values.dim() != 3:
        return None
    tokens = rows.values.shape[1]
    for grid in (rows.grid, _grid_of(other), _grid_like(_grid_of(other), tokens)):
        if grid is not None and len(grid) == 2 and math.prod(grid) == tokens:
            mask = rows.mask
            if mask is not None and mask.shape == rows.values.shape[:-1]:
                mask = mask.unflatten(1, grid)
            return Rows(rows.values.unflatten(1, grid), mask)
    return None


def _grid_of(rows: Rows) -> tuple[int, ...] | None:
    return rows.grid if rows.values.dim() == 3 else tuple(rows.values.shape[1:3])


def _grid_like(others: tuple[int, ...] | None, tokens: int) -> tuple[int, int]:
    """A grid of about so many tokens with the proportions of the other side's; of a square where it has none."""
    if others is None or len(others) != 2 or others[0] == others[1]:
        return math.isqrt(tokens), math.isqrt(tokens)
    height = max(round(math.sqrt(tokens * others[0] / others[1])), 1)
    return height, tokens // height


def resampled(rows: Rows, like: torch.Tensor) -> Rows:  # (N, H, W, C), size of like (N, H', W', any)
    """The map on another grid, bilinear and antialiased; a mask of its own positions weighs what it is made of."""
    size = list(like.shape[1:3])
    values = rows.values.to(torch.promote_types(rows.values.dtype, torch.float32)).permute(0, 3, 1, 2)
    if rows.mask is None or rows.mask.shape != rows.values.shape[:-1]:
        values = F.interpolate(values, size, mode="bilinear", antialias=True)
        return replace(rows, values=values.permute(0, 2, 3, 1).to(rows.values.dtype))
    weights = rows.mask.detach().to(values.dtype).unsqueeze(1)  # (N, 1, H, W)
    values = torch.where(weights > 0, values * weights, 0)
    values, weights = (F.interpolate(x, size, mode="bilinear", antialias=True) for x in (values, weights))
    values = values / torch.where(weights > 0, weights, 1)
    return Rows(values.permute(0, 2, 3, 1).to(rows.values.dtype), weights.squeeze(1))


def _both_masks(pair: Pair, student: torch.Tensor | None, teacher: torch.Tensor | None) -> torch.Tensor | None:
    if student is None or teacher is None:
        return teacher if student is None else student
    if student.shape != teacher.shape:
        raise ValueError(
            f"masks[{pair.name!r}] must agree on the rows; got {tuple(student.shape)} for the student's rows and "
            f"{tuple(teacher.shape)} for the teacher's"
        )
    return student * teacher
