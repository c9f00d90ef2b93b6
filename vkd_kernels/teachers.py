"""Where the teacher's side of the pairs comes from: ``TeacherSource``, and the frozen models that are one."""

import abc
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from .images import different_normalization
from .ops import checks
from .ops.tracing import constant_result
from .pairs import Pair, check_pool
from .pooling import Rows
from .taps import (
    Returned,
    Tap,
    TapError,
    as_arguments,
    hooks_of,
    is_compiled,
    moved,
    run_tapped,
    share_memory,
    tensors_in,
)


@dataclass(frozen=True)
class TeacherCall:
    """What a step gives to the teacher."""

    arguments: tuple[tuple, dict]  # the student's
    teacher_input: Any = None  # in their place
    indices: Any = None  # of the samples, for stored features
    versions: Sequence[tuple[torch.Tensor, int]] = ()  # of what models were given that ran before (taps.versions_of)

    def samples(self) -> int:
        """How many the student's arguments hold."""
        tensors = tensors_in(self.arguments)
        if not (tensors and tensors[0].dim()):
            raise ValueError("example_input must hold a batch in tensors; without it, give every pair dims=(S, T)")
        return len(tensors[0])

    def check_unchanged(self, given: Any, where: str) -> None:
        """An error where a model that ran before changed what this teacher is given."""
        changed = [x for x, version in self.versions if x._version != version]
        if changed and any(share_memory(x, y) for x in tensors_in(given) for y in changed):
            raise RuntimeError(
                f"the batch was changed in place before {where} saw it, by the student or another teacher "
                "(x.sub_(mean), a first layer with inplace=True). Let that model change a copy, or give this one a "
                "batch of its own by teacher_input"
            )


class TeacherAnswer(abc.ABC):
    """A teacher's features and outputs for one batch."""

    @abc.abstractmethod
    def rows(self, pair: Pair, mask: torch.Tensor | None) -> Rows | None:
        """The teacher's side of the pair; None where the pair is optional and its module did not run."""

    @abc.abstractmethod
    def output(self, teacher: str) -> Any:
        """What the teacher of that name returned, for the logit loss; ``""`` where there is one teacher."""


class TeacherSource(abc.ABC):
    """Gives the teacher's side of every pair: frozen models, or features that were stored.

    A source is no submodule: the distiller's parameters and state dict leave it out.
    """

    @abc.abstractmethod
    def answer(self, call: TeacherCall) -> TeacherAnswer:
        """The features of a batch, without gradients."""

    stored = False  # whether it reads features by ``indices``

    @property
    @abc.abstractmethod
    def teacher(self) -> Any:
        """What the user gave as the teacher."""

    def example(self, call: TeacherCall) -> TeacherCall:
        """What to answer beside an example input of the student's."""
        return call

    def taps(self) -> list[tuple[nn.Module, Tap]]:
        """The modules that need a hook during ``answer``."""
        return []

    def names(self) -> list[str]:
        """The teachers' names: ``[""]`` where there is one."""
        return [""]

    def teacher_of(self, pair: Pair) -> str:
        """The name of the teacher that the pair learns from."""
        return ""

    def compiled(self) -> bool:
        """Whether hooks must stay on, because ``torch.compile`` does not look for new ones."""
        return False

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor], of_student: Collection[torch.device]) -> None:
        """Follows the distiller's ``.to()``: fn maps a tensor as ``nn.Module._apply`` does.

        ``of_student`` is where student and projections were before.
        """
        return


