"""Taps: the forward hooks that see what named modules return, and why one may not have seen anything."""

import dataclasses
import difflib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .pairs import Side
from .pooling import Rows, pooled

NAMES_SHOWN = 12
WHERE_OPTIONAL = "optional=True counts the pair as 0 in such a step"
WHERE_NEEDED = "It can't be left out here: tap a module around it, or one that runs"


class TapError(RuntimeError):
    """A tap did not see what it needs; the message says why, and what to do."""


@dataclass(frozen=True)
class Returned:
    """What a tapped module returned in one call, or the entry of it that the pair names."""

    value: Any
    versions: tuple[int, ...]  # of its tensors, which count changes in place

    @classmethod
    def of(cls, value: Any) -> "Returned":
        """Where changes in place can't be counted (in a compiled graph, in inference mode) a copy is kept instead."""
        if not counts_changes(value):
            return cls(copied(value), ())
        return cls(value, tuple(x._version for x in tensors_in(value)))

    def changed(self) -> bool:
        return bool(self.versions) and self.versions != tuple(x._version for x in tensors_in(self.value))


class Tap:
    """The forward hook on one module, for one side of one pair. A plain object, so that copies and pickles hold."""

    def __init__(self, side: Side):
        self.side = side
        self.calls: list[Returned] | None = None  # of the pass that is looked at; None: not looking
        self.thread: int | None = None  # another thread's calls of the module belong to another pass

    def start(self) -> None:
        self.calls = []
        self.thread = None if torch.compiler.is_compiling() else threading.get_ident()

    def stop(self) -> list[Returned]:
        """What the module returned since ``start``, call by call."""
        calls, self.calls = self.calls or [], None
        return calls

    def __call__(self, module: nn.Module | None, args: Any, output: Any) -> None:
        if self.calls is not None and (torch.compiler.is_compiling() or self.thread == threading.get_ident()):
            option = f"{self.side.side}_output"
            value = selected(output, self.side.output, where=self.side.where, option=option)
            if not callable(self.side.pool):
                value = as_tensor(value, output, self.side.output, where=self.side.where, option=option)
            self.calls.append(Returned.of(value))

    def chosen(self, calls: list[Returned]) -> Returned | None:
        """The call that the pair is about; None if the module did not run that often."""
        side = self.side
        if side.call is None and len(calls) > 1:
            raise TapError(
                f"{side.where} is needed once; the module ran {len(calls)} times in this forward pass: say which call "
                f"by {side.side}_call, 0 for the first or -1 for the last"
            )
        index = 0 if side.call is None else side.call
        return calls[index] if -len(calls) <= index < len(calls) else None

    def rows(self, returned: Returned, mask: torch.Tensor | None) -> Rows:
        """The features pooled, the mask along with them."""
        if returned.changed():
            raise TapError(f"{self.side.where} was changed in place afterwards: tap the module that changed it")
        return pooled(self.side, returned.value, mask)

    def missing(self, model: nn.Module, calls: list[Returned], remedy: str = WHERE_OPTIONAL) -> str:
        """The message for a module that did not run, with the likely cause, and the remedy if no other is known."""
        call = f"call {self.side.call} of it is" if self.side.call is not None and calls else "it is"
        return (
            f"{self.side.where} was not seen: {call} needed in every forward pass, and the module ran {len(calls)} "
            f"times in this one. {likely_cause(model, self.side, remedy)}"
        )


def hooks_of(side: str, model: nn.Module, taps: Iterable[Tap]) -> list[tuple[nn.Module, Tap]]:
    """The modules that the taps need a hook on: all but the model itself, whose output its caller has."""
    hooks = []
    for tap in taps:
        module = find_module(side, model, tap.side.module)
        if isinstance(module, torch.jit.ScriptModule) and tap.side.module:
            raise TapError(f"{tap.side.where} can't be seen. {likely_cause(model, tap.side, WHERE_NEEDED)}")
        if tap.side.module:
            hooks.append((module, tap))
    return hooks


def run_tapped(run: Callable[[], Any], taps: Mapping[str, Tap]) -> tuple[Any, dict[str, list[Returned]]]:
    """What the model returned, and by the taps' names what their modules returned in every call."""
    for tap in taps.values():
        tap.start()
    try:
        output = run()
        for tap in taps.values():
            if not tap.side.module:
                tap(None, (), output)
    finally:
        calls = {name: tap.stop() for name, tap in taps.items()}
    return output, calls


