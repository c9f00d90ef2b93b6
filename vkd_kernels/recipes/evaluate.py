"""`vkd evaluate RUN`: measures the stored students of a run again, on the same data or, with `a.b=c`, on others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from . import config as configs
from . import devices, engine, report, runs, tasks
from .compare import NOT_CONFIG
from .config import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, of one training or of many")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the numbers there, too")


def students(folder: Path) -> list[Path]:
    """The folders of stored students in a run folder, or the folder itself."""
    if not folder.is_dir():
        raise runs.RunError(f"there is no folder {folder}")
    found = sorted(
        path.parent for path in folder.rglob("student.safetensors") if (path.parent / "config.yaml").exists()
    )
    if not found:
        raise runs.RunError(f"{folder} holds no student (no student.safetensors beside a config.yaml)")
    return found


def rebuild(folder: Path, overrides: list[str]) -> tuple[Any, dict[str, Any]]:
    """(the Training of a finished run, with its student's weights and no teacher; what config.yaml says of the run)."""
    values, _ = configs.read_yaml(folder / "config.yaml")
    head = {key: value for key, value in values.items() if key.split(".")[0] in NOT_CONFIG}
    if not isinstance(head.get("task"), str):
        raise runs.RunError(f"{folder / 'config.yaml'} does not say which task it is of")
    task = tasks.load(head["task"])
    typed = dict(map(configs.split_override, overrides))
    config = configs.replace(task.Config(), {k: v for k, v in values.items() if k not in head} | typed)
    fabric = devices.make_fabric(config.run, config.optim)
    seed = int(head.get("seed", 0))
    context = engine.Context(fabric, folder, seed, runs.Worker())
    engine.seed_all(seed)
    training = task.build(config, seed, None, context)
    path = folder / "student.safetensors"
    runs.load_state(training.student, runs.load_safetensors(path), str(path))
    training.student.to(fabric.device).eval()
    return training, head | {"metric": task.PRIMARY, "fabric": fabric}


def measure(folder: Path, overrides: list[str]) -> dict[str, Any]:
    training, head = rebuild(folder, overrides)
    with torch.no_grad(), head["fabric"].autocast():
        metrics = training.evaluate(training.student)
    return {"folder": str(folder), "arm": head.get("arm"), "seed": head.get("seed"), **metrics}


def command(arguments: argparse.Namespace) -> int:
    try:
        found = [measure(folder, arguments.values) for folder in students(arguments.run)]
        results = [Path(one["folder"]) / "result.json" for one in found]
        recorded = [runs.load_json(path) if path.exists() else {} for path in results]  # {}: not finished
        names = [name for name in found[0] if name not in ("folder", "arm", "seed")]
        rows = [["student", *(text for name in names for text in (name, "recorded"))]]
        for now, then in zip(found, recorded, strict=True):
            pairs = [(now[name], then.get(name)) for name in names]
            rows.append([f"{now['arm']} seed {now['seed']}", *(_show(value) for pair in pairs for value in pair)])
        print(report.align(rows))
        if arguments.output:
            runs.save_json(arguments.output, found)
    except (runs.RunError, OptionError) as error:
        print(f"vkd: error: {error}", file=sys.stderr)
        return 2
    return 0


def _show(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
