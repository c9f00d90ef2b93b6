"""`vkd ablate TASK`: every projection with every normalisation, over seeds: a table, paired tests in words, figure."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import compare, report, runs, tasks
from .compare import Design, Experiment
from .config import flatten
from .tasks import Arm, Defaults

PROJECTIONS = ("orthogonal", "linear", "none")
NORMALIZATIONS = ("layer_norm", "batch_norm", "whiten", "none")

add_arguments = compare.add_arguments


def cells(task: Any) -> dict[str, Arm]:
    """Every cell of the table as an arm: what the task's "vkd" arm is, but for these two."""
    base = task.ARMS["vkd"].overrides
    return {
        f"{p}-{n}": Arm(f"{p}, {n}", {**base, "distill.projection": p, "distill.normalization": n})
        for p in PROJECTIONS
        for n in NORMALIZATIONS
    }


def choose(task: Any, config: Any, named: bool) -> Defaults:
    """All cells, compared with the orthogonal projection and the task's own normalisation."""
    own = flatten(task.ARMS["vkd"].apply(config))["distill.normalization"]
    baseline = f"orthogonal-{own}"
    return Defaults(tuple(cells(task)), 1 if named else task.DEFAULTS.seeds, baseline, focus=(baseline,))


def finish(folder: Path, experiment: Experiment) -> str:
    """What `vkd distill` writes too, with a figure of the cells and a table of them above the list."""
    text = compare.finish(folder, experiment)
    metric = tasks.load(experiment.task).PRIMARY
    summary = runs.load_json(folder / "metrics.json")["summary"]
    text = f"{grid(summary, metric)}\n\n{text}\n\n{verdicts(summary, experiment.labels(), experiment.baseline)}"
    runs.write_text(folder / "table.txt", text + "\n")
    draw(folder / "figure.png", summary, metric, experiment.baseline)
    return text


def grid(summary: Mapping[str, Any], metric: tasks.Metric) -> str:
    """Means and deviations: a row per projection, a column per normalisation."""
    rows = [[f"{metric.label}", *NORMALIZATIONS]]
    for projection in PROJECTIONS:
        found = [summary.get(f"{projection}-{n}") for n in NORMALIZATIONS]
        rows.append([projection, *(report.spread(c["mean"], c["std"], metric.digits) if c else "" for c in found)])
    return report.align(rows)


def verdicts(summary: Mapping[str, Any], labels: Mapping[str, str], baseline: str) -> str:
    """Which cells differ from the baseline by more than chance, after Holm's correction for all of them."""
    others = [arm for arm in summary if arm != baseline]
    corrected = dict(zip(others, report.holm([summary[a]["versus"][baseline]["p"] for a in others]), strict=True))
    if not others or all(p is None for p in corrected.values()):
        return "Nothing is tested: that takes two cells and two seeds."
    kinds: dict[str, list[str]] = {"better than": [], "worse than": [], "not significantly different from": []}
    for arm in others:
        better = "better than" if summary[arm]["versus"][baseline]["better"] else "worse than"
        kind = better if report.significant(corrected[arm]) else "not significantly different from"
        kinds[kind].append(labels[arm])
    lines = [f"At {report.LEVEL}, after Holm's correction for {len(others)} comparisons with ({labels[baseline]}):"]
    lines += [f"  {kind} it: {'; '.join(names) or 'none'}" for kind, names in kinds.items()]
    return "\n".join(lines)


def draw(path: Path, summary: Mapping[str, Any], metric: tasks.Metric, baseline: str) -> None:
    """A heat map; the baseline is framed, cells that differ from it after Holm's correction have a star."""
    import math

    others = [arm for arm in summary if arm != baseline]
    corrected = dict(zip(others, report.holm([summary[a]["versus"][baseline]["p"] for a in others]), strict=True))
    means = [[summary.get(f"{p}-{n}", {}).get("mean", math.nan) for n in NORMALIZATIONS] for p in PROJECTIONS]
    figure = report.new_figure(8.4, 4.2)
    axes = figure.subplots()
    image = axes.imshow(means, cmap="viridis" if metric.higher_is_better else "viridis_r", aspect="auto")
    known = [mean for row in means for mean in row if not math.isnan(mean)]
    middle = (min(known) + max(known)) / 2
    for row, projection in enumerate(PROJECTIONS):
        for column, normalization in enumerate(NORMALIZATIONS):
            arm = f"{projection}-{normalization}"
            if arm not in summary:
                continue
            mean, std = summary[arm]["mean"], summary[arm]["std"]
            star = " *" if report.significant(corrected.get(arm)) else ""
            dark = (mean < middle) == metric.higher_is_better
            axes.text(
                column, row, report.spread(mean, std, metric.digits) + star, ha="center", va="center",
                color="white" if dark else "black", fontweight="bold" if arm == baseline else "normal",
            )  # fmt: skip
            if arm == baseline:
                axes.add_patch(_frame(column, row))
    axes.set_xticks(range(len(NORMALIZATIONS)), NORMALIZATIONS)
    axes.set_yticks(range(len(PROJECTIONS)), PROJECTIONS)
    axes.set(xlabel="normalisation", ylabel="projection")
    better = "higher" if metric.higher_is_better else "lower"
    axes.set_title(
        f"{metric.label}, mean ± std ({better} is better); framed: the method; * differs from it", fontsize=10
    )
    figure.colorbar(image)
    report.save_figure(path, figure)


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, fill=False, edgecolor="#D55E00", linewidth=3)


ABLATE = Design("ablate", cells, choose, finish)


def command(arguments: argparse.Namespace) -> int:
    return compare.command(arguments, ABLATE)
