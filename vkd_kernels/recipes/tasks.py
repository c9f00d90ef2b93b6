"""What a task is: a module with the names below, such as classification/, detection/ and generation/ beside this file.

TITLE: str                              first line of its help
Config: type                            nested frozen dataclass with the sections optim (engine.Optim), run
                                        (engine.Run), distill, and whatever else it needs (config.py)
ARMS: dict[str, Arm]                    the ways to distil that it knows
DEFAULTS: Defaults                      what its bundled recipe compares
PRIMARY: Metric                         the number of evaluate()'s that tables and tests compare
build(config, seed, teacher_folder, context) -> engine.Training
train_teacher(config, seed, folder, context) -> dict of numbers to show, or None
                                        or the name is None: the teacher's weights come from elsewhere
describe(config) -> dict                for --dry-run: model sizes, feature shapes, steps
UNUSED_PARAMETERS: bool                 optional: some parameters get no gradient in some backward passes
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import OptionError, nearest, replace

NAMES = ("classification", "detection", "generation")
CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Arm:
    """One way to train the student: what it changes in the configuration, and how much longer it trains."""

    label: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    longer: float = 1.0  # times as many steps: to take at least as long as the arm it is compared with

    def apply(self, config: Any) -> Any:
        changed = replace(config, self.overrides)
        if self.longer == 1.0:
            return changed
        optim = changed.optim
        if optim.steps:
            return replace(changed, {"optim.steps": round(optim.steps * self.longer)})
        return replace(changed, {"optim.epochs": optim.epochs * self.longer})


@dataclass(frozen=True)
class Defaults:
    """What a recipe compares unless the command line says otherwise."""

    arms: tuple[str, ...]
    seeds: int
    baseline: str
    focus: tuple[str, ...] = ("vkd",)  # the arms whose differences to the others are said in words


@dataclass(frozen=True)
class Metric:
    key: str  # in what evaluate() returns
    label: str
    higher_is_better: bool = True
    digits: int = 1
    unit: str = "points"  # of a difference


def load(name: str) -> Any:
    """The task of that name, or any importable module that is one."""
    if name in NAMES:
        return importlib.import_module(f"vkd_kernels.recipes.{name}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise OptionError(f"unknown task {name!r}{nearest(name, NAMES)} ({error})") from error


def recipes(name: str) -> dict[str, Path]:
    """Names and files of a task's recipes."""
    folder = CONFIGS / name if name in NAMES else Path(str(load(name).__file__)).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
