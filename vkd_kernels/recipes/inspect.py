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
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .report import COLOURS, new_figure, save_figure
from .runs import RunError, load_json_lines, write_text

FILE = "metrics.jsonl"
EXAMPLE = '{"step": 10, "train/loss": 0.5}'
NO_METRICS = ("step", "epoch", "images")
LOWER_IS_BETTER = re.compile(r"loss|error|fid|distance|seconds")
STYLES = ("-", "--", ":", "-.")

Curve = dict[int, float]  # step -> value
Runs = dict[str, list[dict[str, Curve]]]  # arm -> for every run of it, metric -> curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help=f"a run folder, a folder of them, or a {FILE}")
    parser.add_argument("-h", "--help", action="help", help="this")


def command(arguments: argparse.Namespace) -> int:
    try:
        if arguments.values:
            raise RunError(f"inspect takes no values; got {' '.join(arguments.values)}")
        figure = inspect(arguments.run)
    except RunError as error:
        print(f"vkd: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"vkd: error: {error.name} is missing: pip install 'vkd_kernels[recipes]'", file=sys.stderr)
        return 2
    print(figure.with_suffix(".txt").read_text(), end="")
    print(f"\nfigure: {figure}")
    return 0


def inspect(run: Path) -> Path:
    """Writes inspect.png and inspect.txt into the folder; returns the path of the figure.

    Raises:
        RunError: there are no metrics to show; the message says where they were looked for.
    """
    found = load(run)
    figure = (run.parent if run.is_file() else run) / "inspect.png"
    draw(figure, found)
    write_text(figure.with_suffix(".txt"), table(found) + "\n")
    return figure


def load(run: Path) -> Runs:
    files = [run] if run.is_file() else sorted(run.rglob(FILE))
    if not files:
        raise RunError(f"there is no {FILE} in {run}" + ("" if run.exists() else ", which does not exist"))
    found: Runs = {}
    for path in files:
        curves: dict[str, Curve] = {}
        for record in _records(path):
            for name, value in record.items():
                if name not in NO_METRICS and _is_number(value):
                    curves.setdefault(name, {})[record["step"]] = value  # of a step logged twice the later one
        if curves:
            parts = [] if path == run else list(path.parent.relative_to(run).parts)
            if parts and re.fullmatch(r"seed-\d+", parts[-1]):
                parts.pop()
            found.setdefault("/".join(parts), []).append(curves)
    if not found:
        raise RunError(f"no metrics in {', '.join(map(str, files))}; they are lines like {EXAMPLE}")
    return found


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        records = load_json_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    for record in records:
        if not isinstance(record, dict) or not _is_number(record.get("step")) or not math.isfinite(record["step"]):
            raise RunError(f"{path}: every line must be like {EXAMPLE}; got {json.dumps(record):.200}")
    return records


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def place(name: str) -> tuple[str, str]:
    """(panel, line in it): losses of pairs with the total, one diagnostic of all pairs, student beside teacher."""
    prefix, slash, pair = name.partition("loss/")
    if slash and (not prefix or prefix.endswith("/")):
        return f"{prefix}loss", pair
    if name.startswith("diagnostics/") and name.count("/") > 1:
        pair, _, name = name.removeprefix("diagnostics/").rpartition("/")
        name = f"diagnostics/{name}"
    else:
        pair = ""
    side = re.search(r"_(student|teacher)$", name)
    return name.removesuffix(side[0] if side else ""), " ".join(filter(None, [pair, side[1] if side else ""]))


def panels(found: Runs) -> dict[str, dict[str, str]]:
    """panel -> line -> metric, panels in the order of their prefixes: training, evaluation, diagnostics, others."""
    places: dict[str, dict[str, str]] = {}
    for name in sorted({name for arm in found.values() for run in arm for name in run}):
        panel, line = place(name)
        places.setdefault(panel, {})[line] = name
    prefixes = ("train", "loss", "eval", "diagnostics")

    def order(panel: str) -> tuple[int, str]:
        prefix = panel.partition("/")[0]
        return prefixes.index(prefix) if prefix in prefixes else len(prefixes), panel

    return {panel: places[panel] for panel in sorted(places, key=order)}


# ---- text ------------------------------------------------------------------------------------------------------------


def table(found: Runs) -> str:
    head = ["metric", "arm", "first", "last", "best", "at step"]
    rows = []
    for name in (name for lines in panels(found).values() for name in lines.values()):
        for arm, several in found.items():
            curves = [curve for run in several if (curve := _finite(run.get(name, {})))]
            if not curves:
                continue
            best = [(min if LOWER_IS_BETTER.search(name) else max)(c, key=c.__getitem__) for c in curves]
            values = [
                statistics.fmean(c[step] for c, step in zip(curves, steps, strict=True))
                for steps in ([min(c) for c in curves], [max(c) for c in curves], best)
            ]
            at = "-".join(map(str, sorted({min(best), max(best)})))
            rows.append([name, arm, *(f"{value:.4g}" for value in values), at])
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join([*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:], widths[2:])]) for row in [head, *rows]
    ]
    runs = max(len(several) for several in found.values())
    footer = "best: the lowest loss, error, FID, distance or time, the highest of anything else" + (
        f"; means over {runs} runs" if runs > 1 else ""
    )
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", footer])


def _finite(curve: Curve) -> Curve:
    return {step: value for step, value in curve.items() if math.isfinite(value)}


# ---- figure ----------------------------------------------------------------------------------------------------------


def draw(path: Path, found: Runs) -> None:
    """A panel per metric. Colours are arms, or the lines of a panel where there is one arm; then dashes are lines."""
    shown = panels(found)
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(4.2 * columns, 3.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    for axes, (panel, lines) in zip(grid.flat, shown.items(), strict=False):
        smallest = math.inf
        for label, colour, style, curve in _lines(found, lines):
            steps = sorted(curve)
            values = [curve[step] for step in steps]
            smallest = min([smallest, *filter(math.isfinite, values)])
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, values, style, color=colour, label=label, marker=marker, markersize=4, linewidth=1.5)
        if "error" in panel and smallest > 0:
            axes.set_yscale("log")
        axes.set_title(panel, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True) if label}
        if len(handles) > 1 or (handles and len(found) > 1):
            axes.legend(handles.values(), handles.keys(), fontsize=7, frameon=False)
    save_figure(path, figure)


def _lines(found: Runs, lines: dict[str, str]) -> Iterator[tuple[str, str, str, Curve]]:
    """(label, colour, style, curve) of every line of a panel."""
    for a, (arm, several) in enumerate(found.items()):
        for i, (line, name) in enumerate(lines.items()):
            for run in several:
                if name in run:
                    label = ", ".join(filter(None, [arm, line])) or ("total" if len(lines) > 1 else "")
                    colour = COLOURS[(a if len(found) > 1 else i) % len(COLOURS)]
                    yield label, colour, STYLES[i % len(STYLES)] if len(found) > 1 else "-", run[name]
