"""`vkd inspect RUN`: the metrics that a run logged, as a figure and a table of first, last and best values.

RUN is a run folder, a folder of such folders (their names are the arms, and seed-00, seed-01, ... runs of one arm), or
a file. Metrics are lines of JSON, `{"step": 10, "train/loss": 0.5, ...}`, in files named metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from .report import COLORS, align, new_figure, save_figure
from .runs import RunError, write_text

FILE = "metrics.jsonl"
EXAMPLE = '{"step": 10, "train/loss": 0.5}'
LOWER_IS_BETTER = re.compile(r"loss|error|fid|frechet|distance|seconds|train/")
STYLES = ("-", "--", ":", "-.")

Curve = dict[int, float]  # step -> value
Runs = dict[str, list[dict[str, Curve]]]  # arm -> for every run of it, metric -> curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help=f"a run folder, a folder of them, or a {FILE}")


def command(arguments: argparse.Namespace) -> int:
    figure = inspect(arguments.run)
    print(figure.with_suffix(".txt").read_text(encoding="utf-8"), end="")
    print(f"\nfigure: {figure}")
    return 0


def inspect(run: Path) -> Path:
    """Writes inspect.png and inspect.txt into the folder; returns the path of the figure."""
    runs = load(run)
    figure = (run.parent if run.is_file() else run) / "inspect.png"
    draw(figure, runs)
    write_text(figure.with_suffix(".txt"), table(runs) + "\n")
    return figure


def load(run: Path) -> Runs:
    files = [run] if run.is_file() else sorted(run.rglob(FILE))
    if not files:
        raise RunError(f"there is no {FILE} in {run}" + ("" if run.exists() else ", which does not exist"))
    runs: Runs = {}
    for path in files:
        curves: dict[str, Curve] = {}
        for record in records(path):
            for name, value in record.items():
                if name not in ("step", "epoch", "images") and is_number(value):
                    curves.setdefault(name, {})[record["step"]] = value  # of a step logged twice the later one
        if curves:
            arm = "" if path == run else re.sub(r"(^|/)seed-\d+$", "", path.parent.relative_to(run).as_posix())
            runs.setdefault("" if arm == "." else arm, []).append(curves)
    if not runs:
        raise RunError(f"no metrics in {', '.join(map(str, files))}; they are lines like {EXAMPLE}")
    return runs


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut short is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not is_number(record["step"]) or not math.isfinite(record["step"]):
                raise ValueError
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            if number == len(lines):
                break
            raise RunError(f"{path}, line {number}: must be like {EXAMPLE}; got {line:.200}") from error
        parsed.append(record)
    return parsed


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def place(name: str) -> tuple[str, str]:
    """(panel, line in it): losses of pairs with the total, one diagnostic of all pairs, student beside teacher."""
    prefix, slash, pair = name.partition("loss/")
    if slash and (not prefix or prefix.endswith("/")):
        return f"{prefix}loss", pair
    line = ""
    if name.startswith("diagnostics/") and name.count("/") > 1:
        line, _, name = name.removeprefix("diagnostics/").rpartition("/")
        name = f"diagnostics/{name}"
    side = re.search(r"_(student|teacher)$", name)
    return name.removesuffix(side[0] if side else ""), " ".join(filter(None, [line, side[1] if side else ""]))


def panels(runs: Runs) -> dict[str, dict[str, str]]:
    """panel -> line -> metric, panels in the order of their prefixes: training, evaluation, diagnostics, others."""
    order = ("train", "loss", "eval", "diagnostics")
    places: dict[str, dict[str, str]] = {}
    for name in sorted({name for arm in runs.values() for run in arm for name in run}):
        panel, line = place(name)
        places.setdefault(panel, {})[line] = name
    rank = {p: order.index(q) if (q := p.partition("/")[0]) in order else len(order) for p in places}
    return {panel: places[panel] for panel in sorted(places, key=lambda p: (rank[p], p))}


def table(runs: Runs) -> str:
    rows = [["metric", "arm", "first", "last", "best", "at step"]]
    for name in (name for lines in panels(runs).values() for name in lines.values()):
        for arm, several in runs.items():
            curves = [{s: v for s, v in run.get(name, {}).items() if math.isfinite(v)} for run in several]
            if not (curves := [curve for curve in curves if curve]):
                continue
            best = [(min if LOWER_IS_BETTER.search(name) else max)(c, key=c.__getitem__) for c in curves]
            ends = ([min(c) for c in curves], [max(c) for c in curves], best)
            values = [statistics.fmean(c[step] for c, step in zip(curves, steps, strict=True)) for steps in ends]
            rows.append([name, arm, *(f"{v:.4g}" for v in values), "-".join(map(str, sorted({min(best), max(best)})))])
    most = max(map(len, runs.values()))
    means = f"; means over {most} runs" if most > 1 else ""
    return f"{align(rows)}\n\nbest: the lowest loss, error, FID, distance or time, the highest of anything else{means}"


def draw(path: Path, runs: Runs) -> None:
    """A panel per metric. Colors are arms, or the lines of a panel where there is one arm; then dashes are lines."""
    shown = panels(runs)
    columns = min(3, len(shown))
    figure = new_figure(4.2 * columns, 3.0 * -(-len(shown) // columns))
    grid = figure.subplots(-(-len(shown) // columns), columns, squeeze=False).flat
    for axes in grid[len(shown) :]:
        axes.remove()
    for axes, (panel, lines) in zip(grid, shown.items(), strict=False):
        for a, (arm, several) in enumerate(runs.items()):
            for i, (line, name) in enumerate(lines.items()):
                for number, curve in enumerate(run[name] for run in several if name in run):
                    label = ", ".join(filter(None, [arm, line])) if number == 0 else None
                    color, style = COLORS[(a if len(runs) > 1 else i) % len(COLORS)], STYLES[i % len(STYLES)]
                    steps = sorted(curve)
                    axes.plot(steps, [curve[s] for s in steps], style, color=color, label=label or None)
        axes.set_title(panel, fontsize=10, loc="left")
        axes.grid(axis="y", color="#e5e5e5")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7, frameon=False)
    save_figure(path, figure)
