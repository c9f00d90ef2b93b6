"""`vkd evaluate RUN` measures the stored students of a run again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from . import config as configs
from . import engine, report, runs, tasks
from .runs import RunError
from .task import Context, Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s RUN [section.key=value ...] [options]"
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, of one training or of many")
    parser.add_argument("--task", metavar="MODULE:CLASS", help="the task, where the run is of one of your own")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the numbers as JSON")


def students(folder: Path) -> list[Path]:
    """The folders of stored students in a run folder, or the folder itself."""
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}")
    weights = sorted(folder.rglob("student.safetensors"))
    if not (folders := [path.parent for path in weights if (path.parent / "config.yaml").exists()]):
        raise RunError(f"{folder} holds no student (no student.safetensors beside a config.yaml)")
    return folders


def rebuild(folder: Path, arguments: Any) -> tuple[Task, dict[str, Any]]:
    """(a finished training with its student's weights and no teacher, what config.yaml says of the run)."""
    values, _ = configs.read_yaml(folder / "config.yaml")
    head = {key: values.pop(key, None) for key in ("task", "arm", "seed", "versions")}
    name = arguments.task or head["task"]
    if not isinstance(name, str) or (not arguments.task and name not in tasks.NAMES):
        raise RunError(f"{folder} is of the task {name!r}: say --task {name} if that module may be imported")
    task = tasks.load(name)
    typed = dict(text.split("=", 1) for text in arguments.values)
    config: Any = configs.replace(task.Config(), values | typed)
    try:
        seed = int(head["seed"] or 0)
    except ValueError as error:
        raise RunError(f"{folder / 'config.yaml'}: seed is {head['seed']!r}") from error
    training = task(config, Context(engine.make_fabric(config.run, config.optim), folder, seed))
    engine.seed_all(seed)
    training.student = training.make_student()
    path = folder / "student.safetensors"
    runs.load_state(training.student, runs.load_weights(path), str(path))
    training.student.to(training.fabric.device).eval()
    return training, head


def command(arguments: argparse.Namespace) -> int:
    measured, rows = [], list[list[str]]()
    for folder in students(arguments.run):
        training, head = rebuild(folder, arguments)
        with torch.no_grad(), training.fabric.autocast():
            numbers = training.evaluate(training.student)
        recorded = runs.load_json(folder / "result.json") if (folder / "result.json").exists() else {}  # not finished
        pairs = [x for name, value in numbers.items() for x in (value, recorded.get(name))]
        rows = rows or [["student", *(text for name in numbers for text in (name, "recorded"))]]
        shown = [f"{x:.6g}" if isinstance(x, (int, float)) else "" for x in pairs]
        rows.append([f"{head['arm']} seed {head['seed']}", *shown])
        seed = int(head["seed"]) if head["seed"] else None
        measured.append({"folder": str(folder), "arm": head["arm"], "seed": seed, **numbers})
    print(report.align(rows))
    if arguments.output:
        runs.save_json(arguments.output, {"students": measured})
    return 0
