"""``FeatureDistiller``: student and teacher on the same input, features of named modules compared, losses added up."""

import fnmatch
import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import diagnostics
from .balance import LossBalance, LossTerm
from .denominators import check_total_rows, entry_of, over_total_rows, share_of_items, weight_of
from .export import TeacherSpace
from .logits import logit_loss, logit_terms, logits_of
from .ops import checks, implementations
from .ops.normalization.all_reduce import HasProcessGroup, share_group
from .ops.ortho_proj_loss import api
from .ops.tracing import not_traced
from .pair_losses import PairLosses, convert_when_loading, converted_state_dict
from .pairs import Pair, as_pairs, check_pool
from .pooling import ComparedRows, compared, masks_of_sides
from .several_teachers import SeveralTeachers
from .store import FeatureStore
from .store.source import StoredTeacher
from .taps import Returned, Tap, TapError, as_arguments, hooks_of, is_compiled, run_tapped, versions_of
from .teachers import KeptModes, ModelTeacher, TeacherAnswer, TeacherCall, TeacherSource
from .turn import Turn


@dataclass(frozen=True)
class Step:
    """The arguments of one forward pass."""

    student: tuple[tuple, dict]
    teacher: TeacherCall
    masks: Mapping[str, Any] = field(default_factory=dict)
    total_rows: float | torch.Tensor | Mapping[str, Any] | None = None
    metrics: bool = False


# Losses and hooks are built from these once: assigning one afterwards would change nothing.
FIXED = ("pairs", "logit_weight", "teacher_weights", "teacher", "reduction", "drop_best", "backend")