class FrozenTeacher:
    """One model, frozen in place: no gradients, eval mode in every module, its own dtype and device."""

    def __init__(self, name: str, model: nn.Module, student: nn.Module):
        if not isinstance(model, nn.Module):
            where = f"teacher[{name!r}]" if name else "teacher"
            raise TypeError(f"{where} must be a torch.nn.Module; got {checks.describe(model)}")
        self.name, self.model = name, model
        self.where = f"teacher {name!r}" if name else "teacher"
        of_student = {*map(id, chain(student.parameters(), student.modules()))}
        self.shared_parameters = [  # by their owners, as sharding and loading put other tensors in their places
            (f"{name}.{key}".lstrip("."), module, key)
            for name, module in model.named_modules()
            for key, parameter in module.named_parameters(recurse=False)
            if id(parameter) in of_student
        ]
        self._check_shared_parameters()
        for parameter in model.parameters():  # not requires_grad_() of the model, which scripted ones refuse
            parameter.requires_grad_(False)
        self.shared = [module for module in self.modules() if id(module) in of_student]
        with KeptModes(self.shared):
            set_eval_mode(model)
        self.stays = dispatched(model)
        self.said_where = False  # that it is left on the CPU

    def _check_shared_parameters(self) -> None:
        for name, module, key in self.shared_parameters:
            if getattr(module, key).requires_grad:
                raise ValueError(
                    f"{self.where} shares {name!r} with the student, and it requires a gradient: training the student "
                    "would change the teacher. Freeze it in the student, or give the teacher a copy of it"
                )

    def _check_shared_statistics(self) -> None:
        shared = {*map(id, self.shared)}
        for name, module in self.model.named_modules():
            updates = getattr(module, "track_running_stats", False) and module.training  # batch and instance norms
            if updates and id(module) in shared:
                raise ValueError(
                    f"{self.where} shares {name!r}, a {type(module).__name__} in training mode, with the student, "
                    "whose forward pass updates its statistics: set it to eval mode, or give the teacher a copy of it"
                )

    def modules(self) -> list[nn.Module]:
        """Those that have a mode, as they are now: some may have been replaced since the distiller was made."""
        return modules_with_a_mode(self.model)

    def answer(self, args: tuple, kwargs: dict) -> Any:
        """The output. Modules in training mode are set back to eval mode, those shared with the student for a while."""
        self._check_shared_parameters()
        for module in self.modules():
            if module.training:
                self._check_shared_statistics()
                return self._answer_of_eval_mode(args, kwargs)
        return self._answer(args, kwargs)

    def _answer_of_eval_mode(self, args: tuple, kwargs: dict) -> Any:
        with KeptModes(self.shared):
            for module in self.modules():
                if module.training:
                    module.training = False
            return self._answer(args, kwargs)

    def _answer(self, args: tuple, kwargs: dict) -> Any:
        # Lists, because torch.compile of PyTorch 2.8 can't trace next() of a generator with a default.
        dtypes = [parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()]
        devices = [] if self.stays else [tensor.device for tensor in self.tensors()]
        dtype, device = dtypes[0] if dtypes else None, devices[0] if devices else None
        if device is not None and device.type == "meta" and not all(x.is_meta for x in tensors_in((args, kwargs))):
            raise ValueError(
                f"{self.where} is on the meta device and has no values: load its weights by load_state_dict(..., "
                "assign=True), or call to_empty(device=...) of the distiller and load them then"
            )
        if device is not None and device.type == "cpu" and torch.is_grad_enabled() and not self.said_where:
            elsewhere = [x.device.type for x in tensors_in((args, kwargs)) if not x.is_cpu]
            if elsewhere and all(tensor.is_cpu for tensor in self.tensors()):
                self.said_where = True
                warn_of_a_teacher_left_behind(self.name, elsewhere[0])
        with torch.no_grad():
            return self.model(*moved(args, device, dtype), **moved(kwargs, device, dtype))

    def tensors(self) -> Iterator[torch.Tensor]:
        return chain(self.model.parameters(), self.model.buffers())

    def own_tensors(self) -> list[torch.Tensor]:
        """Those that the student does not have as well: a module around the distiller may have moved it already."""
        shared = {*map(id, self.shared)}
        keys = {(id(module), key) for _, module, key in self.shared_parameters}
        return [
            tensor
            for module in self.model.modules()
            if id(module) not in shared
            for key, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            if (id(module), key) not in keys
        ]

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor], of_student: Collection[torch.device]) -> None:
        """To where fn takes tensors from the teacher's device, if the teacher is on one device, not there, and can.

        A teacher on a GPU that the student was not on has been put there, and stays.
        """
        devices = {tensor.device for tensor in self.own_tensors()}
        if len(devices) != 1 or self.stays:
            return
        (device,) = devices
        if device.type not in ("cpu", "meta") and device not in of_student:
            return
        target = fn(torch.empty(0, device=device)).device
        if target == device:
            return
        if device.type == "meta":
            if all(tensor.is_meta for tensor in self.tensors()):
                self.model.to_empty(device=target)
            return
        try:
            self.model.to(target)
        except (ValueError, NotImplementedError) as error:  # as bitsandbytes' models say it
            warnings.warn(
                f"the teacher stays on {device}: it can't be moved to {target} ({error}). Its inputs and features are "
                "moved instead in every step",
                stacklevel=2,
            )
            self.said_where = True


