"""Configurations: pydantic models that know their help, limits and source; YAML files and `a.b=c` on top of them.

class Data(Section):
    root: str = option("", "folder of the images")
    labels: int = option(10, "labeled images per class", ge=1, source="tuned on seeds 0-3")

class Config(Section):
    data: Data = section(Data)
    optim: Optim = section(Optim, lr=3e-3, source="tuned on seeds 0-3")  # other defaults than Optim's
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .runs import RunError

C = TypeVar("C", bound="Section")


class OptionError(RunError, ValueError):
    """A value the user gave that cannot be; the message names the option."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def option(default: Any, help: str, *, source: str = "chosen here", **limits: Any) -> Any:
    """A field. Limits are pydantic's: ge, gt, le, lt. `source` says where the default comes from."""
    return Field(default, description=help, json_schema_extra={"source": source}, **limits)


def section(kind: type[Section], *, source: str = "chosen for this task", **defaults: Any) -> Any:
    """A field that holds a section, with other defaults than its own, which come from `source`."""
    extra: Any = {"sources": dict.fromkeys(defaults, source)}
    return Field(default_factory=lambda: kind(**defaults), json_schema_extra=extra)


def _items(value: Any) -> Any:
    """ "1,2" and "[1, 2]" are lists, as typed on a command line."""
    return [x for x in re.split(r"[\s,]+", value.strip("[]() ")) if x] if isinstance(value, str) else value


Ints = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_items)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_items)]
Words = Annotated[tuple[str, ...], BeforeValidator(_items)]
Channels = Annotated[Literal[1, 3], BeforeValidator(lambda x: int(x) if x in ("1", "3") else x)]

# ---- keys ------------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    help: str
    source: str
    limits: list[str]


def keys(kind: type[Section], prefix: str = "", sources: Mapping[str, str] | None = None) -> Iterator[tuple[str, Key]]:
    """("section.field", what is known of it) for every value of a configuration, in order."""
    for name, field in kind.model_fields.items():
        extra: Any = field.json_schema_extra
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}{name}.", extra["sources"])
            continue
        signs = {"ge": ">= ", "gt": "> ", "le": "<= ", "lt": "< "}
        limits = [s + show(getattr(m, at)) for m in field.metadata for at, s in signs.items() if hasattr(m, at)]
        yield (
            prefix + name,
            Key(
                field.description or "",
                (sources or {}).get(name, extra["source"]),
                limits + [" | ".join(map(show, choices)) for choices in [list(_choices(field.annotation))] if choices],
            ),
        )


def _choices(annotation: Any) -> Iterator[Any]:
    """The values of every Literal in it."""
    for part in get_args(annotation):
        yield from _choices(part)
        if str(get_origin(annotation)) == "typing.Literal":
            yield part


def flatten(config: Section, prefix: str = "") -> dict[str, Any]:
    """{"section.field": value}, in order."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name: value}
    return flat


def replace(config: C, values: Mapping[str, Any]) -> C:
    """The configuration with some values replaced by key: types converted, limits checked, unknown keys refused."""
    known = flatten(config)
    for name in values:
        if name not in known:
            raise OptionError(f"unknown key {name!r}{nearest(name, known)}")
    nested = nest(known | dict(values))
    try:
        return type(config).model_validate(nested)
    except ValidationError as error:
        raise OptionError("; ".join(dict.fromkeys(_said(e, known) for e in error.errors()))) from error


def _said(error: Any, known: Iterable[str]) -> str:
    if error["type"] == "value_error":  # a check of ours, which names its option
        return str(error["ctx"]["error"])
    path = [str(part) for part in error["loc"]]
    names = [".".join(path[:n]) for n in range(len(path), 0, -1)]
    name = next((n for n in names if n in known), names[0])
    message = error["msg"].replace("Input should be", "must be")
    return f"{name}: {message}, got {str(error['input'])[:80]!r}"


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for a name that is nearly a known one, or the known ones where they are few."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    near = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1] or near
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}" if len(known) <= 12 else ""


# ---- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Refuses what a configuration has no use for: aliases (which can be endless) and a key that is there twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1} has an alias")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        if twice := [str(name) for name in names if names.count(name) > 1]:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice[0]} is there twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """({"section.field": text}, {"section.field": the comment behind it}). That comment is the value's source."""
    flat: dict[str, Any] = {}
    comments: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, _Loader)
        if values is not None and not isinstance(values, dict):
            raise yaml.YAMLError(f"it must hold `section: {{key: value}}`, got {values!s:.80}")
        if values:
            _leaves(values, yaml.compose(text, _Loader), text.splitlines(), "", flat, comments)
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError) as error:
        raise OptionError(f"{path} is not a configuration in YAML: {' '.join(str(error).split())[:300]}") from error
    return flat, comments


def _leaves(values: Any, node: Any, lines: list[str], prefix: str, flat: dict, comments: dict) -> None:
    for (name, value), (_, at) in zip(values.items(), node.value, strict=True):
        if isinstance(value, dict) and value:
            _leaves(value, at, lines, f"{prefix}{name}.", flat, comments)
            continue
        flat[f"{prefix}{name}"] = [_typed(v) for v in value] if isinstance(value, list) else _typed(value)
        behind = lines[at.end_mark.line][at.end_mark.column :].strip() if at.end_mark.line < len(lines) else ""
        if behind.startswith("#"):
            comments[f"{prefix}{name}"] = behind.lstrip("# ")


def _typed(value: Any) -> Any:
    """As it would be typed on the command line: what it means is the option's matter, not YAML's."""
    return show(value) if isinstance(value, (bool, int, float)) else str(value)


def dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def to_yaml(config: Section, head: Mapping[str, Any]) -> str:
    """The whole configuration, every value of it, below a head; `--config` reads it back."""
    flat = {**head, **flatten(config)}
    return dump(nest({name: list(v) if isinstance(v, tuple) else v for name, v in flat.items()}))


# ---- help ------------------------------------------------------------------------------------------------------------


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def help_text(config: Section, origins: Mapping[str, str], width: int = 100) -> str:
    """Every value: its key, what it is now, what it means, its limits, and where it comes from."""
    lines, values, group = [], flatten(config), ""
    for name, key in keys(type(config)):
        if (head := name.rsplit(".", 1)[0]) != group:
            group = head
            lines += ["", f"  {group}:"]
        about = "; ".join([key.help, *key.limits]) + f" [{origins.get(name) or key.source}]"
        head = f"    {name}={show(values[name])}"
        lines += [head] if len(head) > 37 else []
        first = " " * 40 if len(head) > 37 else head.ljust(40)
        lines += textwrap.wrap(about, width, initial_indent=first, subsequent_indent=" " * 40)
    return "\n".join(lines)
