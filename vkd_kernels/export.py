"""The student as a stand-in for its teacher: a plain module that gives vectors in the teacher's space."""

import copy
from typing import Any

import torch
from torch import nn

from .pairs import Pair
from .pooling import pooled
from .taps import Tap, hooks_of, run_tapped


class TeacherSpace(nn.Module):
    """A student up to a tapped module, pooled and projected: no operator of this package, no parametrization.

    Attributes:
        student: a copy of the student, with a hook on the tapped module.
        projection: the ``nn.Linear`` that the pair's projection and scale were folded into.

    Shape:
        ``forward(*args, **kwargs)``, the student's arguments -> ``(N, T)``, ``(N, tokens, T)`` or ``(N, H, W, T)``.
    """

    def __init__(self, student: nn.Module, pair: Pair, projection: nn.Linear):
        super().__init__()
        self.student = copy.deepcopy(student)
        self.student.requires_grad_(False)
        self.projection = projection.requires_grad_(False)
        self._tap = Tap(pair.side("student"))
        for module, tap in hooks_of("student", self.student, [self._tap]):
            module.register_forward_hook(tap)
        self.eval()

    @torch.no_grad()
    def standardize_over(self, args: tuple, kwargs: dict, *, eps: float) -> None:
        """Folds into the projection what gives every channel mean 0 and variance 1 over this batch."""
        variance, mean = torch.var_mean(self(*args, **kwargs).flatten(0, -2).double(), dim=0, correction=0)
        factor = torch.rsqrt(variance + eps)
        weight, bias = self.projection.weight, self.projection.bias
        shift = -mean if bias is None else bias - mean
        self.projection.bias = nn.Parameter((shift * factor).to(weight.dtype), requires_grad=False)
        weight.mul_(factor[:, None].to(weight.dtype))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        _, calls = run_tapped(lambda: self.student(*args, **kwargs), {"": self._tap})
        returned = self._tap.chosen(calls[""])
        if returned is None:
            raise RuntimeError(self._tap.missing(self.student, calls[""]))
        features = pooled(self._tap.side, returned.value, None).values
        return self.projection(features.to(self.projection.weight.dtype))
