"""``Pair``: which student module learns from which module of the teacher, and by which loss."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .ops import checks
from .ops.ortho_proj_loss import api
from .projection import check_projection

SIDES = ("student", "teacher")
POOLINGS = (None, "class_token", "mean_tokens", "tokens", "spatial_mean", "spatial")
LAYOUTS = ("NCHW", "NHWC")


@dataclasses.dataclass(frozen=True)
class Side:
    """The fields of a ``Pair`` for its student or for its teacher."""

    side: str  # "student" or "teacher"
    pair: str  # its name
    module: str
    pool: str | Callable | None
    skip: int
    output: int | str | tuple | None
    call: int | None
    grid: tuple[int, int] | None
    layout: str

    @property
    def where(self) -> str:
        """How a message names what the module returned."""
        return f"pair {self.pair!r}: the output of {self.side} module {self.module!r}"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One student module and the teacher module it learns from; ``FeatureDistiller`` also takes a dict of the fields.

    Args:
        student, teacher: names of modules, as ``named_modules()`` gives them; ``""`` is the model itself.
        student_pool, teacher_pool: ``"class_token"`` (the first), ``"mean_tokens"`` or ``"tokens"`` of an output
            ``(N, tokens, C)``; ``"spatial_mean"`` or ``"spatial"`` of a map; ``None`` of ``(N, C)``; or a function from
            whatever the module returned to rows ``(..., C)``.
        student_skip, teacher_skip: leading tokens (class, registers) that ``"mean_tokens"`` and ``"tokens"`` leave out.
        student_output, teacher_output: which entry of an output that is a tuple, a dict, a dataclass or a Hugging Face
            output; a path for one inside of another, ``("hidden_states", 3)``.
        student_call, teacher_call: which call of a module that runs several times in a pass; 0 the first, -1 the last.
        student_layout, teacher_layout: of maps: ``"NCHW"``, or ``"NHWC"`` as Swin's.
        student_grid, teacher_grid: ``(H, W)`` of ``"tokens"`` that are a map: see docs/distiller.md for the default.
        resample: ``"student"`` or ``"teacher"``: whose map is resampled (bilinear, antialiased) to the other's size.
        optional: whether the pair counts as 0 in a step in which one of its modules did not run, as with LayerDrop.
        dims: ``(S, T)``, the channels of both sides; needed only without an ``example_input``.
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
    student_output: int | str | tuple | None = None
    teacher_output: int | str | tuple | None = None
    dims: tuple[int, int] | None = None
    resample: str | None = None
    weight: float = 1.0
    normalization: str | nn.Module = "layer_norm"
    loss: str | Mapping[str, float] = "smooth_l1"
    beta: float = 1.0
    eps: float = 1e-5
    scale: float | str = 1.0
    projection: str = "orthogonal"
    name: str = ""
    student_call: int | None = None
    teacher_call: int | None = None
    student_layout: str = "NCHW"
    teacher_layout: str = "NCHW"
    student_grid: tuple[int, int] | None = None
    teacher_grid: tuple[int, int] | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        for side in map(self.side, SIDES):
            _check_side(side)
        checks.check_choice("resample", self.resample, (None, *SIDES))
        checks.check_number("weight", self.weight)
        api.check_options(self.normalization, self.loss, self.beta, self.eps, "mean")
        check_projection(self.projection)
        if self.dims is not None and (not isinstance(self.dims, (tuple, list)) or len(self.dims) != 2):
            raise TypeError(f"dims must be (student's channels, teacher's channels); got {self.dims!r}")
        for dim in self.dims or ():
            checks.check_dim("dims", dim)
        if not isinstance(self.optional, bool):
            raise TypeError(f"optional must be True or False; got {checks.describe(self.optional)}")
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string; got {checks.describe(self.name)}")
        object.__setattr__(self, "name", self.name or f"{self.student}->{self.teacher}")

    def side(self, side: str) -> Side:
        """The fields of ``"student"`` or ``"teacher"``."""
        return Side(
            side=side,
            pair=self.name,
            module=getattr(self, side),
            pool=getattr(self, f"{side}_pool"),
            skip=getattr(self, f"{side}_skip"),
            output=getattr(self, f"{side}_output"),
            call=getattr(self, f"{side}_call"),
            grid=getattr(self, f"{side}_grid"),
            layout=getattr(self, f"{side}_layout"),
        )


def _check_side(side: Side) -> None:
    name = side.side
    if not isinstance(side.module, str):
        raise TypeError(f"{name} must be the name of a module; got {checks.describe(side.module)}")
    if not callable(side.pool):
        checks.check_choice(f"{name}_pool", side.pool, POOLINGS)
    if not isinstance(side.skip, int) or side.skip < 0:
        raise ValueError(f"{name}_skip must be an int >= 0; got {checks.describe(side.skip)}")
    steps = side.output if isinstance(side.output, tuple) else (side.output,)
    if side.output is not None and not all(isinstance(step, (int, str)) for step in steps):
        raise TypeError(
            f"{name}_output must be an int, a string or a tuple of them; got {checks.describe(side.output)}"
        )
    if side.call is not None and (isinstance(side.call, bool) or not isinstance(side.call, int)):
        raise TypeError(f"{name}_call must be None or an int; got {checks.describe(side.call)}")
    checks.check_choice(f"{name}_layout", side.layout, LAYOUTS)
    if side.grid is not None:
        if not isinstance(side.grid, (tuple, list)) or len(side.grid) != 2:
            raise TypeError(f"{name}_grid must be (H, W); got {checks.describe(side.grid)}")
        for size in side.grid:
            checks.check_dim(f"{name}_grid", size)


def check_pool(side: Side, model: nn.Module) -> None:
    """An error for a module as a pool, not of the model, that would have to be trained or set to eval mode with it."""
    if not isinstance(side.pool, nn.Module):
        return
    parts = {*map(id, model.modules())}
    name = f"pair {side.pair!r}: {side.side}_pool is a {type(side.pool).__name__}"
    for part in side.pool.modules():
        if id(part) in parts:
            continue
        has_mode = isinstance(part, nn.modules.dropout._DropoutNd) or getattr(part, "track_running_stats", False)
        if side.side == "teacher":
            if has_mode and part.training:
                raise ValueError(f"{name}, whose {type(part).__name__} is in training mode: call eval() of it")
            continue
        state = {key for key, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))}
        if has_mode or state - part._non_persistent_buffers_set:
            raise TypeError(
                f"{name}, whose {type(part).__name__} would be neither trained, saved nor moved. Give a function "
                "without state, or make the module a part of the student and tap it there"
            )


def as_pairs(pairs: Sequence[Mapping[str, Any] | Pair]) -> tuple[Pair, ...]:
    """What a caller gave as pairs, checked: ``Pair`` objects with names that differ."""
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, (Mapping, Pair)) for pair in pairs):
        raise TypeError(
            f"pairs must be a list of dicts with the fields of Pair, or of Pairs; got {checks.describe(pairs)}"
        )
    checked = tuple(pair if isinstance(pair, Pair) else Pair(**pair) for pair in pairs)
    names = [pair.name for pair in checked]
    reserved = [name for name in names if name in ("logits", "total") or name.startswith("logits:")]
    if len({*names}) < len(names) or reserved:
        raise ValueError(
            "pairs must have names of their own, other than 'logits', 'total' and those that begin with 'logits:'; got "
            f"{names}"
        )
    return checked