def likely_cause(model: nn.Module, side: Side, remedy: str) -> str:
    """Why hooks on a module of the model saw nothing, and what to do."""
    bare = getattr(model, "_orig_mod", model)
    module = submodule(bare, side.module)
    around = [submodule(bare, prefix) for prefix in _prefixes(side.module)]
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        entry = next((f"{side.module}.{name}".lstrip(".") for name, _ in module.named_children()), None)
        return f"A {type(module).__name__} is never called itself: tap one of its entries" + (
            f", {entry!r} for instance" if entry else ""
        )
    if isinstance(module, torch.jit.ScriptModule) and not any(isinstance(m, torch.jit.ScriptModule) for m in around):
        return (
            "A scripted module takes no hooks: call it from the forward() of a small nn.Module in its place, and "
            "tap that one"
        )
    if any(isinstance(outer, torch.jit.ScriptModule) for outer in around):
        return f"TorchScript runs submodules without their hooks: tap the scripted model itself, {side.side}=''"
    if any(isinstance(outer, fx.GraphModule) for outer in around):
        return (
            "A traced graph (torch.fx, torch.export) calls only those modules that tracing left whole; other names are "
            f"empty shells: tap the model itself, {side.side}='', or one of the modules that its code calls"
        )
    if bare is not model or any(is_compiled(part) for part in bare.modules()):
        return (
            "The model was compiled and run before these hooks were there, and torch.compile uses that graph again: "
            "make the distiller before the first call, compile the distiller instead of the model, or call "
            "torch.compiler.reset() once"
        )
    return (
        "Another module does the work in this pass (LayerDrop, a branch, an early exit, fused attention), or the model "
        f"calls its forward() directly, which runs no hooks. {remedy}"
    )


