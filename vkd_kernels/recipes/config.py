"""Configurations: nested dataclasses that know their help, limits and source; YAML files and `a.b=c` on top of them.

    @dataclass(frozen=True)
    class Data:
        root: str = option("", "folder of the images")
        labels: int = option(10, "labelled images per class", minimum=1, source="tuned on seeds 0-3")

    @dataclass(frozen=True)
    class Config:
        data: Data = section(Data)
        optim: Optim = section(Optim, lr=3e-3, sources={"lr": "tuned on seeds 0-3"})   # other defaults than Optim's

A field's annotation is its type: int, float, bool, str, a union of those and None, or a tuple of one of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
C = TypeVar("C")


class OptionError(ValueError):
    """A value the user gave that cannot be; the message names the option."""


def option(
    default: Any, help: str, *, source: str = "", minimum: float | None = None, maximum: float | None = None,
    above: float | None = None, below: float | None = None, choices: Iterable[Any] | None = None,
) -> Any:  # fmt: skip
    """A dataclass field. `source` says where its default comes from, e.g. "released code" or "paper, section 4.1"."""
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    metadata = {"help": help, "source": source, "limits": limits, "choices": None if choices is None else (*choices,)}
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: Any, *, sources: Mapping[str, str] | None = None, **defaults: Any) -> Any:
    """A dataclass field that holds a section, with other defaults than its own; `sources` say where those come from."""
    own = {name: (sources or {}).get(name, "chosen for this task") for name in defaults}
    return dataclasses.field(default_factory=lambda: kind(**defaults), metadata={"sources": own})


# ---- keys ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Key:
    """One value of a configuration: its name "section.field", type, and what `option` was told of it."""

    name: str
    type: Any
    help: str
    source: str
    limits: Mapping[str, float | None]
    choices: tuple[Any, ...] | None


def keys(kind: type, prefix: str = "", sources: Mapping[str, str] | None = None) -> Iterator[Key]:
    """Every value of a configuration, in order."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from keys(typing.cast(type, hint), f"{name}.", field.metadata.get("sources"))
        else:
            m = field.metadata
            yield Key(
                name, hint, m["help"], (sources or {}).get(field.name, m["source"]), m["limits"], m["choices"],
            )  # fmt: skip


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"section.field": value}, in order."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found |= flatten(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def replace(config: C, values: Mapping[str, Any]) -> C:
    """The configuration with some values replaced by key: types converted, limits checked, unknown keys refused."""
    kind = type(config)
    known = {key.name: key for key in keys(kind)}
    for name in values:
        if name not in known:
            raise OptionError(f"unknown key {name!r}{nearest(name, known)}")
    merged = flatten(config) | {name: convert(known[name], value) for name, value in values.items()}
    for name, value in merged.items():
        _check(known[name], value)
    return _build(kind, merged, "")


def _build(kind: Any, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    parts = {}
    for field in dataclasses.fields(kind):
        name, hint = prefix + field.name, hints[field.name]
        parts[field.name] = _build(hint, values, f"{name}.") if dataclasses.is_dataclass(hint) else values[name]
    return kind(**parts)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for a name that is nearly a known one, or the known ones where they are few."""
    known = list(known)
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    last = name.rsplit(".", 1)[-1]
    found = [k for k in known if k.rsplit(".", 1)[-1] == last][:1] or found
    return f"; did you mean {found[0]!r}?" if found else f"; known are {', '.join(known)}" if len(known) <= 12 else ""


# ---- values ----------------------------------------------------------------------------------------------------------


def convert(key: Key, value: Any) -> Any:
    """The value as the key's type, or an OptionError. Text stands for what it says: "3e-4" is a number."""
    found = _as(key.type, value)
    if found is _NO:
        raise OptionError(f"{key.name}: must be {_name(key.type)}, got {value!r}")
    return found


_NO = object()
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def _as(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = sorted(typing.get_args(hint), key=lambda t: t is str)  # text last: everything typed is text
        return next((v for v in (_as(member, value) for member in members) if v is not _NO), _NO)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str):
            value = [part for part in re.split(r"[\s,]+", value.strip("[]() ")) if part]
        if not isinstance(value, (list, tuple)):
            return _NO
        items = tuple(_as(typing.get_args(hint)[0], item) for item in value)
        return _NO if any(item is _NO for item in items) else items
    if isinstance(value, str) and hint is not str:
        value = value.strip()
        if hint in (bool, type(None)):
            value = _WORDS.get(value.lower(), _NO)
        else:
            try:
                value = float(value) if hint is float else int(value)
            except ValueError:
                return _NO
    if hint is type(None):
        return None if value is None else _NO
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, hint) and not (hint is int and isinstance(value, bool)) else _NO