class FeatureDistiller(HasProcessGroup, nn.Module):
    r"""Runs a student and its frozen teacher on the same input and compares the features of named modules.

    ::

        total = Σ over pairs of weight · L(student's rows, teacher's rows)  +  logit_weight · τ² KL(teacher ‖ student)

    with L of ``OrthoProjLoss``. Wrap, compile and optimize the distiller, which holds student and projections (not the
    teacher); infer with ``distiller.student``. ``forward(*args, masks=None, teacher_input=None, indices=None,
    total_rows=None, metrics=False, **kwargs)`` -> (student's output, losses: a scalar by each pair's name, ``"logits"``
    and ``"total"``), and with ``metrics`` a third, a flat dictionary (with a process group all ranks must ask for it).
    docs/distiller.md has every argument at length.

    Args:
        student: any module.
        teacher: any module, frozen in place; a ``FeatureStore``; ``{name: either}``, whose pairs say ``"name:module"``.
        pairs: dicts of the fields of ``Pair``, or ``Pair`` objects.
        example_input, example_teacher_input: a tensor, a tuple of arguments or a dict of keyword arguments: one pass
            in eval mode finds the channels. Or give every pair ``dims``.
        logit_weight, temperature: weight and τ of the logit loss; of several teachers ``{name: weight}``. The
            attributes ``weights``, ``{loss: weight}``, and ``temperature`` may be changed from step to step.
        student_logits, teacher_logits: which entry of an output that is no tensor (by default ``"logits"``), or a
            function of the output.
        balance: ``"running_mean"`` divides every loss by its running mean.
        teacher_weights, drop_best: ``{name: weight}``; the share of steps without the teacher of the smallest loss.
        reduction, process_group, backend: see ``OrthoProjLoss``; the logit loss is global, too.
        device, dtype: of the projections, float32 or float64; by default as the student's (16 bit: float32).

    Example:
        >>> import torch, vkd_kernels as vk
        >>> from torch import nn
        >>> student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> teacher = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
        >>> images = torch.randn(4, 3, 8, 8)
        >>> pair = {"student": "1", "teacher": "1", "student_pool": "spatial_mean", "teacher_pool": "spatial_mean"}
        >>> distiller = vk.FeatureDistiller(student, teacher, [pair], example_input=images, logit_weight=1.0)
        >>> optimizer = torch.optim.AdamW(distiller.parameter_groups(weight_decay=0.05), lr=1e-3)
        >>> output, losses = distiller(images)
        >>> sorted(losses)
        ['1->1', 'logits', 'total']
        >>> losses["total"].backward()
    """

    accepts_loss_kwargs = False  # Trainer must divide the loss by its accumulation steps: it isn't done here

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Mapping[str, nn.Module] | FeatureStore,
        pairs: Sequence[Mapping[str, Any] | Pair],
        *,
        example_input: Any = None,
        example_teacher_input: Any = None,
        logit_weight: float | Mapping[str, float] | None = None,
        temperature: float = 1.0,
        reduction: str = "mean",
        student_logits: int | str | tuple | Callable | None = None,
        teacher_logits: int | str | tuple | Callable | None = None,
        teacher_weights: Mapping[str, float] | None = None,
        balance: str | None = None,
        drop_best: float = 0.0,
        process_group: "dist.ProcessGroup | None" = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a torch.nn.Module; got {checks.describe(student)}")
        self.pairs = as_pairs(pairs)
        projects = any(pair.projection != "identity" or pair.scale == "learned" for pair in self.pairs)
        parallel = nn.parallel.DistributedDataParallel
        wrappers = (nn.DataParallel, parallel) if projects else (nn.DataParallel,)
        if any(isinstance(part, wrappers) for part in student.modules()):
            raise ValueError(
                "wrap the distiller in DistributedDataParallel, not the student: beside the wrapped student each rank "
                "would train a projection of its own, and nn.DataParallel is not supported. Give the distiller the "
                "student itself, ddp.module"
            )
        for option, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            if isinstance(logits, nn.Module):
                raise TypeError(f"{option} must not be a module, which would be trained: give a function that calls it")
            if not (logits is None or isinstance(logits, (int, str, tuple)) or callable(logits)):
                raise TypeError(
                    f"{option} must be an entry's name, position or path, or a function of the output, and is the same "
                    f"for all teachers; got {checks.describe(logits)}"
                )
        checks.check_number("temperature", temperature, above=0)
        checks.check_choice("reduction", reduction, api.REDUCTIONS)
        implementations.requested("ortho_proj_loss", backend)
        self.temperature, self.reduction = temperature, reduction
        self.student_logits, self.teacher_logits = student_logits, teacher_logits
        self._set_group(process_group)
        self.backend = backend
        self.student = student
        self.source = as_source(teacher, self.pairs, student)
        self.logit_terms = logit_terms(logit_weight, self.source.names())
        if not self.pairs and not self.logit_terms:
            raise ValueError(f"pairs must not be empty without a logit_weight: there must be a loss; got {pairs}")
        for pair in self.pairs:
            check_pool(pair.side("student"), student)
        self._taps = {pair.name: Tap(pair.side("student")) for pair in self.pairs}
        self._handles: list = []
        self._hooked: list[nn.Module] = []
        self._attached_before: list[bool] = []  # where each `with` began
        self._attached = False  # Dynamo can read it, which it can't the handles
        self._turn = Turn()
        self._modules_and_taps()  # are the names right?

        parameter = next(student.parameters(), torch.empty(0))
        device = parameter.device if device is None else torch.device(device)
        self.terms = (*self._pair_terms(teacher_weights), *self.logit_terms)
        self.weights = {term.name: term.weight for term in self.terms}
        self.balance = LossBalance(self.terms, balance, drop_best, device)
        if reduction == "sum" and (balance is not None or drop_best):
            raise ValueError("balance and drop_best compare the means of losses: they need reduction='mean'; got 'sum'")
        self.pair_losses = PairLosses(
            self.pairs,
            self._dims(example_input, example_teacher_input),
            reduction=reduction,
            backend=backend,
            device=device,
            dtype=torch.promote_types(parameter.dtype, torch.float32) if dtype is None else dtype,
        )
        self.register_load_state_dict_pre_hook(convert_when_loading)
        if self._compiled():
            self.attach()

    def _set_group(self, group: "dist.ProcessGroup | None") -> None:
        before = self.process_group
        super()._set_group(group)
        for pair in self.pairs:
            share_group(pair.normalization, group, before=before)

    @property
    def teacher(self) -> Any:
        """The teacher; with several ``{name: teacher}``."""
        return self.source.teacher

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and "terms" in self.__dict__:
            raise AttributeError(
                f"{name} of a distiller is fixed when it is made: make another one. The weights of the losses may "
                f"change, as in weights[{self.terms[0].name!r}] = 0.5"
            )
        super().__setattr__(name, value)

    def _pair_terms(self, teacher_weights: Mapping[str, float] | None) -> list[LossTerm]:
        names = self.source.names()
        for name, weight in (teacher_weights or {}).items():
            checks.check_choice("a key of teacher_weights", name, names)
            checks.check_number("teacher_weights", weight)
        terms = []
        for pair in self.pairs:
            teacher = self.source.teacher_of(pair)
            weight = pair.weight * (teacher_weights or {}).get(teacher, 1.0)
            terms.append(LossTerm(name=pair.name, teacher=teacher, weight=weight))
        return terms

    def export(self, name: str, *, calibration_input: Any = None) -> TeacherSpace:
        """The student as a plain module whose output is the pair's projected features, in the teacher's space.

        It copies the student, runs in eval mode, needs no operator of this package, and exports to ONNX. What it gives
        is compared with the teacher's features after the pair's normalization. Where masks decide what a pooled
        feature is, give it the same ones: ``module(**batch, masks={name: mask})``.

        Args:
            name: of the pair.
            calibration_input: for ``normalization="batch_norm"``, which standardizes the student's channels, and no
                other: a batch, given as ``example_input`` is, over which their mean and variance are taken.
        """
        checks.check_choice("name", name, [pair.name for pair in self.pairs])
        loss = self.pair_losses.of(name)
        (pair,) = (pair for pair in self.pairs if pair.name == name)
        scale = loss.scale.detach() if isinstance(loss.scale, torch.Tensor) else loss.scale
        if (pair.normalization == "batch_norm") != (calibration_input is not None):
            raise ValueError(
                "calibration_input must be given for a pair with normalization='batch_norm', and for no other: a batch "
                f"over which the exported channels are standardized; the pair's normalization is {pair.normalization!r}"
            )
        module = TeacherSpace(self.student, pair, loss.projection.to_linear(scale))
        if calibration_input is not None:
            module.standardize_over(*as_arguments(calibration_input), eps=pair.eps)
        return module

    def projection(self, name: str) -> torch.Tensor:
        """P ``(T, S)`` of the pair of that name."""
        checks.check_choice("name", name, [pair.name for pair in self.pairs])
        return self.pair_losses.of(name).projection.weight

    def converted_state_dict(self, state_dict: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """A state dict of before 0.1, whose projections had no names, given the pairs' names in its order of pairs."""
        for name in names:
            checks.check_choice("names", name, [pair.name for pair in self.pairs])
        return converted_state_dict(state_dict, names, self.pair_losses, prefix="")

    def reset_parameters(self) -> None:
        """Fresh projections and balance, and learned scales back where they start, also after ``to_empty()``.

        The models stay, and so do statistics of ``Standardization`` and ``Whitening``, which have their own.
        """
        self.pair_losses.reset_parameters()
        self.balance.reset_parameters()

    def attach(self) -> "FeatureDistiller":
        """Puts the hooks on and keeps them there until ``remove()``. Outside ``forward`` they do nothing."""
        hooks = self._modules_and_taps()
        modules = [module for module, _ in hooks]
        if not self._attached or [*map(id, modules)] != [*map(id, self._hooked)]:  # a module may have been replaced
            self.remove()
            self._handles = [module.register_forward_hook(tap) for module, tap in hooks]
            self._hooked, self._attached = modules, True
        return self

    def remove(self) -> None:
        """Takes the hooks off the student's and the teacher's modules."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked, self._attached = [], [], False

    def __enter__(self) -> "FeatureDistiller":
        self._attached_before.append(self._attached)
        return self.attach()

    def __exit__(self, *_: object) -> None:
        if not self._attached_before.pop():
            self.remove()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: projections, scales, what the student says.

        A pair's name stands in brackets, which mean something else where timm takes names for patterns: such names are
        there a second time, as ``glob.escape`` writes them.
        """
        said = [
            (prefix, name)
            for prefix, module in self.named_modules()
            if prefix and callable(getattr(module, "no_weight_decay", None))
            for name in module.no_weight_decay()  # type: ignore[operator]
        ]
        exact = {f"{prefix}.{name}" for prefix, name in said}
        patterns = [f"{glob.escape(prefix)}.{name}" for prefix, name in said if "*" in name or "?" in name]  # as timm's
        names = {
            name
            for name, _ in self.named_parameters()
            if name in exact or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }
        return names | {glob.escape(name) for name in names}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Trained parameters for an optimizer: those that decay; then biases, 1-D ones and ``no_weight_decay()``."""
        spared = self.no_weight_decay()
        groups: tuple[list, list] = ([], [])
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[parameter.ndim <= 1 or name.endswith("bias") or name in spared].append(parameter)
        return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]

    def forward(
        self,
        *args: Any,
        masks: Mapping[str, Any] | None = None,
        teacher_input: Any = None,
        indices: Any = None,
        total_rows: float | torch.Tensor | Mapping[str, Any] | None = None,
        metrics: bool = False,
        **kwargs: Any,
    ) -> tuple:
        # Trainer's count of labels is for the student's loss and for the losses here.
        known = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        step = Step(
            student=(args, kwargs),
            teacher=TeacherCall(
                arguments=(args, known),
                teacher_input=teacher_input,
                indices=indices,
                versions=versions_of((args, known)),
            ),
            masks={} if masks is None else masks,
            total_rows=total_rows,
            metrics=metrics,
        )
        if self._attached and torch.compiler.is_compiling():
            return self._losses(step)
        return self._take_turn(step)

    @not_traced(recursive=False)  # _losses is a frame, and so a graph, of its own
    def _take_turn(self, step: Step) -> tuple:
        """Threads share the hooks, so they run one after another."""
        with self._turn:
            stay = self._attached
            self.attach()
            try:
                return self._losses(step)
            finally:
                if not (stay or self._compiled()):
                    self.remove()

    def _losses(self, step: Step) -> tuple:
        self._check_options(step)
        group = self.process_group if self.training else None  # ranks may evaluate on their own
        output, answer, calls = self._run(step)
        rows: dict[str, ComparedRows] = {}
        for pair in self.pairs:
            seen = self._compared(pair, calls[pair.name], answer, step.masks)
            rows[pair.name] = self.pair_losses.masked_row(pair.name) if seen is None else seen
        losses, projections = self.pair_losses(rows, group)
        row_weights: dict[str, torch.Tensor] = {}
        for term in self.logit_terms:
            losses[term.name], row_weights[term.name] = logit_loss(
                logits_of(output, self.student_logits, "student"),
                logits_of(answer.output(term.teacher), self.teacher_logits, "teacher"),
                entry_of(step.masks, term.name),
                name=term.name,
                temperature=self.temperature,
                reduction=self.reduction,
                process_group=group,
            )
        factors, balance_report = self.balance(losses)  # of means, before they become a micro-batch's share
        if step.total_rows is not None:
            row_weights |= {name: weight_of(seen) for name, seen in rows.items()}
            losses = over_total_rows(losses, row_weights, step.total_rows, group)
        elif self.reduction == "mean" and step.student[1].get("num_items_in_batch") is not None:
            share = share_of_items(step.student[1], group)
            losses = {name: loss * share for name, loss in losses.items()}
        balanced = {name: factors[name] * loss for name, loss in losses.items()} if factors else losses
        total = sum(balanced[term.name] * self.weights[term.name] for term in self.terms)
        if not step.metrics:
            return output, {**losses, "total": total}
        report = {"loss": total.detach()} | {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        report |= balance_report
        for name, seen in rows.items():
            pairs_own = diagnostics.metrics(
                seen.student,
                seen.teacher,
                projections[name],
                mask=seen.mask,
                process_group=group,
            )
            report |= {f"diagnostics/{name}/{metric}": value for metric, value in pairs_own.items()}
        return output, {**losses, "total": total}, report

    def _run(self, step: Step) -> tuple[Any, TeacherAnswer, dict[str, list[Returned]]]:
        """The student's output, the teacher's answer, and what the student's tapped modules returned, by pair."""
        args, kwargs = step.student
        output, calls = run_tapped(lambda: self.student(*args, **kwargs), self._taps)
        return output, self.source.answer(step.teacher), calls

    def _compared(
        self, pair: Pair, calls: list[Returned], answer: TeacherAnswer, masks: Mapping[str, Any]
    ) -> ComparedRows | None:
        """What a pair compares in this step; None if it is optional and one of its modules did not run."""
        student_mask, teacher_mask = masks_of_sides(pair, masks.get(pair.name))
        tap = self._taps[pair.name]
        returned = tap.chosen(calls)
        if returned is None and not pair.optional:
            raise TapError(tap.missing(self.student, calls))
        target = answer.rows(pair, teacher_mask)
        if returned is None or target is None:
            return None
        return compared(pair, tap.rows(returned, student_mask), target, one_mask=student_mask is teacher_mask)

    def _check_weights(self) -> None:
        names = [term.name for term in self.terms]
        if not isinstance(self.weights, Mapping):
            raise TypeError(f"weights must map losses' names to numbers; got {checks.describe(self.weights)}")
        for name, weight in self.weights.items():
            checks.check_choice("a key of weights", name, names)
            checks.check_number(f"weights[{name!r}]", weight)
        if len(self.weights) < len(names):
            raise ValueError(f"weights must have every loss, {', '.join(map(repr, names))}; got {self.weights}")

    def _check_options(self, step: Step) -> None:
        self._check_weights()
        checks.check_number("temperature", self.temperature, above=0)
        names = [*dict.fromkeys([*(term.name for term in self.terms), "logits"])]
        if not isinstance(step.masks, Mapping):
            raise TypeError(f"masks must map pairs' names to masks; got {checks.describe(step.masks)}")
        if not isinstance(step.metrics, bool):
            raise TypeError(f"metrics must be True or False; got {checks.describe(step.metrics)}")
        for name in step.masks:
            checks.check_choice("a key of masks", name, names)
        if step.total_rows is not None:
            if self.reduction == "sum":
                raise ValueError("total_rows divides what is a mean otherwise; with reduction='sum' divide the losses")
            check_total_rows(step.total_rows, names)

    def _dims(self, example_input: Any, example_teacher_input: Any) -> list[tuple[int, int]]:
        """(S, T) of every pair, as given or as the example shows."""
        if example_input is None:
            if example_teacher_input is not None:
                raise ValueError("example_teacher_input needs an example_input beside it, for the student")
            missing = [pair.name for pair in self.pairs if pair.dims is None]
            if missing:
                raise ValueError(f"example_input is needed, or dims of the pairs {', '.join(map(repr, missing))}")
            return [pair.dims for pair in self.pairs if pair.dims is not None]
        student = as_arguments(example_input)
        call = self.source.example(TeacherCall(arguments=student, teacher_input=example_teacher_input))
        step = Step(student=student, teacher=call)
        with KeptModes(list(self.student.modules())), torch.no_grad(), self:
            self.student.eval()  # running statistics must not see the example
            _, answer, calls = self._run(step)
            rows = {pair.name: self._compared(pair, calls[pair.name], answer, {}) for pair in self.pairs}
        return [pair.dims or _dims_of(pair, rows[pair.name]) for pair in self.pairs]

    def _modules_and_taps(self) -> list[tuple[nn.Module, Tap]]:
        return hooks_of("student", self.student, self._taps.values()) + self.source.taps()

    def _compiled(self) -> bool:
        """Whether torch.compile has a model: it would not look for hooks that come later, so they stay."""
        return self.source.compiled() or any(is_compiled(module) for module in self.student.modules())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FeatureDistiller":
        # With the projections', because a module around the distiller may have moved the student before.
        of_student = {tensor.device for tensor in (*self.parameters(), *self.buffers())}
        super()._apply(fn, recurse)
        self.source.move(fn, of_student)
        return self

    def _replicate_for_data_parallel(self) -> "FeatureDistiller":
        raise RuntimeError(
            "FeatureDistiller can't run in torch.nn.DataParallel, whose replicas share hooks and teacher: wrap it in "
            "torch.nn.parallel.DistributedDataParallel, one process per GPU"
        )

    def extra_repr(self) -> str:
        return "\n".join(f"{name}: weight={weight:g}" for name, weight in self.weights.items())


def _dims_of(pair: Pair, rows: ComparedRows | None) -> tuple[int, int]:
    if rows is None:
        raise ValueError(f"pair {pair.name!r} did not run with example_input: give it dims=(S, T)")
    return rows.student.shape[-1], rows.teacher.shape[-1]


def as_source(teacher: Any, pairs: Sequence[Pair], student: nn.Module) -> TeacherSource:
    """What a caller gave as the teacher, as the source of the pairs' targets."""

    def one_source(name: str, one: Any, own: Sequence[Pair]) -> TeacherSource:
        return StoredTeacher(one, own, name) if isinstance(one, FeatureStore) else ModelTeacher(one, own, student, name)

    return (
        SeveralTeachers(teacher, pairs, one_source) if isinstance(teacher, Mapping) else one_source("", teacher, pairs)
    )
