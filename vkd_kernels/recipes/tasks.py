"""Which tasks there are: the three built-in ones, and any that a command line names as package.module:Class."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from .config import OptionError, nearest, read_yaml
from .task import Task

NAMES = ("classification", "detection", "generation")


def load(name: str) -> type[Task]:
    """The task of that name. Only call it with what was typed: a task of one's own is imported."""
    if name == "classification":
        from .classification import Classification

        return Classification
    if name == "detection":
        from .detection import Detection

        return Detection
    if name == "generation":
        from .generation import Generation

        return Generation
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise OptionError(
            f"TASK: unknown {name!r}{nearest(name, NAMES)}; a task of your own is named package.module:Class"
        )
    if (folder := os.getcwd()) not in sys.path:  # as `python -m` has it; the script `vkd` does not
        sys.path.insert(0, folder)
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise OptionError(f"TASK: cannot import {name}: {error}") from error
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise OptionError(f"TASK: {name} is no subclass of vkd_kernels.recipes.task.Task")
    return task


def recipes(task: type[Task]) -> dict[str, Path]:
    """Names and files of a task's recipes."""
    return {path.stem: path for path in sorted(task.recipes.glob("*.yaml"))} if task.recipes else {}


def read_recipe(task: type[Task], name: str) -> dict[str, Any]:
    """The values of a recipe. `like: NAME` begins with those of another."""
    known = recipes(task)
    if name not in known:
        raise OptionError(f"--recipe: unknown {name!r}; there is {', '.join(known) or 'none'}")
    values = read_yaml(known[name])
    return read_recipe(task, values.pop("like")) | values if "like" in values else values
