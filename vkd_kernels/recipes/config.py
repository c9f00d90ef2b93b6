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
import operator
import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

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


UserPath = Annotated[str, AfterValidator(os.path.expanduser)]  # ~/data, as a shell leaves it in data.root=~/data
Ints = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_items)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_items)]
Shares = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], BeforeValidator(_items)]
Words = Annotated[tuple[str, ...], BeforeValidator(_items)]
Channels = Annotated[Literal[1, 3], BeforeValidator(lambda x: int(x) if x in ("1", "3") else x)]

# ---- values by key ---------------------------------------------------------------------------------------------------


def flatten(config: Section | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.name": value}, in order."""
    flat: dict[str, Any] = {}
    for name, value in (config.model_dump() if isinstance(config, Section) else config).items():
        inner = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def replace(config: C, values: Mapping[str, Any]) -> C:
    """The configuration with some values replaced by key: types converted, limits checked, unknown keys refused."""
    known, tree = flatten(config), config.model_dump()
    for name, value in values.items():
        if name not in known:
            raise OptionError(f"unknown key {name!r}{nearest(name, known)}")
        *path, last = name.split(".")
        reduce(operator.getitem, path, tree)[last] = value
    try:
        return type(config).model_validate(tree)
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
    typo, near = (difflib.get_close_matches(name, known, n=1, cutoff=cutoff) for cutoff in (0.9, 0.5))
    last = name.rsplit(".", 1)[-1].casefold()
    same = [k for k in known if k.rsplit(".", 1)[-1].casefold() == last]  # in another section, or another case
    near = typo or same[:1] or near
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}" if len(known) <= 12 else ""


# ---- YAML and help ---------------------------------------------------------------------------------------------------


class TextLoader(yaml.BaseLoader):
    """Values are text, as typed on a command line: what one means is its option's matter, not YAML's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if key.value in names[:number]:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is there twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """{"section.name": text}"""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), TextLoader) or {}
        if not isinstance(tree, dict):
            raise ValueError("it must hold `section: {key: value}`")
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{path} is not a configuration in YAML: {' '.join(str(error).split())[:300]}") from error
    return flatten(tree)


def to_yaml(*configs: Section) -> str:
    """Every value of one configuration after another; `read_yaml` reads them back."""
    tree = {name: value for config in configs for name, value in config.model_dump(mode="json").items()}
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def help_text(
    config: Section, origins: Mapping[str, str], prefix: str = "", sources: Mapping[str, str] | None = None
) -> str:
    """Every value: its key, what it is now, what it means, its limits, and where it comes from."""
    lines = []
    for name, field in type(config).model_fields.items():
        key, value, extra = prefix + name, getattr(config, name), dict[str, Any](field.json_schema_extra)  # type: ignore
        if isinstance(value, Section):
            lines.append(help_text(value, origins, f"{key}.", extra["sources"]))
            continue
        limits = [f"{sign} {getattr(m, at)}" for m in field.metadata for at, sign in SIGNS.items() if hasattr(m, at)]
        literals = [a for a in (field.annotation, *get_args(field.annotation)) if get_origin(a) is Literal]
        limits += [" | ".join(map(str, get_args(literal))) for literal in literals]
        source = origins.get(key) or (sources or {}).get(name) or extra["source"]
        text = f"{key}={show(value)}".ljust(38) + f"  {'; '.join([str(field.description), *limits])} [{source}]"
        lines.append(textwrap.fill(text, 110, initial_indent=" " * 4, subsequent_indent=" " * 44))
    return "\n".join(lines)
