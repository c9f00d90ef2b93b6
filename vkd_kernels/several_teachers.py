"""Several teachers, ``{"dino": model, "clip": store}``: each is a source of its own, for the pairs that name it."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .ops import checks
from .pairs import Pair
from .pooling import Rows
from .taps import Tap, versions_of
from .teachers import TeacherAnswer, TeacherCall, TeacherSource


@dataclass(frozen=True)
class SeveralAnswers(TeacherAnswer):
    answers: Mapping[str, TeacherAnswer]  # by the teacher's name
    pairs: Mapping[str, tuple[str, Pair]]  # by the pair's name: its teacher, and the pair as that teacher knows it

    def rows(self, pair: Pair, mask: torch.Tensor | None) -> Rows | None:
        teacher, own = self.pairs[pair.name]
        return self.answers[teacher].rows(own, mask)

    def output(self, teacher: str) -> Any:
        return self.answers[teacher].output("")


class SeveralTeachers(TeacherSource):
    """``source_of`` makes the source of one teacher, from its name, what the user gave, and its pairs."""

    def __init__(
        self,
        teachers: Mapping[str, Any],
        pairs: Sequence[Pair],
        source_of: Callable[[str, Any, list[Pair]], TeacherSource],
    ):
        if not (teachers and all(isinstance(name, str) and name for name in teachers)):
            raise ValueError(f"teacher must be a model or map names to models; got {checks.describe(teachers)}")
        self.pairs: dict[str, tuple[str, Pair]] = {}
        for pair in pairs:
            name, module = teacher_and_module(pair, [*teachers])
            self.pairs[pair.name] = name, dataclasses.replace(pair, teacher=module)
        own = {name: [pair for teacher, pair in self.pairs.values() if teacher == name] for name in teachers}
        self.sources = {name: source_of(name, teacher, own[name]) for name, teacher in teachers.items()}
        self.stored = any(source.stored for source in self.sources.values())

    @property
    def teacher(self) -> dict[str, Any]:
        return {name: source.teacher for name, source in self.sources.items()}

    def names(self) -> list[str]:
        return [*self.sources]

    def teacher_of(self, pair: Pair) -> str:
        return self.pairs[pair.name][0]

    def answer(self, call: TeacherCall) -> SeveralAnswers:
        inputs = {} if call.teacher_input is None else call.teacher_input
        if not isinstance(inputs, Mapping):
            names, what = ", ".join(map(repr, self.sources)), "inputs or features" if self.stored else "inputs"
            raise TypeError(f"teacher_input must map {names} to {what}; got {checks.describe(inputs)}")
        for name in inputs:
            checks.check_choice("a key of teacher_input", name, self.names())
        if call.indices is not None and not self.stored:
            raise TypeError("indices are for stored features; these teachers are models")
        to_read = self._to_read(inputs)
        if call.indices is not None and not to_read:
            raise TypeError("indices= are for stored features, and teacher_input has those of every store: give one")
        answers, versions = {}, [*call.versions]
        for name, source in self.sources.items():
            before = versions_of(inputs.get(name))
            own = TeacherCall(
                arguments=call.arguments,
                teacher_input=inputs.get(name),
                indices=call.indices if name in to_read else None,
                versions=versions,
            )
            answers[name] = source.answer(own)
            versions = versions + before
        return SeveralAnswers(answers, self.pairs)

    def _to_read(self, inputs: Mapping[str, Any]) -> set[str]:
        """The stores whose features were not given."""
        return {name for name, source in self.sources.items() if source.stored and inputs.get(name) is None}

    def example(self, call: TeacherCall) -> TeacherCall:
        inputs = call.teacher_input if isinstance(call.teacher_input, Mapping) else {}
        if call.indices is not None or not self._to_read(inputs):
            return call
        return dataclasses.replace(call, indices=[0] * call.samples())

    def taps(self) -> list[tuple[nn.Module, Tap]]:
        return [tap for source in self.sources.values() for tap in source.taps()]

    def compiled(self) -> bool:
        return any(source.compiled() for source in self.sources.values())

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor], of_student: Collection[torch.device]) -> None:
        for source in self.sources.values():
            source.move(fn, of_student)


def teacher_and_module(pair: Pair, names: Sequence[str]) -> tuple[str, str]:
    """``"dino:norm"`` -> ``("dino", "norm")``; ``"dino:"`` is the model itself."""
    name, colon, module = pair.teacher.partition(":")
    if not colon or name not in names:
        raise ValueError(
            f"pair {pair.name!r}: teacher must be 'name:module' with one of the names {', '.join(map(repr, names))} "
            f"('name:' is the model itself); got {pair.teacher!r}"
        )
    return name, module
