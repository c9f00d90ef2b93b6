"""What a run has shown: paired statistics over the seeds, a table and a figure."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from .runs import write_bytes
from .task import Metric, ranks

# Okabe and Ito's palette: told apart with any color vision.
COLORS = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#666666", "#000000")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Where the numbers were made."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    commit, checkout = None, Path(__file__).parents[2]
    if (checkout / ".git").exists():
        describe = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        with contextlib.suppress(OSError):  # git is not installed
            commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    return {
        "cpu": cpu,
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **({"ranks": ranks()} if ranks() > 1 else {}),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in ("numpy", "lightning-fabric", "timm", "torchvision")},
        "vkd_kernels": __version__,
        "commit": commit,  # ends in -dirty with uncommitted changes
    }


# ---- statistics ------------------------------------------------------------------------------------------------------


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], higher_is_better: bool = True
) -> dict[str, Any]:
    """Mean of d = values - baseline, seed by seed, and the two-sided paired t-test of "it is zero" (one seed: None)."""
    from scipy.stats import ttest_rel

    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    mean, std = mean_and_std(differences)
    better = 1 if higher_is_better else -1
    return {
        "mean": mean,
        "std": std,
        "seeds": len(differences),
        "better": mean * better > 0,
        "seeds_better": sum(d * better > 0 for d in differences),
        "p": float(ttest_rel(values, baseline).pvalue) if std else None if std is None else float(mean == 0),
    }


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for several comparisons: each p times the number of comparisons not yet rejected, in order."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = corrected[index] = max(largest, min(1.0, p * (len(order) - rank)))
    return corrected


def summarize(
    results: Sequence[Mapping[str, Any]], labels: Mapping[str, str], metric: Metric, baseline: str
) -> dict[str, Any]:
    """For every arm: the metric, its paired difference to the baseline, with Holm's correction for all arms that are
    compared with it; diagnostics (the worst of the seeds), the mean curve, cost."""
    by_arm = {arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"]) for arm in labels}
    values = {arm: [r[metric.key] for r in rs] for arm, rs in by_arm.items()}
    others = [arm for arm in labels if arm != baseline]
    versus = {arm: paired_difference(values[arm], values[baseline], metric.higher_is_better) for arm in others}
    for difference, p in zip(versus.values(), holm([d["p"] for d in versus.values()]), strict=True):
        difference["p_holm"] = p
    summary: dict[str, Any] = {}
    for arm, rs in by_arm.items():
        mean, std = mean_and_std(values[arm])
        curves = [dict(r["curve"]) for r in rs]  # of which a --resume with another run.eval_every has other steps
        common = [step for step in curves[0] if all(step in curve for curve in curves)]
        summary[arm] = {
            "label": labels[arm],
            "mean": mean,
            "std": std,
            "values": values[arm],
            "minus_baseline": versus.get(arm),
            "curve": [(step, statistics.fmean(curve[step] for curve in curves)) for step in common],
            "diagnostics": {name: max(r["diagnostics"][name] for r in rs) for name in rs[0]["diagnostics"]},
            "steps": rs[0]["steps"],
            **{name: statistics.fmean(r[name] for r in rs) for name in ("seconds", "cpu_seconds")},
        }
    return summary


# ---- table -----------------------------------------------------------------------------------------------------------


def spread(mean: float, std: float | None, digits: int, sign: str = "") -> str:
    return f"{mean:{sign}.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")


def show_p(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, the first row as a head, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table(summary: Mapping[str, Any], metric: Metric, baseline: str) -> str:
    """One row per arm: the metric, its difference to the baseline with both p-values, diagnostics, cost."""
    diagnostics = list(dict.fromkeys(name for arm in summary.values() for name in arm["diagnostics"]))
    head = ["arm", metric.label, f"minus {baseline}", "better in", "p", "p Holm"]
    rows = [[*head, *diagnostics, "steps", "CPU s"]]
    for arm in summary.values():
        compared = ["(baseline)", "", "", ""]
        if d := arm["minus_baseline"]:
            compared = [spread(d["mean"], d["std"], metric.digits, "+"), f"{d['seeds_better']}/{d['seeds']}"]
            compared += [show_p(d["p"]), show_p(d["p_holm"])]
        numbers = [f"{arm['diagnostics'][d]:.1e}" if d in arm["diagnostics"] else "" for d in diagnostics]
        cost = [str(arm["steps"]), f"{arm['cpu_seconds']:.1f}"]
        rows.append([arm["label"], spread(arm["mean"], arm["std"], metric.digits), *compared, *numbers, *cost])
    seeds = len(summary[baseline]["values"])
    notes = (
        f"{metric.label}: {'higher' if metric.higher_is_better else 'lower'} is better. ±: standard deviation over the "
        f"{seeds} seeds. p: paired t-test over the seeds; Holm: corrected for all comparisons with the baseline."
    )
    return f"{align(rows)}\n\n{notes if seeds > 1 else 'One seed: no deviation and no test.'}"


# ---- figure ----------------------------------------------------------------------------------------------------------


def draw(path: Path, summary: Mapping[str, Any], metric: Metric) -> None:
    """Left: mean curves over training. Right: every seed's last value with mean and standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, max(3.6, 1.6 + 0.55 * len(summary))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    for row, arm in enumerate(summary.values()):
        color, values = COLORS[row % len(COLORS)], arm["values"]
        left.plot(*zip(*arm["curve"], strict=True), color=color, linewidth=2, marker=".")
        right.plot(values, [row + 0.1] * len(values), "o", color=color, alpha=0.5, markersize=5, markeredgewidth=0)
        right.errorbar(arm["mean"], row - 0.1, xerr=arm["std"], fmt="|", color=color, markersize=16, capsize=3)
    names = [f"{arm['label']}\n{spread(arm['mean'], arm['std'], metric.digits)}" for arm in summary.values()]
    right.set_yticks(range(len(summary)), names, fontsize=9)
    for row, label in enumerate(right.get_yticklabels()):  # of the left panel's curves, too
        label.set_color(COLORS[row % len(COLORS)])
    right.set_ylim(len(summary) - 0.5, -0.5)
    left.set(xlabel="training step", ylabel=f"{metric.label}, mean over the seeds")
    right.set_xlabel(f"{metric.label} ({'higher' if metric.higher_is_better else 'lower'} is better)")
    for axes in (left, right):
        axes.grid(color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_bytes(path, image.getvalue())
