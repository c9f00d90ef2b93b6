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
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .runs import RunError

C = TypeVar("C", bound="Section")
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


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
Shares = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], BeforeValidator(_items)]
Words = Annotated[tuple[str, ...], BeforeValidator(_items)]
Channels = Annotated[Literal[1, 3], BeforeValidator(lambda x: int(x) if x in ("1", "3") else x)]

# ---- values by key ---------------------------------------------------------------------------------------------------


def fields(
    config: Section, prefix: str = "", sources: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Any, Any, str]]:
    """("section.name", its field, its value, the source of its default) of every value, in order."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        extra: Any = field.json_schema_extra
        if isinstance(value, Section):
            yield from fields(value, f"{prefix}{name}.", extra["sources"])
        else:
            yield prefix + name, field, value, (sources or {}).get(name, extra["source"])


def flatten(config: Section) -> dict[str, Any]:
    """{"section.name": value}, in order."""
    return {name: value for name, _, value, _ in fields(config)}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def replace(config: C, values: Mapping[str, Any]) -> C:
    """The configuration with some values replaced by key: types converted, limits checked, unknown keys refused."""
    known = flatten(config)
    for name in values:
        if name not in known:
            raise OptionError(f"unknown key {name!r}{nearest(name, known)}")
    try:
        return type(config).model_validate(nest(known | dict(values)))
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


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for a name that is nearly a known one, or the known ones where they are few."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    near = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1] or near
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}" if len(known) <= 12 else ""


# ---- YAML and help ---------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """({"section.name": text}, {"section.name": the comment behind it}). That comment is the value's source.

    Values are text, as they would be typed on the command line: what one means is its option's matter, not YAML's.
    """
    flat: dict[str, Any] = {}
    comments: dict[str, str] = {}

    def walk(node: Any, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"line {node.start_mark.line + 1} must hold `section: {{key: value}}`")
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")
                continue
            if name in flat:
                raise ValueError(f"line {key.start_mark.line + 1}: {name} is there twice")
            flat[name] = [v.value for v in value.value] if isinstance(value, yaml.SequenceNode) else value.value
            end = value.end_mark
            behind = lines[end.line][end.column :].strip() if end.line < len(lines) else ""
            if behind.startswith("#"):
                comments[name] = behind.lstrip("# ")

    try:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None:
            walk(root, "")
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not a configuration in YAML: {' '.join(str(error).split())[:300]}") from error
    return flat, comments


def dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def to_yaml(config: Section, head: Mapping[str, Any]) -> str:
    """The whole configuration, every value of it, below a head; `--config` reads it back."""
    flat = {**head, **flatten(config)}
    return dump(nest({name: list(v) if isinstance(v, tuple) else v for name, v in flat.items()}))


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def help_text(config: Section, origins: Mapping[str, str]) -> str:
    """Every value: its key, what it is now, what it means, its limits, and where it comes from."""
    lines = []
    for name, field, value, source in fields(config):
        limits = [
            f"{sign} {show(getattr(m, at))}" for m in field.metadata for at, sign in SIGNS.items() if hasattr(m, at)
        ]
        literals = [a for a in (field.annotation, *get_args(field.annotation)) if get_origin(a) is Literal]
        limits += [" | ".join(map(str, get_args(literal))) for literal in literals]
        about = "; ".join([field.description, *limits]) + f" [{origins.get(name, source)}]"
        head = f"{name}={show(value)}".ljust(38)
        lines.append(textwrap.fill(f"{head}  {about}", 110, initial_indent=" " * 4, subsequent_indent=" " * 44))
    return "\n".join(lines)
