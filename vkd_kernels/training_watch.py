"""Two likely mistakes of a training loop, seen while it trains, and said once."""

import itertools
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .ops import checks
from .ops.tracing import constant_result

PART = 64  # values of a parameter by which changes are told
PATIENCE = 20  # steps of an optimizer that leave the projection alone
NODES_SEARCHED = 2000  # of the student's graph, for a parameter by which an optimizer's steps can be counted


class TrainingWatch:
    """Watches a loss's student features and its projection: features without a graph, a projection that never moves.

    It looks at version counters, which count changes in place, and at a few values where these stand still: between two
    steps, and under fused optimizers. Copies and pickles of a module start a watch of their own.
    """

    def __init__(self) -> None:
        self.warned = False  # of features without a graph
        self.settled = False  # the projection moves, it has been said that it does not, or nothing can be told
        self.student: weakref.ref[torch.Tensor] | None = None  # a parameter of the student
        self.versions = 0, 0  # of that parameter and of the projection's
        self.student_part: torch.Tensor | None = None  # of that parameter, at the last step
        self.start: torch.Tensor | None = None  # a part of the projection's parameter at the first step
        self.hook: RemovableHandle | None = None  # on that parameter; its .grad may be cleared before the next look
        self.received_gradient = False
        self.idle_steps = 0

    def __deepcopy__(self, memo: dict) -> "TrainingWatch":
        return TrainingWatch()

    def __reduce__(self) -> tuple:
        return TrainingWatch, ()

    def look(self, where: str, student: torch.Tensor, projection: nn.Module) -> None:
        """Called in every forward pass of training mode; ``where`` is how a warning names the loss."""
        if not torch.is_grad_enabled():
            return
        if not student.requires_grad:
            if not self.warned:
                self.warned = True
                warn_of_features_without_graph(where)
        elif not self.settled and not torch.compiler.is_compiling():
            self._watch_projection(where, student, projection)

    def _watch_projection(self, where: str, student: torch.Tensor, projection: nn.Module) -> None:
        parameter = next((p for p in projection.parameters() if p.requires_grad), None)
        if parameter is None or not checks.can_be_read(parameter):
            return
        if self.student is None:
            leaf = parameter_behind(student)
            if leaf is None:
                self._settle()
                return
            self.student, self.student_part, self.start = weakref.ref(leaf), part_of(leaf), part_of(parameter)
            self.versions = leaf._version, parameter._version
            self.hook = parameter.register_hook(self._note_gradient)
            return
        leaf = self.student()
        if leaf is None or parameter._version != self.versions[1]:
            self._settle()
            return
        if not self.received_gradient:
            return
        changed = leaf._version != self.versions[0]
        if not changed or self.idle_steps + 1 == PATIENCE:
            if differ(self.start, part_of(parameter)):
                self._settle()
                return
            changed = changed or differ(self.student_part, part_of(leaf))
        if not changed:  # the same step
            return
        self.idle_steps += 1
        self.received_gradient = False
        self.versions, self.student_part = (leaf._version, parameter._version), part_of(leaf)
        if self.idle_steps == PATIENCE:
            warnings.warn(
                f"{where}: in {PATIENCE} steps that changed the student its projection received gradients and did not "
                "move. Give the optimizer the loss's parameters too, without weight decay: "
                "distiller.parameter_groups(weight_decay), or a group {'params': loss.parameters(), 'weight_decay': 0}",
                stacklevel=2,
            )
            self._settle()

    def _note_gradient(self, gradient: torch.Tensor) -> None:
        self.received_gradient = True

    def _settle(self) -> None:
        self.settled, self.student, self.student_part, self.start = True, None, None, None
        if self.hook is not None:
            self.hook.remove()
            self.hook = None


def part_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """A few of its values, of this rank's shard; None while FSDP has freed them."""
    local: Any = parameter
    if checks.is_sharded(parameter):
        local = local.to_local()
    freed = local.numel() > 0 and local.untyped_storage().nbytes() == 0
    return None if freed else local.detach().flatten()[:PART].clone()


def differ(before: torch.Tensor | None, now: torch.Tensor | None) -> bool:
    """Whether both are known, and unlike."""
    return before is not None and now is not None and not torch.equal(before, now)


@constant_result  # said while torch.compile traces, at no cost afterwards
def warn_of_features_without_graph(where: str) -> None:
    warnings.warn(
        f"{where}: the student's features have no graph, so the loss trains its projection alone and the student gets "
        "no gradient. Run the student with gradients; tap a part that is trained; and inside of activation "
        "checkpointing use use_reentrant=False",
        stacklevel=2,
    )


def parameter_behind(features: torch.Tensor) -> torch.Tensor | None:
    """A leaf of the graph, the nearest one to the features; None where there is none, or none near."""
    nodes = [features.grad_fn]  # breadth first; the list grows while it is read
    seen = set(nodes)
    for node in itertools.islice(nodes, NODES_SEARCHED):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor) and leaf.is_leaf:
            return leaf
        new = [after for after, _ in getattr(node, "next_functions", ()) if after is not None and after not in seen]
        seen.update(new)
        nodes.extend(new)
    return None