def modules_with_a_mode(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "training")]


def set_eval_mode(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError:  # torch.export's modules compute in the mode that they were exported in
        for module in modules_with_a_mode(model):
            module.training = False


class KeptModes:
    """Gives modules back the mode, training or evaluation, that they had before."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = modules

    def __enter__(self) -> None:
        self.before = [module.training for module in self.modules]

    def __exit__(self, *_: object) -> None:
        for module, training in zip(self.modules, self.before, strict=True):
            module.training = training


def dispatched(model: nn.Module) -> bool:
    """Whether accelerate places it: its hooks move weights and inputs, and nobody else may.

    An ``hf_device_map`` alone says nothing: a model that is loaded to a single device has one, and no hooks.
    """
    return any(hasattr(module, "_hf_hook") for module in model.modules())


@dataclass(frozen=True)
class ModelAnswer(TeacherAnswer):
    model: nn.Module
    returned: Any
    taps: Mapping[str, Tap]  # by the pair's name
    calls: Mapping[str, list[Returned]]  # by the pair's name

    def rows(self, pair: Pair, mask: torch.Tensor | None) -> Rows | None:
        tap, calls = self.taps[pair.name], self.calls[pair.name]
        returned = tap.chosen(calls)
        if returned is not None:
            return tap.rows(returned, mask)
        if pair.optional:
            return None
        raise TapError(tap.missing(self.model, calls))

    def output(self, teacher: str) -> Any:
        return self.returned


class ModelTeacher(TeacherSource):
    """A frozen model that runs on the student's arguments or on inputs of its own.

    ``name``: what messages call it, where there are others beside it.
    """

    def __init__(self, model: nn.Module, pairs: Sequence[Pair], student: nn.Module, name: str = ""):
        self.frozen = FrozenTeacher(name, model, student)
        self.unlike = different_normalization(student, model, name)  # said once, in training
        sides = {pair.name: pair.side("teacher") for pair in pairs}
        for side in sides.values():
            check_pool(side, model)
        self.pair_taps = {name: Tap(side) for name, side in sides.items()}

    @property
    def teacher(self) -> nn.Module:
        return self.frozen.model

    def taps(self) -> list[tuple[nn.Module, Tap]]:
        return hooks_of("teacher", self.teacher, self.pair_taps.values())

    def compiled(self) -> bool:
        return any(is_compiled(module) for module in self.frozen.modules())

    def answer(self, call: TeacherCall) -> ModelAnswer:
        given = call.teacher_input
        if call.indices is not None:
            raise TypeError("indices are for stored features; this teacher is a model")
        if self.unlike and given is None and torch.is_grad_enabled():
            warn_of_images(self.unlike)
            self.unlike = ""
        args, kwargs = call.arguments if given is None else as_arguments(given)
        call.check_unchanged((args, kwargs), self.frozen.where)
        returned, calls = run_tapped(lambda: self.frozen.answer(args, kwargs), self.pair_taps)
        return ModelAnswer(self.teacher, returned, self.pair_taps, calls)

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor], of_student: Collection[torch.device]) -> None:
        self.frozen.move(fn, of_student)


@constant_result  # said while torch.compile traces, at no cost afterwards
def warn_of_images(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@constant_result
def warn_of_a_teacher_left_behind(name: str, device: str) -> None:
    which, of_name = (f"teacher {name!r}", f"[{name!r}]") if name else ("teacher", "")
    warnings.warn(
        f"{which} computes on the CPU, while its inputs come from {device}: they are moved there and its features back "
        f"in every step. distiller.teacher{of_name}.to(device) moves it; fully_shard and student.to(device) don't",
        stacklevel=2,
    )