def _name(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(map(_name, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_name(typing.get_args(hint)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}[hint]


def _check(key: Key, value: Any) -> None:
    for item in value if isinstance(value, tuple) else (value,):
        choices = key.choices or ()
        if type(item) in map(type, choices) and item not in choices:  # a number | "match" is free in its numbers
            raise OptionError(f"{key.name}: must be one of {', '.join(map(show, choices))}; got {show(item)}")
        if isinstance(item, float) and math.isnan(item):
            raise OptionError(f"{key.name}: must be a number, got {item}")
        if not isinstance(item, (int, float)):
            continue
        low, high, above, below = (key.limits[name] for name in ("minimum", "maximum", "above", "below"))
        if low is not None and item < low:
            raise OptionError(f"{key.name}: must be at least {low}, got {item}")
        if high is not None and item > high:
            raise OptionError(f"{key.name}: must be at most {high}, got {item}")
        if above is not None and item <= above:
            raise OptionError(f"{key.name}: must be above {above}, got {item}")
        if below is not None and item >= below:
            raise OptionError(f"{key.name}: must be below {below}, got {item}")


def split_override(text: str) -> tuple[str, str]:
    """("a.b", "c") of "a.b=c"."""
    name, _, value = text.partition("=")
    return name, value


# ---- YAML ------------------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """({"section.field": value}, {"section.field": the comment behind it}). That comment is the value's source."""
    try:
        text = path.read_text()
        node = yaml.compose(text)
        values = yaml.safe_load(text)
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise OptionError(f"{path}: must hold `section: {{key: value}}`, got {values!r}")
    comments: dict[str, str] = {}
    _comments(node, text.splitlines(), "", comments)
    return _leaves(values, ""), comments


def _leaves(values: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _comments(node: Any, lines: list[str], prefix: str, found: dict[str, str]) -> None:
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            _comments(value, lines, f"{prefix}{key.value}.", found)
        elif value.end_mark.line < len(lines):
            behind = lines[value.end_mark.line][value.end_mark.column :].strip()
            if behind.startswith("#"):
                found[prefix + key.value] = behind.lstrip("# ")


def to_yaml(config: Any) -> str:
    """The whole configuration, every value of it; `--config` reads it back."""
    nested: dict[str, Any] = {}
    for name, value in flatten(config).items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = list(value) if isinstance(value, tuple) else value
    return dump(nested)


def dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


# ---- help ------------------------------------------------------------------------------------------------------------


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def help_text(config: Any, origins: Mapping[str, str], width: int = 100) -> str:
    """Every value: its key, what it is now, what it means, its limits, and where it comes from."""
    lines, values, group = [], flatten(config), ""
    for key in keys(type(config)):
        if (head := key.name.rsplit(".", 1)[0]) != group:
            group = head
            lines += ["", f"  {group}:"]
        limits = [
            text + show(float(number))
            for name, text in (("minimum", ">= "), ("maximum", "<= "), ("above", "> "), ("below", "< "))
            if (number := key.limits[name]) is not None
        ]
        choices = [" | ".join(map(show, key.choices))] if key.choices else []
        where = origins.get(key.name) or key.source or "chosen here"
        about = "; ".join([key.help, *limits, *choices]) + f" [{where}]"
        head = f"    {key.name}={show(values[key.name])}"
        lines += [head] if len(head) > 37 else []
        lines += textwrap.wrap(
            about, width, initial_indent=" " * 40 if len(head) > 37 else head.ljust(40), subsequent_indent=" " * 40
        )
    return "\n".join(lines)
