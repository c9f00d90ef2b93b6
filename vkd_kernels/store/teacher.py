"""The teacher while a store is built: frozen, with hooks on the tapped modules, fed by batches of any form."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops import checks
from ..pairs import Pair
from ..pooling import MEANS
from ..taps import WHERE_NEEDED, Tap, TapError, as_arguments, as_mapping, hooks_of, moved, run_tapped, tensors_in
from ..teachers import KeptModes, modules_with_a_mode, set_eval_mode
from .functions import check_one_function
from .manifest import StoredTap, tap_keys
from .options import Options


class Answer(NamedTuple):
    inputs: list[torch.Tensor]  # copies, where they were asked for
    features: dict[str, torch.Tensor]  # (N, ...) each, in the teacher's precision
    left: dict[str, torch.Tensor]  # of means under a mask: (N,), whether there was something to take the mean of
    only_tensors: bool  # whether the inputs are all that the teacher was given


class TappedTeacher:
    """In eval mode inside the ``with`` block, and as it was before at its end."""

    def __init__(self, teacher: nn.Module, pairs: list[Pair], options: Options):
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module; got {checks.describe(teacher)}")
        for name, parameter in teacher.named_parameters():
            if parameter.is_meta or checks.is_sharded(parameter):
                kind = "is on the meta device" if parameter.is_meta else "is a DTensor"
                raise ValueError(f"teacher must be whole and have values on every rank; its {name} {kind}")
        self.teacher, self.model = teacher, getattr(teacher, "_orig_mod", teacher)  # compiled, and the model itself
        self.options = options
        self.stored_taps = [StoredTap.of(pair) for pair in pairs]
        self.keys = tap_keys(self.stored_taps)
        self.taps = [Tap(pair.side("teacher")) for pair in pairs]
        hooks_of("teacher", teacher, self.taps)  # are the names right?
        first = next((p for p in teacher.parameters() if p.is_floating_point()), None)
        self.device: torch.device | None = None if first is None else first.device
        self.dtype: torch.dtype | None = None if first is None else first.dtype
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> "TappedTeacher":
        with contextlib.ExitStack() as undo:
            undo.enter_context(KeptModes(modules_with_a_mode(self.teacher)))
            set_eval_mode(self.teacher)
            for module, tap in hooks_of("teacher", self.teacher, self.taps):
                undo.callback(module.register_forward_hook(tap).remove)
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    @torch.no_grad()
    def __call__(self, batch: Any, count: int, *, keep_inputs: bool = False) -> Answer:
        args, kwargs = arguments = self.arguments(batch)
        # Copied now: a teacher may change its input, or write its output into the dict that it is given.
        inputs = [tensor.clone() for tensor in tensors_in(arguments)] if keep_inputs else []
        whole = only_tensors(arguments)
        mask = self.mask(batch, count)
        _, calls = run_tapped(lambda: self.teacher(*args, **kwargs), dict(zip(self.keys, self.taps, strict=True)))
        rows, left = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        for key, tap in zip(self.keys, self.taps, strict=True):
            returned = tap.chosen(calls[key])
            if returned is None:
                raise TapError(tap.missing(self.teacher, calls[key], WHERE_NEEDED))
            found = tap.rows(returned, mask)
            rows[key] = found.values
            if tap.side.pool in MEANS and found.mask is not None:
                left[key] = found.mask
        for key, features in rows.items():
            if features.dim() < 2 or len(features) != count:
                raise ValueError(
                    f"features of {key!r} must have the shape (samples, ..., channels), with {count} samples in this "
                    f"batch; got {tuple(features.shape)}"
                )
        return Answer(inputs, rows, left, whole)

    def arguments(self, batch: Any) -> tuple[tuple, dict]:
        if self.options.teacher_input is not None:
            given = self.options.teacher_input(batch)
        else:
            given = batch[0] if isinstance(batch, (tuple, list)) else batch
        args, kwargs = as_arguments(given)
        return moved(args, self.device, self.dtype), moved(kwargs, self.device, self.dtype)

    def mask(self, batch: Any, count: int) -> torch.Tensor | None:
        if self.options.mask is None:
            return None
        mask = self.options.mask(batch)
        if not isinstance(mask, torch.Tensor) or mask.dim() < 2 or len(mask) != count:
            raise ValueError(
                f"mask must give a tensor (N, tokens) or (N, H, W) for the {count} samples of a batch; got "
                f"{checks.describe(mask)}"
            )
        return mask


def only_tensors(value: Any) -> bool:
    """Whether ``tensors_in`` finds all data in it: numbers, flags and None are options of the teacher."""
    if value is None or isinstance(value, (torch.Tensor, int, float)):
        return True
    value = as_mapping(value)
    items = list(value.values()) if isinstance(value, Mapping) else value
    return isinstance(items, (tuple, list)) and all(only_tensors(item) for item in items)


def teacher_taps(taps: Sequence[str | Mapping | Pair]) -> list[Pair]:
    """One ``Pair`` for every different teacher's side; the student's side is not looked at."""
    if isinstance(taps, (str, Mapping, Pair)) or not taps:
        raise TypeError(f"taps must be a list of names, dicts or pairs, and not empty; got {checks.describe(taps)}")
    pairs: list[tuple[StoredTap, Pair]] = []
    for i, tap in enumerate(taps):
        if not isinstance(tap, (str, Mapping, Pair)):
            raise TypeError(f"taps must be names of modules, dicts or pairs; one is {checks.describe(tap)}")
        fields = {"teacher": tap} if isinstance(tap, str) else tap
        pair = fields if isinstance(fields, Pair) else Pair(**{"student": "", "name": f"taps[{i}]", **fields})
        stored = StoredTap.of(pair)
        same = next((other for known, other in pairs if known.same_as(stored)), None)
        if same is None:
            pairs.append((stored, pair))
        else:
            check_one_function(same, pair)
    return [pair for _, pair in pairs]
