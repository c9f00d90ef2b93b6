"""A store in the teacher's place: the features of a batch come from the disk, by the samples' indices."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import checks
from ..ops.tracing import not_traced
from ..pairs import Pair
from ..pooling import MEANS, Rows, check_samples_of, grid_of, of_positions
from ..taps import Selected
from ..teachers import TeacherAnswer, TeacherCall, TeacherSource
from .functions import check_one_function
from .reader import FeatureStore


@dataclass(frozen=True)
class StoredAnswer(TeacherAnswer):
    store: FeatureStore
    keys: Mapping[str, str]  # of the store's features, by the pair's name
    features: Mapping[str, torch.Tensor]  # by key

    def rows(self, pair: Pair, mask: torch.Tensor | None) -> Rows:
        features = self.features[self.keys[pair.name]]
        return Rows(features, stored_mask(pair, features, mask), grid_of(pair.side("teacher"), features))

    def output(self, teacher: str) -> Any:
        outputs = {tap.output: self.features[key] for key, tap in self.store.taps.items() if tap.is_output}
        if not outputs:
            raise ValueError(
                f"the store in {self.store.folder} has no outputs of the teacher, which logit_weight needs: build one "
                'with {"teacher": ""} among the taps'
            )
        return outputs[None] if None in outputs else Selected(outputs)


class StoredTeacher(TeacherSource):
    """What ``store[indices]`` gives, or features that a ``DataLoader`` has read, as ``teacher_input``.

    ``name``: what messages call it, where there are others beside it.
    """

    stored = True

    def __init__(self, store: FeatureStore, pairs: Sequence[Pair], name: str = ""):
        self.store = store
        self.input = f"teacher_input[{name!r}]" if name else "teacher_input"
        self.keys = {pair.name: store.key_of(pair) for pair in pairs}
        first: dict[str, Pair] = {}  # by key
        for pair in pairs:
            check_one_function(first.setdefault(self.keys[pair.name], pair), pair)

    @property
    def teacher(self) -> FeatureStore:
        return self.store

    def answer(self, call: TeacherCall) -> StoredAnswer:
        if (call.indices is None) == (call.teacher_input is None):
            given = "neither" if call.indices is None else "both"
            raise TypeError(
                f"with a FeatureStore, forward needs indices=, those of the batch's samples, or {self.input}, what "
                f"store[indices] gave for them; got {given}"
            )
        features = self.read(call.indices) if call.teacher_input is None else call.teacher_input
        if not isinstance(features, Mapping) or not {*self.keys.values()} <= {*features}:
            raise TypeError(
                f"{self.input} must be features by name, as store[indices] gives them; got {checks.describe(features)}"
            )
        return StoredAnswer(self.store, self.keys, features)

    def example(self, call: TeacherCall) -> TeacherCall:
        """Features of as many samples as the student's example has."""
        if call.indices is not None or call.teacher_input is not None:
            return call
        return TeacherCall(arguments=call.arguments, indices=[0] * call.samples())

    @not_traced
    def read(self, indices: Any) -> dict[str, torch.Tensor]:
        return self.store[indices if isinstance(indices, torch.Tensor) else list(indices)]

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor], of_student: Collection[torch.device]) -> None:
        """Stored features stay on the CPU; those of a batch go where the student's are."""


def stored_mask(pair: Pair, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of stored rows, from one of the samples (N,) or of the positions that the tap had."""
    pool = pair.teacher_pool
    if mask is None or pool is None or callable(pool):
        return mask
    check_samples_of(mask, pair.side("teacher"), features)
    if mask.dim() == 1:
        return of_positions(mask, features)
    if pool == "class_token":
        return mask[:, 0]
    if pool in MEANS:
        raise ValueError(
            f"masks[{pair.name!r}]: the teacher's means were taken when the store was built, so that a mask of their "
            f"positions comes too late. Give mask= to FeatureStore.build, and here (mask, None): the student's alone; "
            f"got {checks.describe(mask)}"
        )
    return mask[:, pair.teacher_skip :] if pool == "tokens" else mask
