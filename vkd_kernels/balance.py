"""Balancing the losses of a distiller: each over its running mean, the best-learned teacher left out of some steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .ops import checks
from .ops.float64 import KeepsDtypes
from .ops.tracing import is_recomputation
from .pair_losses import state_name

BALANCES = (None, "running_mean")
MOMENTUM = 0.99
SHARES = 1000  # a share of steps is counted in thousandths, so that every rank and every resumed run drops alike


@dataclass(frozen=True)
class LossTerm:
    """One loss of the total."""

    name: str
    teacher: str
    weight: float  # at first: the distiller's weights may change


class RunningMean(KeepsDtypes):
    """The mean of a loss over the last steps, about 1 / (1 - MOMENTUM) of them; unbiased from the first step on."""

    total: torch.Tensor
    weight: torch.Tensor

    def __init__(self, device: torch.device | None):
        super().__init__()
        for name in ("total", "weight"):  # in 16 bit a hundredth of a loss would be rounded away
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=device))

    @torch.no_grad()
    def update(self, loss: torch.Tensor) -> None:  # ()
        """Losses of a skipped pair or a masked batch (0) and those that are not finite leave it as it was."""
        counts = (loss > 0) & loss.isfinite()
        self.total.copy_(torch.where(counts, MOMENTUM * self.total + (1 - MOMENTUM) * loss, self.total))
        self.weight.copy_(torch.where(counts, MOMENTUM * self.weight + (1 - MOMENTUM), self.weight))

    def forward(self) -> torch.Tensor:  # ()
        return torch.where(self.total > 0, self.total / self.weight, 1.0)


class LossBalance(nn.Module):
    """The factors by which losses enter the total, from the losses themselves; a part of the state dict.

    Args:
        terms: the losses.
        balance: ``"running_mean"``: every loss is divided by its running mean; None: not.
        drop_best: the share of training steps in which the teacher of the smallest mean loss is left out, as UNIC does.
    """

    steps: torch.Tensor

    def __init__(
        self, terms: Sequence[LossTerm], balance: str | None, drop_best: float, device: torch.device | None = None
    ):
        super().__init__()
        checks.check_choice("balance", balance, BALANCES)
        checks.check_number("drop_best", drop_best, at_least=0, at_most=1)
        self.teachers = tuple(dict.fromkeys(term.teacher for term in terms))
        if drop_best and len(self.teachers) < 2:
            raise ValueError(f"drop_best={drop_best} leaves out one of several teachers; there is one")
        self.terms, self.drop_best = tuple(terms), drop_best
        if drop_best:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        if balance is not None:
            self.means = nn.ModuleDict({state_name(term.name): RunningMean(device) for term in terms})
        self.balanced = balance is not None

    def reset_parameters(self) -> None:
        for buffer in self.buffers():
            nn.init.zeros_(buffer)

    def forward(self, losses: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The factor () of every loss, by name (none where all are 1), and what a logger may show."""
        if not self.balanced and not self.drop_best:
            return {}, {}
        detached = {name: loss.detach() for name, loss in losses.items()}
        one = next(iter(detached.values())).new_ones(())
        factors = dict.fromkeys(detached, one)
        counts = self.training and not is_recomputation()
        report = {}
        if self.balanced:
            for term in self.terms:
                mean = self.means[state_name(term.name)]
                if counts:
                    mean.update(detached[term.name])  # type: ignore[operator]
                factors[term.name] = 1 / mean()
                report[f"balance/{term.name}"] = factors[term.name]
        if self.drop_best and self.training:
            if counts:
                self.steps.add_(1)
            kept = self._kept(detached)
            factors = {term.name: factors[term.name] * kept[term.teacher] for term in self.terms}
            report |= {f"dropped/{teacher}": 1 - share for teacher, share in kept.items()}
        return factors, report

    def _kept(self, losses: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """1 for every teacher, 0 for the best-learned one in its share of the steps; nothing is read on the host."""
        by_teacher = [[losses[t.name] for t in self.terms if t.teacher == name] for name in self.teachers]
        means = torch.stack([self._mean(own) for own in by_teacher])
        share = round(self.drop_best * SHARES)
        due = self.steps * share // SHARES > (self.steps - 1) * share // SHARES
        several = means.isfinite().sum() > 1  # the only teacher of a step stays
        dropped = due & several & (torch.arange(len(means), device=means.device) == means.argmin())
        return dict(zip(self.teachers, (~dropped).to(means.dtype).unbind(0), strict=True))

    @staticmethod
    def _mean(losses: list[torch.Tensor]) -> torch.Tensor:  # ()
        """Over the losses of pairs that ran, which are not 0; infinite where none did: nothing was learned."""
        every = torch.stack(losses)
        ran = every.abs() > 0  # a cosine of 1 may be rounded to -1e-8
        return torch.where(ran.any(), every.where(ran, 0.0).sum() / ran.sum(), torch.inf)
