"""The student as a stand-in for its teacher: a plain module that gives vectors in the teacher's space."""

import contextlib
import copy
from typing import Any

import torch
from torch import nn

from .ops import checks
from .ops.normalization.reference import mean_and_variance, without_masked_rows
from .pairs import Pair
from .pooling import Rows, masks_of_sides, of_positions
from .taps import WHERE_NEEDED, Tap, TapError, hooks_of, run_tapped
from .turn import Turn


class TeacherSpace(nn.Module):
    """A student up to a tapped module, pooled and projected: no operator of this package, no parametrization.

    Attributes:
        student: a copy of the student, with a hook on the tapped module.
        projection: the ``nn.Linear`` that the pair's projection and scale were folded into.

    Shape:
        ``forward(*args, masks=None, **kwargs)``, the student's arguments and the masks that the distiller takes, which
        count in means -> ``(N, T)``, ``(N, tokens, T)`` or ``(N, H, W, T)``.
    """

    def __init__(self, student: nn.Module, pair: Pair, projection: nn.Linear):
        super().__init__()
        self.student = copy.deepcopy(student)
        self.student.requires_grad_(False)
        self.projection = projection.requires_grad_(False)
        self._pair, self._tap, self._turn = pair, Tap(pair.side("student")), Turn()
        for module, tap in hooks_of("student", self.student, [self._tap]):
            module.register_forward_hook(tap)
        self.eval()

    @torch.no_grad()
    def standardize_over(self, args: tuple, kwargs: dict, *, eps: float) -> None:
        """Folds into the projection what gives every channel mean 0 and variance 1 over this batch's rows."""
        rows = self._rows(args, kwargs)
        z = self._projected(rows).flatten(0, -2).double()
        row_weight = None if rows.mask is None else of_positions(rows.mask, rows.values).flatten().to(z.dtype)
        mean, variance, _ = mean_and_variance(without_masked_rows(z, row_weight), row_weight)
        factor = torch.rsqrt(variance + eps)
        weight, bias = self.projection.weight, self.projection.bias
        shift = -mean if bias is None else bias - mean
        self.projection.bias = nn.Parameter((shift * factor).to(weight.dtype), requires_grad=False)
        weight.mul_(factor[:, None].to(weight.dtype))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._projected(self._rows(args, kwargs))

    def _projected(self, rows: Rows) -> torch.Tensor:
        return self.projection(rows.values.to(self.projection.weight.dtype))

    def _rows(self, args: tuple, kwargs: dict) -> Rows:
        known = {name: value for name, value in kwargs.items() if name != "masks"}
        masks = kwargs.get("masks") or {}
        for name in masks:
            checks.check_choice("masks", name, [self._pair.name])
        mask, _ = masks_of_sides(self._pair, masks.get(self._pair.name))
        with contextlib.nullcontext() if torch.compiler.is_compiling() else self._turn:
            _, calls = run_tapped(lambda: self.student(*args, **known), {"": self._tap})
        returned = self._tap.chosen(calls[""])
        if returned is None:
            raise TapError(self._tap.missing(self.student, calls[""], WHERE_NEEDED))
        return self._tap.rows(returned, mask)
