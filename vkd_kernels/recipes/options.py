"""A recipe's configuration: one dataclass whose fields are its command-line options, with help, limits and defaults."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any


class OptionError(ValueError):
    """A value the user gave that cannot be; the message names the option."""


def option(default: Any, help: str, *, minimum: float | None = None, above: float | None = None, choices: Any = None):
    """A dataclass field that is also the option --field-name. A tuple takes several values."""
    metadata = {"help": help, "minimum": minimum, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, config: type, title: str) -> None:
    """Only what the user typed ends up in the namespace, so that --resume can tell it from a default."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(config):
        value: Any = field.default
        several = isinstance(value, tuple)
        default = " ".join(map(str, value)) if several else value
        group.add_argument(
            flag(field.name),
            type=type(value[0] if several else value),
            nargs="+" if several else None,
            default=argparse.SUPPRESS,
            metavar=field.name.rsplit("_", 1)[-1].upper(),
            help=f"{field.metadata['help']} (default: {default})",
        )


def typed_options(arguments: argparse.Namespace, config: type) -> dict[str, Any]:
    found = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(config) if hasattr(arguments, f.name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def check_options(config: Any) -> None:
    """Call from __post_init__: every value within its limits, or an OptionError that names the option."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        for item in value if isinstance(value, tuple) else (value,):
            if limits["choices"] is not None and item not in limits["choices"]:
                raise OptionError(
                    f"{flag(field.name)}: unknown {item!r}; choose from {', '.join(map(str, limits['choices']))}"
                )
            if limits["minimum"] is not None and not item >= limits["minimum"]:
                raise OptionError(f"{flag(field.name)}: must be at least {limits['minimum']}, got {item}")
            if limits["above"] is not None and not item > limits["above"]:
                raise OptionError(f"{flag(field.name)}: must be above {limits['above']}, got {item}")