def _prefixes(name: str) -> list[str]:
    """'a.b.c' -> ['', 'a', 'a.b']: the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has wrapped it, or its own ``compile()`` was called."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of what a module returned, inside of tuples, lists, dicts and dataclasses too."""
    if isinstance(value, torch.Tensor):
        return [value]
    if value is None or isinstance(value, (str, int, float)):
        return []
    value = as_mapping(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return [x for item in value for x in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def counts_changes(value: Any) -> bool:
    """Whether its tensors count their changes in place."""
    return not (torch.compiler.is_compiling() or any(x.is_inference() for x in tensors_in(value)))


def versions_of(value: Any) -> list[tuple[torch.Tensor, int]]:
    """Its tensors and how often each was changed in place; none where that isn't counted."""
    return [(x, x._version) for x in tensors_in(value)] if counts_changes(value) else []


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether writing to one may change the other, such as a view of it, but not another crop of the same stack."""
    both = one, other
    if one is other or any(x.layout != torch.strided or x.is_nested or not x.numel() for x in both):
        return one is other
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    if one.itemsize != other.itemsize:
        return True
    lasts = [sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) for x in both]
    starts = [int(x.storage_offset()) for x in both]
    ends = [start + last + 1 for start, last in zip(starts, lasts, strict=True)]
    if max(starts) >= min(ends):
        return False
    written = torch.zeros(max(ends) - min(starts), dtype=torch.bool, device="cpu")  # interleaved, they may be disjoint
    of_one, of_other = (_same_places(x, written, start - min(starts)) for x, start in zip(both, starts, strict=True))
    of_one.fill_(True)
    return bool(of_other.any())


def _same_places(x: torch.Tensor, storage: torch.Tensor, offset: int) -> torch.Tensor:
    """The view of another storage that x is of its own, each place once."""
    sizes = [size if step else 1 for size, step in zip(x.shape, x.stride(), strict=True)]
    return storage.as_strided(sizes, x.stride(), offset)


def copied(value: Any) -> Any:
    """The same with clones of its tensors, which later changes in place do not reach."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        items_by_name = {name: copied(item) for name, item in value.items()}
        return items_by_name if type(value) is dict else type(value)(**items_by_name)
    if isinstance(value, (tuple, list)):
        items = [copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    fields = as_mapping(value)
    if fields is value:
        return value
    return dataclasses.replace(value, **{name: copied(item) for name, item in fields.items()})


def as_mapping(value: Any) -> Any:
    """The fields of a dataclass by name, where it is no mapping itself as Hugging Face's outputs are; or the value."""
    if isinstance(value, Mapping) or isinstance(value, type) or not dataclasses.is_dataclass(value):
        return value
    return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}


class Selected(dict[Any, Any]):
    """Entries of an output that have been selected before, by the keys of then: they have no positions of their own."""


def selected(output: Any, key: int | str | tuple | None, *, where: str, option: str) -> Any:
    """The entry of what a module returned: by a key, a position or a path of them."""
    if isinstance(output, Selected) and key in output:
        return output[key]
    value, steps = output, () if key is None else key if isinstance(key, tuple) else (key,)
    if isinstance(output, torch.Tensor) and steps and isinstance(steps[0], int):
        raise TypeError(
            f"{where} is a tensor already, of which {option}={key!r} would take one sample of the batch: leave "
            f"{option} out. If it is a tuple in training and a tensor in eval mode, "
            + (
                f"give a function: {option}=lambda output: output[0] if isinstance(output, tuple) else output"
                if option.endswith("_logits")
                else "tap a module that is not"
            )
        )
    for step in steps:
        entries = entries_of(value)
        size = len(value) if isinstance(value, torch.Tensor) and value.dim() else 0
        if isinstance(step, int) and -size <= step < size:
            value = value[step]
        elif step in entries:
            value = entries[step]
        elif isinstance(step, int) and step < 0 and step + _positions(value) in entries:
            value = entries[step + _positions(value)]
        else:
            raise TypeError(
                f"{where} has no entry {step!r} of {option}={key!r}; {type(value).__name__}"
                + (f" has the entries {', '.join(map(repr, entries))}" if entries else " has no entries")
                + (". Call it with output_hidden_states=True" if step == "hidden_states" else "")
            )
    return value


def entries_of(value: Any) -> dict[int | str, Any]:
    """The entries of a tuple, a list, a dict, a dataclass or a Hugging Face output, by name and by position."""
    value = as_mapping(value)
    if isinstance(value, Selected):
        return value
    if isinstance(value, Mapping):
        return {**value, **dict(enumerate(value.values()))}
    if isinstance(value, (tuple, list)):
        return {**(value._asdict() if hasattr(value, "_asdict") else {}), **dict(enumerate(value))}
    return {}


def _positions(value: Any) -> int:
    return len(value) if isinstance(value, (Mapping, tuple, list)) and not isinstance(value, Selected) else 0


def as_tensor(value: Any, output: Any, key: int | str | tuple | None, *, where: str, option: str) -> torch.Tensor:
    """The value, which must be a tensor."""
    if not isinstance(value, torch.Tensor):
        entries = entries_of(value) or entries_of(output)
        raise TypeError(
            f"{where} must be a tensor; {option}={key!r} finds {type(value).__name__}"
            + (f", its entries are {', '.join(map(repr, entries))}" if entries else "")
        )
    return value


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """``model.get_submodule(name)``, also of scripted models, which don't have it; None where there is none."""
    module: Any = model
    for part in name.split(".") if name else ():
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return None
    return module


def find_module(side: str, model: nn.Module, name: str) -> nn.Module:
    """The module of that name, also in a model that ``torch.compile`` has wrapped."""
    model = getattr(model, "_orig_mod", model)
    module = submodule(model, name)
    if module is not None:
        return module
    names = sorted(
        (existing for existing, _ in model.named_modules() if existing),
        key=lambda existing: -difflib.SequenceMatcher(None, name, existing).ratio(),
    )
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    raise ValueError(
        f"{side} has no module {name!r}; it has, nearest first, {', '.join(map(repr, names[:NAMES_SHOWN]))}{more}"
        + (". 'name:module' is for several teachers" if ":" in name else "")
    )


def as_arguments(given: Any) -> tuple[tuple, dict]:
    """(args, kwargs) of a tensor (or any one thing), a tuple of arguments or a dict of keyword arguments."""
    if isinstance(given, Mapping):
        return (), dict(given)
    return (given if isinstance(given, tuple) else (given,)), {}


def moved(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Tensors on the device, floating-point ones in the dtype, inside of tuples, lists and dicts too."""
    if isinstance(value, torch.Tensor):
        dtype = dtype if value.is_floating_point() else None
        if (device is None or value.device == device) and (dtype is None or value.dtype == dtype):
            return value
        return value.to(device=device, dtype=dtype, non_blocking=device is not None and device.type != "cpu")
    if type(value) is dict:
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [moved(item, device, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
