"""Features of named modules: the hook, pooling and masks; distiller.py compares them."""

import difflib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .ops import checks
from .pairs import POOLINGS, Pair

NAMES_SHOWN = 12


class Tap:
    """The forward hook on one module, for one side of one pair. A plain object, so that copies and pickles hold."""

    def __init__(self, pair: Pair, side: str):
        self.pair, self.side, self.module = pair, side, getattr(pair, side)
        self.pool, self.skip = getattr(pair, f"{side}_pool"), getattr(pair, f"{side}_skip")
        self.where = f"pair {pair.name!r}: the output of {side} module {self.module!r}"
        self.seen: list | None = None  # (tensor, its version) of every run; None: not looking

    def __call__(self, module, args, output):
        if self.seen is not None:
            x = entry(output, getattr(self.pair, f"{self.side}_output"), self.where, f"{self.side}_output")
            self.seen.append((x, version(x)))

    def rows(self, mask):
        """(rows (..., C), their mask or None): the features pooled, the mask along with them."""
        if len(self.seen) != 1:
            raise RuntimeError(
                f"{self.where} is needed once; the module ran {len(self.seen)} times in this forward pass. (A model "
                "compiled and run before it was distilled does not see hooks: compile the distiller instead.)"
            )
        x, before = self.seen[0]
        if version(x) != before:
            raise RuntimeError(f"{self.where} was changed in place afterwards: tap the module that changed it")
        if callable(self.pool):
            x = self.pool(x)
            checks.check_tensor(f"what {self.side}_pool of pair {self.pair.name!r} returns", x)
            return x, mask
        layout = POOLINGS[self.pool]
        if x.dim() != layout.count(",") + 1:
            fitting = [repr(pool) for pool, other in POOLINGS.items() if other.count(",") + 1 == x.dim()]
            raise ValueError(
                f"{self.where} must have the layout {layout} for {self.side}_pool={self.pool!r}; got "
                f"{tuple(x.shape)}, which suits {', '.join([*fitting, 'a function'])}"
            )
        if self.pool is None:
            return x, mask
        per_sample = mask is None or mask.dim() == 1
        if self.pool == "class_token":
            return x[:, 0], mask if per_sample else mask[:, 0]
        if x.dim() == 3:
            if self.skip >= x.shape[1]:
                raise ValueError(f"{self.where}: {self.side}_skip={self.skip} leaves none of {x.shape[1]} tokens")
            x, mask = x[:, self.skip :], mask if per_sample else mask[:, self.skip :]
        else:
            x = x.permute(0, 2, 3, 1)
        positions = tuple(range(1, x.dim() - 1))
        if self.pool in ("tokens", "spatial"):
            if mask is not None and per_sample:
                mask = mask.reshape(-1, *(1 for _ in positions)).expand(x.shape[:-1])
            return x, mask
        if per_sample:
            return x.mean(positions), mask
        precise = torch.promote_types(x.dtype, torch.float32)
        share = checks.row_weights(f"mask of {self.where}", mask, x.shape[:-1], x, precise).view(*x.shape[:-1], 1)
        total = share.sum(positions)
        mean = (torch.where(share > 0, x, 0) * share).sum(positions) / torch.where(total > 0, total, 1.0)
        return mean.to(x.dtype), total.squeeze(-1) > 0


def rows(student: Tap, teacher: Tap, mask):
    """(student's rows, teacher's rows, mask of the rows) of one pair: positions and precision made equal."""
    pair = student.pair
    masks = mask if isinstance(mask, (tuple, list)) else (mask, mask)
    if len(masks) != 2 or not all(given is None or isinstance(given, torch.Tensor) for given in masks):
        raise TypeError(f"masks[{pair.name!r}] must be a tensor or two; got {checks.describe(mask)}")
    (x, x_mask), (y, y_mask) = student.rows(masks[0]), teacher.rows(masks[1])
    if x.shape[:-1] != y.shape[:-1]:
        maps = x.dim() == y.dim() == 4 and len(x) == len(y)
        if not (maps and pair.resample):
            hint = "; resample='student' or 'teacher' makes them equal" if maps else ""
            raise ValueError(
                f"pair {pair.name!r}: student and teacher must have the same positions; got student rows of shape "
                f"{tuple(x.shape)} and teacher rows of shape {tuple(y.shape)} (channels last){hint}"
            )
        x = resampled(x, y.shape[1:3]) if pair.resample == "student" else x
        y = resampled(y, x.shape[1:3])
    if (x.dtype == torch.float64) != (y.dtype == torch.float64):
        y = y.to(x.dtype)
    if masks[0] is masks[1] or y_mask is None:
        return x, y, x_mask
    if x_mask is None or x_mask.shape == y_mask.shape:
        return x, y, y_mask if x_mask is None else x_mask * y_mask
    raise ValueError(
        f"masks[{pair.name!r}] must agree on the rows; got {tuple(x_mask.shape)} for the student's rows and "
        f"{tuple(y_mask.shape)} for the teacher's"
    )


def resampled(x: torch.Tensor, size) -> torch.Tensor:  # (N, H, W, C) -> (N, *size, C)
    if x.shape[1:3] == size:
        return x
    x32 = x.to(torch.promote_types(x.dtype, torch.float32)).permute(0, 3, 1, 2)
    return F.interpolate(x32, tuple(size), mode="bilinear", antialias=True).permute(0, 2, 3, 1).to(x.dtype)


def version(x: torch.Tensor) -> int:
    """Counts the changes of a tensor in place. A compiled graph has none to see, inference mode does not count."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def as_arguments(given) -> tuple[tuple, dict]:
    """(args, kwargs) of a tensor (or any one thing), a tuple of arguments or a dict of keyword arguments."""
    if isinstance(given, Mapping):
        return (), dict(given)
    return (given if isinstance(given, tuple) else (given,)), {}


def cast(x, dtype: torch.dtype | None):
    """Floating-point tensors in ``dtype``; anything else as it is."""
    return x.to(dtype) if dtype is not None and isinstance(x, torch.Tensor) and x.is_floating_point() else x


def entry(output, key: int | str | None, where: str, option: str, default: str | None = None) -> torch.Tensor:
    """The tensor in what a module returned: itself, or the entry ``key`` of a tuple, a dict, a Hugging Face output."""
    entries: dict = {}
    if isinstance(output, Mapping):
        entries = {**output, **dict(enumerate(output.values()))}
    elif isinstance(output, (tuple, list)):
        entries = {**(output._asdict() if hasattr(output, "_asdict") else {}), **dict(enumerate(output))}
    if key is None and default in entries:
        key = default
    found = output if key is None else entries.get(key)
    if not isinstance(found, torch.Tensor):
        raise TypeError(
            f"{where} must be a tensor; {option}={key!r} finds {type(found).__name__}"
            + (f", its entries are {', '.join(map(repr, entries))}" if entries else "")
        )
    return found


def find_module(side: str, model: nn.Module, name: str) -> nn.Module:
    """The module of that name, also in a model that ``torch.compile`` has wrapped."""
    model = getattr(model, "_orig_mod", model)
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = sorted(
            (existing for existing, _ in model.named_modules() if existing),
            key=lambda existing: -difflib.SequenceMatcher(None, name, existing).ratio(),
        )
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    raise ValueError(
        f"{side} has no module {name!r}; it has, nearest first, {', '.join(map(repr, names[:NAMES_SHOWN]))}{more}"
    )
