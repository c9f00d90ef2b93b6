"""The losses of a distiller's pairs: their modules by name, those of equal shape and options computed together."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from .loss import OrthoProjLoss
from .ops.ortho_proj_loss import api
from .pairs import Pair
from .pooling import ComparedRows
from .projection import stacked_weights

SHAPE_KEYED = re.compile(r"projections\.(\d+x\d+)\.(unconstrained|map\.signs)|scales\.(\d+)")


@dataclass(frozen=True)
class ShapeGroup:
    """Pairs whose projections, of one kind and shape, are computed in one call."""

    names: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]  # the same names: those of equal options, whose losses are one call


def state_name(name: str) -> str:
    """A pair's name as it stands in a state dict: ``blocks.3->norm`` is ``[blocks%2E3->norm]``.

    A dot would start a submodule, and without the brackets a name could be that of an attribute of ``nn.Module``.
    """
    return "[" + name.replace("%", "%25").replace(".", "%2E") + "]"


class PairLosses(nn.ModuleDict):
    """An ``OrthoProjLoss`` for every pair, by the pair's name: the order of pairs has no part in the state dict."""

    def __init__(self, pairs: Sequence[Pair], dims: Sequence[tuple[int, int]], **options: Any):
        super().__init__()
        by_shape: dict[tuple[str, int, int], dict[tuple, list[str]]] = {}
        for pair, (student_dim, teacher_dim) in zip(pairs, dims, strict=True):
            loss = self[state_name(pair.name)] = OrthoProjLoss(
                student_dim,
                teacher_dim,
                normalization=pair.normalization,
                loss=pair.loss,
                beta=pair.beta,
                scale=pair.scale,
                eps=pair.eps,
                projection=pair.projection,
                **options,
            )
            shape = pair.projection, student_dim, teacher_dim
            by_shape.setdefault(shape, {}).setdefault((loss.spec, pair.scale), []).append(pair.name)
        self.shapes = tuple(
            ShapeGroup(
                names=tuple(name for names in kinds.values() for name in names),
                groups=tuple(map(tuple, kinds.values())),
            )
            for kinds in by_shape.values()
        )

    def of(self, name: str) -> OrthoProjLoss:
        """The loss of the pair of that name."""
        return self[state_name(name)]  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        for loss in self.values():
            loss.reset_parameters()  # type: ignore[operator]

    def forward(
        self, rows: Mapping[str, ComparedRows], process_group: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss () and the projection (T, S) of every pair, by name."""
        self._check_channels(rows)
        if self.training:
            for name, compared in rows.items():
                loss = self.of(name)
                if not compared.skipped:
                    loss.watch.look(f"pair {name!r}", compared.student, loss.projection)
        losses: dict[str, torch.Tensor] = {}
        projections: dict[str, torch.Tensor] = {}
        for shape in self.shapes:
            weights = stacked_weights([self.of(name).projection for name in shape.names])  # (G, T, S)
            projections |= dict(zip(shape.names, weights.unbind(0), strict=True))
            for group in shape.groups:
                if len(group) < len(shape.names):
                    weights = torch.stack([projections[name] for name in group])
                entries = [(self.of(name), rows[name]) for name in group]
                losses |= dict(zip(group, _losses_of_group(entries, weights, process_group), strict=True))
        return losses, projections

    def masked_row(self, name: str) -> ComparedRows:
        """In place of a pair that was skipped: its loss is 0, and it takes part in every collective, also backward."""
        loss = self.of(name)
        like = next(chain(loss.parameters(), loss.buffers()))
        student, teacher = (like.new_zeros(1, dim) for dim in (loss.student_dim, loss.teacher_dim))
        mask = torch.zeros(1, dtype=torch.bool, device=like.device)
        return ComparedRows(student, teacher, mask, skipped=True)

    def _check_channels(self, rows: Mapping[str, ComparedRows]) -> None:
        for name, compared in rows.items():
            loss = self.of(name)
            if (compared.teacher.shape[-1], compared.student.shape[-1]) != (loss.teacher_dim, loss.student_dim):
                raise ValueError(
                    f"pair {name!r}: its projection is {loss.teacher_dim}x{loss.student_dim} (teacher x student "
                    f"channels); got student rows of shape {tuple(compared.student.shape)} and teacher rows of shape "
                    f"{tuple(compared.teacher.shape)}"
                )


def _losses_of_group(
    entries: list[tuple[OrthoProjLoss, ComparedRows]],
    weights: torch.Tensor,  # (G, T, S)
    process_group: Any,
) -> Sequence[torch.Tensor]:
    first = entries[0][0]
    students = _of_one_dtype([rows.student for _, rows in entries])
    teachers = _of_one_dtype([rows.teacher for _, rows in entries])
    masks = [rows.mask for _, rows in entries]
    options: dict[str, Any] = {"spec": first.spec, "execution": first.execution(process_group)}
    scale: float | torch.Tensor = first.scale
    if isinstance(scale, torch.Tensor):
        scale = torch.cat([loss.scale for loss, _ in entries])  # type: ignore[misc]
    if len(entries) == 1:
        scale = scale[0] if isinstance(scale, torch.Tensor) else scale
        return [api.projected_loss(students[0], teachers[0], weights[0], scale=scale, mask=masks[0], **options)]
    return api.projected_losses(students, teachers, weights, scale=scale, masks=masks, **options).unbind(0)


def _of_one_dtype(features: list[torch.Tensor]) -> list[torch.Tensor]:
    """Under autocast some modules return 16 bit and others float32: the wider one for a whole group."""
    dtype = features[0].dtype
    for x in features[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in features]


def converted_state_dict(
    state_dict: Mapping[str, Any], names: Sequence[str], losses: PairLosses, prefix: str
) -> dict[str, Any]:
    """A state dict of before 0.1, which knew projections by shape and order, with the pairs' names in its keys.

    ``names``: those of the pairs, in the order that they had when it was saved.
    """
    by_shape: dict[str, list[str]] = {}
    for name in names:
        loss = losses.of(name)
        by_shape.setdefault(f"{loss.teacher_dim}x{loss.student_dim}", []).append(name)
    converted: dict[str, Any] = {}
    for key, value in state_dict.items():
        match = SHAPE_KEYED.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if match is None:
            converted[key] = value
            continue
        shape, entry, index = match.groups()
        if index is not None:
            if int(index) >= len(names):
                raise ValueError(f"{key} is the scale of pair {index}, but names has {len(names)} entries: {[*names]}")
            converted[f"{prefix}pair_losses.{state_name(names[int(index)])}.scale"] = value
            continue
        owners = by_shape.get(shape, [])
        if len(owners) != len(value):
            raise ValueError(f"{key} has {len(value)} projections, but of names these have the shape: {owners}")
        for name, own in zip(owners, value, strict=True):
            converted[f"{prefix}pair_losses.{state_name(name)}.projection.{entry}"] = own
    return converted


def convert_when_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
    """``FeatureDistiller``'s hook before loading: projections without a name find their pair, or an error says so."""
    keys = [key for key in state_dict if key.startswith(prefix) and SHAPE_KEYED.fullmatch(key.removeprefix(prefix))]
    if not keys:
        return
    error_messages: list[str] = arguments[-1]
    losses: PairLosses = module.pair_losses  # type: ignore[assignment]
    names = [name for shape in losses.shapes for name in shape.names]
    try:
        shared = any(".unconstrained" in key and len(state_dict[key]) > 1 for key in keys)
        if shared or (len(names) > 1 and any(key.startswith(f"{prefix}scales.") for key in keys)):
            raise ValueError("they don't say which pair is which")
        converted = converted_state_dict(state_dict, names, losses, prefix)
    except ValueError as reason:
        error_messages.append(
            f"{', '.join(map(repr, keys))} are of a commit before 0.1, which kept projections by shape in the order of "
            f"the pairs: {reason}. Load distiller.converted_state_dict(state_dict, names) with the names of the pairs "
            "in the order that they had then."
        )
        for key in keys:
            del state_dict[key]
        return
    state_dict.clear()
    state_dict.update(converted)
