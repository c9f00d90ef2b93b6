"""What the losses of an accumulated step are divided by, where that is not a batch's own rows."""

from collections.abc import Mapping
from typing import Any

import torch

from .ops import checks
from .ops.normalization.all_reduce import all_reduce
from .pooling import ComparedRows


def weight_of(rows: ComparedRows) -> torch.Tensor:  # -> ()
    """The number of rows, or the sum of their weights, of this process."""
    dtype = torch.promote_types(rows.student.dtype, torch.float32)
    if rows.mask is None:
        return rows.student.new_full((), rows.student.shape[:-1].numel(), dtype=dtype)
    return rows.mask.detach().to(dtype).sum()


def check_total_rows(total_rows: float | torch.Tensor | Mapping[str, Any], names: list[str]) -> None:
    """Numbers or 0-d tensors, one for all losses or by names of losses."""
    for name, value in total_rows.items() if isinstance(total_rows, Mapping) else [("", total_rows)]:
        if isinstance(total_rows, Mapping):
            checks.check_choice("a key of total_rows", name, names)
        if not isinstance(value, torch.Tensor):
            checks.check_number("total_rows", value, above=0)
        elif value.numel() != 1:
            raise ValueError(f"total_rows must be a number or a 0-d tensor; got {checks.describe(value)}")
        elif value.dtype in (torch.float16, torch.bfloat16):  # which holds no such number: 100097, say
            raise ValueError(
                f"total_rows must be a number or an integer or float32 tensor; got {checks.describe(value)}. Mixed "
                "precision of FSDP2 casts floating arguments of forward: give a number or an integer tensor"
            )


def entry_of(given: Mapping[str, Any], name: str) -> Any:
    """What a caller gave for the loss of that name, or None; "logits" stands for the logit losses of all teachers."""
    return given.get(name, given.get("logits") if name.startswith("logits:") else None)


def over_total_rows(
    losses: Mapping[str, torch.Tensor],
    row_weights: Mapping[str, torch.Tensor],  # of this process, by the loss's name
    total_rows: float | torch.Tensor | Mapping[str, Any],
    process_group: Any,
) -> dict[str, torch.Tensor]:
    """Every loss as its share of the mean over total_rows: its own mean times its rows' share of them."""
    given = total_rows if isinstance(total_rows, Mapping) else dict.fromkeys(losses, total_rows)
    totals = {name: entry_of(given, name) for name in losses if entry_of(given, name) is not None}
    if not totals:
        return dict(losses)
    own = all_reduce(torch.stack([row_weights[name] for name in totals]), process_group)
    shares = {name: count / totals[name] for name, count in zip(totals, own.unbind(0), strict=True)}
    return {name: loss * shares[name] if name in shares else loss for name, loss in losses.items()}


def share_of_items(kwargs: Mapping[str, Any], process_group: Any) -> torch.Tensor:  # -> ()
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
    own = all_reduce(labels.ne(-100).sum().float(), process_group)  # the mean over the ranks: DDP averages, too
    return own / (kwargs["num_items_in_batch"] * (1 if process_group is None else process_group.size()))
