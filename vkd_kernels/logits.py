"""The logit loss: τ² KL(teacher ‖ student) of class probabilities at a temperature τ."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .balance import LossTerm
from .ops import checks
from .ops.normalization.all_reduce import all_reduce, global_loss
from .ops.normalization.reference import without_masked_rows
from .taps import as_tensor, entries_of, selected


def logits_of(output: Any, key: int | str | tuple | Callable | None, side: str) -> torch.Tensor:  # (..., classes)
    """The logits in what a model returned: itself, the entry or function ``key`` of it, or by default ``"logits"``."""
    where, option = f"the {side}'s output", f"{side}_logits"
    if callable(key):
        logits = key(output)
        checks.check_tensor(f"what {option} returns", logits)
        return logits
    if key is None and "logits" in entries_of(output):
        key = "logits"
    logits = as_tensor(selected(output, key, where=where, option=option), output, key, where=where, option=option)
    if logits.dim() > 3:
        steps = () if key is None else key if isinstance(key, tuple) else (key,)
        entry = "output" + "".join(f"[{step!r}]" for step in steps)
        raise ValueError(
            f"{where} has logits of the shape {tuple(logits.shape)}, and classes must come last. Say where they are by "
            f"a function: {option}=lambda output: {entry}.permute(0, 2, 3, 1) for (N, classes, H, W); where they are "
            f"last, lambda output: {entry}"
        )
    return logits


def logit_terms(logit_weight: float | Mapping[str, float] | None, teachers: list[str]) -> tuple[LossTerm, ...]:
    """The logit loss of every teacher that has a weight: ``"logits"``, or ``"logits:<teacher>"`` of several."""
    if logit_weight is None:
        return ()
    if teachers == [""]:
        checks.check_number("logit_weight", logit_weight)
        return (LossTerm(name="logits", teacher="", weight=logit_weight),)  # type: ignore[arg-type]
    if not isinstance(logit_weight, Mapping):
        raise TypeError(f"logit_weight must map names of teachers to weights; got {checks.describe(logit_weight)}")
    for name, weight in logit_weight.items():
        checks.check_choice("a key of logit_weight", name, teachers)
        checks.check_number("logit_weight", weight)
    return tuple(LossTerm(name=f"logits:{name}", teacher=name, weight=w) for name, w in logit_weight.items())


def logit_loss(
    student: torch.Tensor,  # (..., classes)
    teacher: torch.Tensor,  # (..., classes)
    mask: torch.Tensor | None,  # (...)
    *,
    name: str,
    temperature: float,
    reduction: str,
    process_group: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # (), ()
    """The loss over the rows of all ranks, and the weight of this process's rows.

    A class that the teacher rules out by a logit of -inf adds nothing, whatever the student says of it.
    """
    if student.shape != teacher.shape or student.dim() < 2:
        raise ValueError(
            "student's and teacher's logits must have the same shape (..., classes); got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}. Models of other classes teach by their features "
            "alone: leave out logit_weight. Where those that one has beyond the other's are padding, leave them out by "
            "a function, such as teacher_logits=lambda output: output.logits[..., :n]"
        )
    acc_dtype = torch.promote_types(student.dtype, torch.float32)
    row_weight = checks.row_weights(f"masks[{name!r}]", mask, student.shape[:-1], student, acc_dtype)
    teacher = teacher.detach().to(device=student.device, dtype=acc_dtype)  # at once: the device may have no float64
    log_q, log_p = (
        F.log_softmax(without_masked_rows(x.flatten(0, -2).to(acc_dtype), row_weight) / temperature, dim=-1)
        for x in (student, teacher)
    )
    distances = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)  # (N,)
    own = log_q.new_full((), len(log_q)) if row_weight is None else row_weight.sum()
    loss = (distances if row_weight is None else distances * row_weight).sum()
    if reduction == "mean":
        count = all_reduce(own, process_group)
        loss = loss / torch.where(count > 0, count, 1.0)
    return global_loss(temperature**2 * loss, process_group), own
