"""``Pair``: which student module learns from which module of the teacher, and by which loss."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .ops import checks
from .ops.ortho_proj_loss import api
from .projection import check_projection

SIDES = ("student", "teacher")
POOLINGS = {  # the layout that each takes
    None: "(N, C)",
    "class_token": "(N, tokens, C)",
    "mean_tokens": "(N, tokens, C)",
    "tokens": "(N, tokens, C)",
    "spatial_mean": "(N, C, H, W)",
    "spatial": "(N, C, H, W)",
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One student module and the teacher module it learns from; ``FeatureDistiller`` also takes a dict of the fields.

    Args:
        student, teacher: names of modules, as ``named_modules()`` gives them; ``""`` is the model itself.
        student_pool, teacher_pool: ``"class_token"`` (the first), ``"mean_tokens"`` or ``"tokens"`` of an output
            ``(N, tokens, C)``; ``"spatial_mean"`` or ``"spatial"`` of ``(N, C, H, W)``; ``None`` of ``(N, C)``; or a
            function from any other output to rows ``(..., C)``.
        student_skip, teacher_skip: leading tokens (class, registers) that ``"mean_tokens"`` and ``"tokens"`` leave out.
        student_output, teacher_output: which entry of an output that is a tuple, a dict or a Hugging Face output.
        dims: ``(S, T)``, the channels of both sides; needed only without an ``example_input``.
        resample: ``"student"`` or ``"teacher"``: whose map is resampled (bilinear, antialiased) to the other's size.
        weight: of this pair in the total.
        normalization, loss, beta, eps, scale, projection: see ``OrthoProjLoss``.
        name: of this pair among the losses and in the state dict; ``"<student>-><teacher>"`` if empty.

    Example:
        >>> import vkd_kernels as vk
        >>> vk.Pair("norm", "layer4", student_pool="mean_tokens", student_skip=1, teacher_pool="spatial_mean").name
        'norm->layer4'
    """

    student: str
    teacher: str
    student_pool: str | Callable | None = None
    teacher_pool: str | Callable | None = None
    student_skip: int = 0
    teacher_skip: int = 0
    student_output: int | str | None = None
    teacher_output: int | str | None = None
    dims: tuple[int, int] | None = None
    resample: str | None = None
    weight: float = 1.0
    normalization: str = "layer_norm"
    loss: str = "smooth_l1"
    beta: float = 1.0
    eps: float = 1e-5
    scale: float | str = 1.0
    projection: str = "orthogonal"
    name: str = ""

    def __post_init__(self) -> None:
        for side in SIDES:
            name, pool, skip = (getattr(self, side + field) for field in ("", "_pool", "_skip"))
            if not isinstance(name, str):
                raise TypeError(f"{side} must be the name of a module; got {checks.describe(name)}")
            if not callable(pool):
                checks.check_choice(f"{side}_pool", pool, POOLINGS)
            if not isinstance(skip, int) or skip < 0:
                raise ValueError(f"{side}_skip must be an int >= 0; got {checks.describe(skip)}")
        checks.check_choice("resample", self.resample, (None, *SIDES))
        checks.check_number("weight", self.weight)
        api.check_options(self.normalization, self.loss, self.beta, self.eps, "mean")
        check_projection(self.projection)
        if self.dims is not None and (not isinstance(self.dims, (tuple, list)) or len(self.dims) != 2):
            raise TypeError(f"dims must be (student's channels, teacher's channels); got {self.dims!r}")
        for dim in self.dims or ():
            checks.check_dim("dims", dim)
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string; got {checks.describe(self.name)}")
        object.__setattr__(self, "name", self.name or f"{self.student}->{self.teacher}")


def as_pairs(pairs: Sequence[Mapping[str, Any] | Pair]) -> tuple[Pair, ...]:
    """What a caller gave as pairs, checked: ``Pair`` objects with names that differ."""
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, (Mapping, Pair)) for pair in pairs):
        raise TypeError(
            f"pairs must be a list of dicts with the fields of Pair, or of Pairs; got {checks.describe(pairs)}"
        )
    checked = tuple(pair if isinstance(pair, Pair) else Pair(**pair) for pair in pairs)
    names = [pair.name for pair in checked]
    if len({*names, "logits", "total"}) < len(names) + 2:
        raise ValueError(f"pairs must have names of their own, other than 'logits' and 'total'; got {names}")
    return checked
