"""``FeatureDistiller``: student and teacher on the same input, features of named modules compared, losses added up."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import diagnostics
from .ops import checks, implementations
from .ops.normalization.all_reduce import GroupHandle, all_reduce, global_loss
from .ops.normalization.reference import without_masked_rows
from .ops.ortho_proj_loss import api
from .pair_losses import ComparedRows, PairLosses, convert_when_loading, converted_state_dict
from .pairs import SIDES, Pair, as_pairs
from .taps import Tap, as_arguments, cast, entry, find_module, rows


class FeatureDistiller(nn.Module):
    r"""Runs a student and its frozen teacher on the same input and compares the features of named modules.

    ::

        total = Σ over pairs of weight · L(student's rows, teacher's rows)  +  logit_weight · τ² KL(teacher ‖ student)

    with L of ``OrthoProjLoss``: an orthonormal projection per pair, those of equal shape in one batched Cayley call.
    Wrap, compile and optimise the distiller, which holds student and projections. Infer with ``distiller.student``.

    The teacher is frozen in place: no gradients, eval mode whatever ``train()`` says, its own dtype (floating-point
    arguments are cast to it; autocast applies to it as to the student). It is no submodule: ``parameters()`` and
    ``state_dict()`` leave it out. ``.to()`` moves it, and leaves its dtype alone; ``to_empty()`` moves it too, and
    leaves it undefined only where it had no values, on the meta device.

    Hooks are on the models' modules during ``forward`` only. Putting them there breaks the graph of ``torch.compile``
    once, before everything else; models and losses are one graph. For ``fullgraph=True`` keep the hooks on by
    ``attach()`` until ``remove()``, or by ``with distiller:``. Features inside a reentrant activation checkpoint have
    no gradient; inside the non-reentrant kind they have.

    Which modules: what ``forward_features`` of a timm ViT returns comes from ``"norm"``, ResNet's last map from
    ``"layer4"``, a Hugging Face encoder's tokens from ``"encoder"`` with ``student_output="last_hidden_state"``.

    Args:
        student, teacher: any modules.
        pairs: one dict of the fields of ``Pair`` (or one ``Pair``) per pair.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments for both models: one pass in eval
            mode finds the channels, so that the projections exist before the optimiser. Or give every pair ``dims``.
        example_teacher_input: the same for the teacher alone, of as many samples: where ``teacher_input`` will come.
        logit_weight: weight of the logit loss, a mean over rows; ``None``: there is none.
        temperature: τ of the logit loss.
        reduction: ``"mean"`` over rows and channels, or ``"sum"``.
        student_logits, teacher_logits: which entry of an output that is no tensor; by default ``"logits"``.
        process_group, backend: see ``functional.ortho_proj_loss``; the logit loss is global, too.
        device, dtype: of the projections, float32 or float64; by default as the student's (16 bit: float32).

    Shape:
        ``forward(*args, masks=None, teacher_input=None, total_rows=None, metrics=False, **kwargs)`` -> (student's
        output, losses), and with ``metrics`` a third: a flat dictionary for any logger. Arguments go to both models.
        ``losses``: a scalar per pair by name and ``"logits"``, before weighting; and ``"total"``.

    ``teacher_input``: what the teacher gets in place of the arguments: a tensor, a tuple of arguments or a dict of
    keyword arguments. For another resolution or tokenizer; or outputs of the teacher that were stored, with a teacher
    that returns what it is given, ``nn.Identity()``. (They must be of the very view that the student sees.)

    ``metrics``: the losses once more, ``"loss"`` (the total) and ``"loss/<pair>"``, and for every pair
    ``"diagnostics/<pair>/<name>"``: see ``diagnostics.metrics``. Detached 0-d tensors; every rank must ask for them.

    ``masks`` maps the name of a pair to a mask, or to ``(student's mask or None, teacher's mask or None)``: bool or
    non-negative float weights, ``(N,)`` for samples or one per position of the tap: ``(N, tokens)``, skipped ones
    included, or ``(N, H, W)``. A mean is taken over the positions left; a sample without any is no row of the loss.
    After a function or a resampling a mask has the shape of the compared rows, as ``masks["logits"]`` of the logits'.

    ``total_rows``: how many rows (or what weight of rows) all micro-batches of an accumulated step have, on all ranks
    of ``process_group``: a number, or ``{name: number}`` for some of the losses. A loss is then divided by that, not by
    its own rows, so that losses, and gradients, add up to the mean over the accumulated batch. In its place the
    ``num_items_in_batch`` of Hugging Face's Trainer weighs a batch by its share of the labels.

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
        teacher: nn.Module,
        pairs: Sequence[Mapping[str, Any] | Pair],
        *,
        example_input=None,
        example_teacher_input=None,
        logit_weight: float | None = None,
        temperature: float = 1.0,
        reduction: str = "mean",
        student_logits: int | str | None = None,
        teacher_logits: int | str | None = None,
        process_group=None,
        backend: str | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, model in zip(SIDES, (student, teacher), strict=True):
            if not isinstance(model, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module; got {checks.describe(model)}")
        if not {*map(id, student.parameters())}.isdisjoint(map(id, teacher.parameters())):
            raise ValueError("teacher must share no parameter with student: freezing it would freeze both; copy it")
        self.pairs = as_pairs(pairs)
        if not self.pairs and logit_weight is None:
            raise ValueError(f"pairs must not be empty without a logit_weight: there must be a loss; got {pairs}")
        if logit_weight is not None:
            checks.check_number("logit_weight", logit_weight)
        checks.check_number("temperature", temperature, above=0)
        checks.check_choice("reduction", reduction, api.REDUCTIONS)
        implementations.requested("ortho_proj_loss", backend)
        self.logit_weight, self.temperature = logit_weight, temperature
        self.student_logits, self.teacher_logits, self.reduction = student_logits, teacher_logits, reduction
        self.process_group, self.backend = GroupHandle(process_group), backend
        self.student, self._unregistered = student, (teacher.requires_grad_(False).eval(),)
        self._taps = [[Tap(pair, side) for side in SIDES] for pair in self.pairs]
        self._handles: list = []
        self._attached = False  # Dynamo can read it, which it can't the handles
        self._modules_and_taps()  # are the names right?

        parameter = next(student.parameters(), torch.empty(0))
        options = {
            "device": parameter.device if device is None else device,
            "dtype": torch.promote_types(parameter.dtype, torch.float32) if dtype is None else dtype,
        }
        dims = self._dims(example_input, example_teacher_input)
        self.pair_losses = PairLosses(self.pairs, dims, reduction=reduction, backend=backend, **options)
        self.register_load_state_dict_pre_hook(convert_when_loading)

    @property
    def teacher(self) -> nn.Module:
        return self._unregistered[0]

    def projection(self, name: str) -> torch.Tensor:
        """P ``(T, S)`` of the pair of that name."""
        checks.check_choice("name", name, [pair.name for pair in self.pairs])
        return self.pair_losses.of(name).projection.weight

    def converted_state_dict(self, state_dict: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """A state dict of version 0.1, whose projections had no names, given the pairs' names in its order of pairs."""
        for name in names:
            checks.check_choice("names", name, [pair.name for pair in self.pairs])
        return converted_state_dict(state_dict, names, self.pair_losses, prefix="")

    def reset_parameters(self) -> None:
        """Fresh projections, and learned scales back at √(T / S), also after ``to_empty()``; the models stay."""
        self.pair_losses.reset_parameters()

    def attach(self) -> "FeatureDistiller":
        """Puts the hooks on and keeps them there until ``remove()``. Outside ``forward`` they do nothing."""
        if not self._attached:
            self._handles = [module.register_forward_hook(tap) for module, tap in self._modules_and_taps()]
            self._attached = True
        return self

    def remove(self) -> None:
        """Takes the hooks off the student's and the teacher's modules."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._attached = [], False

    def __enter__(self) -> "FeatureDistiller":
        return self.attach()

    def __exit__(self, *_) -> None:
        self.remove()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: projections, scales, what the student says."""
        said = {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if prefix and callable(getattr(module, "no_weight_decay", None))
            for name in module.no_weight_decay()  # type: ignore[operator]
        }
        return {name for name, _ in self.named_parameters() if name in said}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Trained parameters for an optimiser: those that decay; then biases, 1-D ones and ``no_weight_decay()``."""
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
        total_rows: float | torch.Tensor | Mapping[str, Any] | None = None,
        metrics: bool = False,
        **kwargs: Any,
    ) -> tuple:
        masks = {} if masks is None else masks
        # Trainer's count of labels is for the student's loss and for the losses here.
        known = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        teacher = (args, known) if teacher_input is None else as_arguments(teacher_input)
        if self._attached:
            return self._losses((args, kwargs), teacher, masks, total_rows, metrics)
        with self:
            # a frame, and so a graph, of its own
            return self._losses((args, kwargs), teacher, masks, total_rows, metrics)

    def _losses(self, student_arguments, teacher_arguments, masks, total_rows, metrics):
        self._check_options(masks, total_rows, metrics)
        output, teacher_output, compared = self._run(student_arguments, teacher_arguments, masks)
        losses, projections = self.pair_losses(compared, self.process_group.group)
        row_weights = {name: _row_weight(rows) for name, rows in compared.items()}
        if self.logit_weight is not None:
            losses["logits"], row_weights["logits"] = self._logit_loss(output, teacher_output, masks.get("logits"))
        if total_rows is not None:
            losses = self._over_total_rows(losses, row_weights, total_rows)
        elif self.reduction == "mean" and student_arguments[1].get("num_items_in_batch") is not None:
            share = self._share_of_items(student_arguments[1])
            losses = {name: loss * share for name, loss in losses.items()}
        weights = {pair.name: pair.weight for pair in self.pairs} | {"logits": self.logit_weight}
        total = sum(weights[name] * loss for name, loss in losses.items())
        if not metrics:
            return output, {**losses, "total": total}
        report = {"loss": total.detach()} | {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        for name, seen in compared.items():
            pairs_own = diagnostics.metrics(
                seen.student,
                seen.teacher,
                projections[name],
                mask=seen.mask,
                process_group=self.process_group.group,
            )
            report |= {f"diagnostics/{name}/{metric}": value for metric, value in pairs_own.items()}
        return output, {**losses, "total": total}, report

    def _check_options(self, masks, total_rows, metrics) -> None:
        names = [*(pair.name for pair in self.pairs), "logits"]
        if not isinstance(masks, Mapping):
            raise TypeError(f"masks must map pairs' names to masks; got {checks.describe(masks)}")
        if not isinstance(metrics, bool):
            raise TypeError(f"metrics must be True or False; got {checks.describe(metrics)}")
        for name in masks:
            checks.check_choice("a key of masks", name, names)
        if total_rows is None:
            return
        if self.reduction == "sum":
            raise ValueError("total_rows divides what is a mean otherwise; with reduction='sum' divide the losses")
        values = total_rows if isinstance(total_rows, Mapping) else {"": total_rows}
        for name, value in values.items():
            if isinstance(total_rows, Mapping):
                checks.check_choice("a key of total_rows", name, names)
            if not isinstance(value, torch.Tensor):
                checks.check_number("total_rows", value, above=0)
            elif value.numel() != 1:
                raise ValueError(f"total_rows must be a number or a 0-d tensor; got {checks.describe(value)}")

    def _over_total_rows(self, losses, row_weights, total_rows):
        """Every loss as its share of the mean over total_rows: its own mean times its rows' share of them."""
        names = [name for name in losses if not isinstance(total_rows, Mapping) or name in total_rows]
        own = all_reduce(torch.stack([row_weights[name] for name in names]), self.process_group.group)
        totals = [total_rows[name] if isinstance(total_rows, Mapping) else total_rows for name in names]
        shares = {name: count / total for name, count, total in zip(names, own.unbind(0), totals, strict=True)}
        return {name: loss * shares[name] if name in shares else loss for name, loss in losses.items()}

    def _share_of_items(self, kwargs):
        """This batch's share of ``num_items_in_batch``, Trainer's number of labels in an accumulated step.

        Trainer hands it to a model whose forward takes ``**kwargs``, and relies on every loss being divided by it.
        """
        labels = kwargs.get("labels")
        if not isinstance(labels, torch.Tensor):
            raise ValueError(
                "num_items_in_batch needs labels beside it, to know this batch's share; got labels "
                f"{checks.describe(labels)}. Set accepts_loss_kwargs = False on the model that Trainer gets, or give "
                "total_rows"
            )
        group = self.process_group.group
        own = all_reduce(labels.ne(-100).sum().float(), group)  # the mean over the ranks: DDP averages, too
        return own / (kwargs["num_items_in_batch"] * (1 if group is None else group.size()))

    def _run(self, student_arguments, teacher_arguments, masks):
        """(student's output, teacher's output, what every pair compares)."""
        for tap in chain(*self._taps):
            tap.seen = []
        try:
            args, kwargs = student_arguments
            output = self.student(*args, **kwargs)
            if self.teacher.training:  # someone called teacher.train()
                self.teacher.eval()
            # A list, because torch.compile of PyTorch 2.8 can't trace next() of a generator with a default.
            dtypes = [p.dtype for p in self.teacher.parameters() if p.is_floating_point()]
            dtype = dtypes[0] if dtypes else None
            args, kwargs = teacher_arguments
            args, kwargs = [cast(x, dtype) for x in args], {name: cast(x, dtype) for name, x in kwargs.items()}
            with torch.no_grad():
                teacher_output = self.teacher(*args, **kwargs)
            compared = {}
            for student, teacher in self._taps:
                name = student.pair.name
                compared[name] = ComparedRows(*rows(student, teacher, masks.get(name)))
            return output, teacher_output, compared
        finally:
            for tap in chain(*self._taps):
                tap.seen = None

    def _logit_loss(self, output, teacher_output, mask):
        """τ² KL(teacher ‖ student) at temperature τ, the mean over the rows of all ranks; and the rows' weight."""
        student = entry(output, self.student_logits, "the student's output", "student_logits", default="logits")
        teacher = entry(teacher_output, self.teacher_logits, "the teacher's output", "teacher_logits", default="logits")
        if student.shape != teacher.shape or student.dim() < 2:
            raise ValueError(
                "student's and teacher's logits must have the same shape (..., classes); got "
                f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        precise = torch.promote_types(student.dtype, torch.float32)
        row_weight = checks.row_weights('masks["logits"]', mask, student.shape[:-1], student, precise)
        student, teacher = (
            F.log_softmax(without_masked_rows(x.flatten(0, -2).to(precise), row_weight) / self.temperature, dim=-1)
            for x in (student, teacher)
        )
        distances = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        own = student.new_full((), len(student)) if row_weight is None else row_weight.sum()
        loss = (distances if row_weight is None else distances * row_weight).sum()
        if self.reduction == "mean":
            count = all_reduce(own, self.process_group.group)
            loss = loss / torch.where(count > 0, count, 1.0)
        return global_loss(self.temperature**2 * loss, self.process_group.group), own

    def _dims(self, example_input, example_teacher_input) -> list[tuple[int, int]]:
        """(S, T) of every pair, as given or as the example shows."""
        if example_input is None:
            if example_teacher_input is not None:
                raise ValueError("example_teacher_input needs an example_input beside it, for the student")
            missing = [pair.name for pair in self.pairs if pair.dims is None]
            if missing:
                raise ValueError(f"example_input is needed, or dims of the pairs {', '.join(map(repr, missing))}")
            return [pair.dims for pair in self.pairs if pair.dims is not None]
        student = as_arguments(example_input)
        teacher = student if example_teacher_input is None else as_arguments(example_teacher_input)
        modes = [(module, module.training) for module in self.student.modules()]
        self.student.eval()  # running statistics must not see the example
        try:
            with torch.no_grad(), self:
                compared = self._run(student, teacher, {})[2]
        finally:
            for module, training in modes:
                module.training = training
        return [
            pair.dims or (compared[pair.name].student.shape[-1], compared[pair.name].teacher.shape[-1])
            for pair in self.pairs
        ]

    def _modules_and_taps(self):
        return [(find_module(tap.side, getattr(self, tap.side), tap.module), tap) for tap in chain(*self._taps)]

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        held = next(chain(self.teacher.parameters(), self.teacher.buffers()), None)
        if held is not None:
            device = fn(held.new_empty(0)).device  # where fn takes tensors from where the teacher is
            self.teacher.to_empty(device=device) if held.is_meta else self.teacher.to(device)
        return self

    def extra_repr(self) -> str:
        return "\n".join(f"{pair.name}: weight={pair.weight:g}" for pair in self.pairs)


def _row_weight(rows: ComparedRows) -> torch.Tensor:  # -> ()
    """The number of rows, or the sum of their weights, of this process."""
    dtype = torch.promote_types(rows.student.dtype, torch.float32)
    if rows.mask is None:
        return rows.student.new_full((), rows.student.shape[:-1].numel(), dtype=dtype)
    return rows.mask.detach().to(dtype).sum()
