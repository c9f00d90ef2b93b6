"""Functions as ``teacher_pool``: what a manifest says of one, and whether two are the same.

A function can't be stored. Its name and the plain values that it is bound to can: they tell functions apart in another
process. In one process their code is compared, too.
"""

import functools
import hashlib
import re
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn

from ..pairs import Pair

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device, numpy.generic)
MOST_CHARACTERS = 120  # of bound values; in place of longer ones stands their hash
DEEPEST = 3  # functions bound to functions; a local one may be bound to itself


class Parts(NamedTuple):
    name: str
    code: Any  # what computes: of two functions it is equal, or they differ
    values: dict[str, Any]  # what it is bound to: defaults, closures, arguments of a partial, attributes


def parts_of(function: Callable) -> Parts:
    if isinstance(function, functools.partial):
        given = {**{str(i): value for i, value in enumerate(function.args)}, **function.keywords}
        return Parts("partial", functools.partial, {"func": function.func, **given})
    if isinstance(function, MethodType):
        owner, parts = function.__self__, parts_of(function.__func__)
        return Parts(parts.name, (id(owner), parts.code), {**parts.values, **attributes(owner)})
    if isinstance(function, FunctionType):
        return Parts(function.__qualname__, function.__code__, bound_values(function))
    if hasattr(function, "__qualname__"):  # a class, or a function in C
        return Parts(function.__qualname__, function, {})
    if not hasattr(function, "__dict__"):  # operator.itemgetter(0) and its like
        return Parts(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(function)), function, {})
    return Parts(type(function).__qualname__, function, attributes(function))


def bound_values(function: FunctionType) -> dict[str, Any]:
    """The defaults of its parameters and what its closure holds, by name."""
    code, defaults = function.__code__, function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    values = dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
    values |= function.__kwdefaults__ or {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return values


def attributes(owner: Any) -> dict[str, Any]:
    """Of an object that is called, or whose method is; none of modules and classes, which change for other reasons."""
    return {} if isinstance(owner, (nn.Module, type)) else dict(getattr(owner, "__dict__", {}))


# ---- in one process --------------------------------------------------------------------------------------------------


def same_function(one: Any, other: Any, depth: int = 0) -> bool:
    """Whether both are one object, or were made by the same code from the same values."""
    if one is other:
        return True
    mine, theirs = parts_of(one), parts_of(other)
    return (
        mine.code == theirs.code
        and mine.values.keys() == theirs.values.keys()
        and all(_same_value(value, theirs.values[name], depth) for name, value in mine.values.items())
    )


def _same_value(one: Any, other: Any, depth: int) -> bool:
    if one is other:
        return True
    if type(one) is not type(other) or depth > DEEPEST:
        return False
    if isinstance(one, PLAIN):
        return bool(one == other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same_value, one, other, [depth + 1] * len(one)))
    return callable(one) and same_function(one, other, depth + 1)


def check_one_function(one: Pair, other: Pair) -> None:
    """An error if two pairs that ask for the same features by name have different functions."""
    pool = one.teacher_pool
    if callable(pool) and not same_function(pool, other.teacher_pool):
        raise ValueError(
            f"pairs {one.name!r} and {other.name!r} have two functions as teacher_pool that a store can't tell apart, "
            f"{function_text(pool)!r}: define each under a name of its own, or bind numbers or strings that differ, as "
            "functools.partial(pool, index=3) does. If they are meant to be one, give both pairs the same object"
        )


# ---- in another process ----------------------------------------------------------------------------------------------


def function_text(function: Callable, depth: int = 0) -> str:
    """Its name and the values that it is bound to: ``token.<locals>.pool(index=3)``. Code has no part in it."""
    if isinstance(function, nn.Module):
        return f"{type(function).__qualname__}({_hash(f'{function!r} {weights_fingerprint(function)}')})"
    parts = parts_of(function)
    values = ", ".join(f"{name}={_text(value, depth)}" for name, value in parts.values.items())
    if not values:
        return parts.name
    return f"{parts.name}({values if len(values) <= MOST_CHARACTERS else _hash(values)})"


def _text(value: Any, depth: int) -> str:
    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, (tuple, list)) and depth <= DEEPEST:
        return f"({', '.join(_text(item, depth + 1) for item in value)})"
    if callable(value) and not isinstance(value, nn.Module) and depth <= DEEPEST:
        return function_text(value, depth + 1)
    return type(value).__qualname__


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
