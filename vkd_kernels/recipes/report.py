"""What a run found, for people: paired statistics over the seeds, a table, the same in words, and a figure."""

from __future__ import annotations

import io
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .runs import write_atomically
from .task import Metric

LEVEL = 0.05
# Okabe and Ito's palette: told apart with any color vision.
COLORS = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#666666", "#000000")


# ---- statistics ------------------------------------------------------------------------------------------------------


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], higher_is_better: bool = True
) -> dict[str, Any]:
    """Mean of d = values - baseline, seed by seed, and the two-sided paired t-test of "it is zero" (one seed: None)."""
    from scipy.stats import ttest_rel

    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    mean = statistics.fmean(differences)
    std = statistics.stdev(differences) if len(differences) > 1 else None
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


def summarize(results: Sequence[Mapping[str, Any]], arms: Sequence[str], metric: Metric) -> dict[str, Any]:
    """For every arm: the metric, diagnostics (the worst of the seeds), cost, its paired difference to every other."""
    by_arm = {arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"]) for arm in arms}
    values = {arm: [r[metric.key] for r in rs] for arm, rs in by_arm.items()}
    summary: dict[str, Any] = {}
    for arm, rs in by_arm.items():
        versus = {o: paired_difference(values[arm], values[o], metric.higher_is_better) for o in arms if o != arm}
        for difference, p in zip(versus.values(), holm([d["p"] for d in versus.values()]), strict=True):
            difference["p_holm"] = p
        costs = {k: statistics.fmean(r[k] for r in rs) for k in ("seconds", "cpu_seconds", "images_per_second")}
        summary[arm] = {
            "mean": statistics.fmean(values[arm]),
            "std": statistics.stdev(values[arm]) if len(rs) > 1 else None,
            "values": values[arm],
            "steps": rs[0]["steps"],
            **costs,
            "versus": versus,
            "diagnostics": {name: max(r["diagnostics"][name] for r in rs) for name in rs[0]["diagnostics"]},
        }
    return summary


def machine() -> dict[str, Any]:
    """Where the numbers were made."""
    import torch

    import vkd_kernels

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    checkout, commit = Path(vkd_kernels.__file__).parents[1], None
    if (checkout / ".git").exists():
        describe = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    packages = {name: installed.get(name) for name in ("numpy", "lightning-fabric", "timm", "torchvision")}
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **packages,
        "vkd_kernels": vkd_kernels.__version__,
        "commit": commit,  # ends in -dirty with uncommitted changes
    }


# ---- text ------------------------------------------------------------------------------------------------------------


def spread(mean: float, std: float | None, digits: int, sign: str = "") -> str:
    return f"{mean:{sign}.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")


def show_p(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, the first row as a head, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table(summary: Mapping[str, Any], labels: Mapping[str, str], metric: Metric, baseline: str) -> str:
    """One row per arm: the metric, its difference to the baseline with both p-values, diagnostics, cost."""
    others = [arm for arm in summary if arm != baseline]
    corrected = dict(zip(others, holm([summary[arm]["versus"][baseline]["p"] for arm in others]), strict=True))
    diagnostics = list(dict.fromkeys(name for arm in summary.values() for name in arm["diagnostics"]))
    head = ["arm", metric.label, "minus " + labels[baseline].split(" [")[0], "better in", "p", "p Holm"]
    rows = [[*head, *diagnostics, "steps", "CPU s"]]
    for name, arm in summary.items():
        compared = ["(baseline)", "", "", ""]
        if name != baseline:
            d = arm["versus"][baseline]
            compared = [spread(d["mean"], d["std"], metric.digits, "+"), f"{d['seeds_better']}/{d['seeds']}"]
            compared += [show_p(d["p"]), show_p(corrected[name])]
        numbers = [f"{arm['diagnostics'][d]:.1e}" if d in arm["diagnostics"] else "" for d in diagnostics]
        cost = [str(arm["steps"]), f"{arm['cpu_seconds']:.1f}"]
        rows.append([labels[name], spread(arm["mean"], arm["std"], metric.digits), *compared, *numbers, *cost])
    return align(rows)


def in_words(
    summary: Mapping[str, Any],
    labels: Mapping[str, str],
    metric: Metric,
    baseline: str,
    *,
    focus: Sequence[str],
    longer: Sequence[str],
    teachers: Sequence[Mapping[str, Any]] = (),
) -> str:
    """What is better than what on average, and whether that is more than chance: said either way."""
    seeds = len(next(iter(summary.values()))["values"])
    better = "higher" if metric.higher_is_better else "lower"
    lines = [
        f"{metric.label}: {better} is better. {seeds} seed{'s' * (seeds != 1)}, each with initial weights and "
        "batches (and a trained teacher) of its own, the same for every arm.",
        f"±: standard deviation over the seeds. p: paired t-test over the seeds, one comparison at a time; p Holm: "
        f"corrected for the {len(summary) - 1} comparisons with {labels[baseline]}.",
    ]
    if seeds == 1:
        lines[1] = "One seed: no deviation and no test. Nothing here says more than that one run."
    numbers = [t[metric.key] for t in teachers if metric.key in t]
    if numbers:
        std = statistics.stdev(numbers) if len(numbers) > 1 else None
        lines.append(f"Teachers: {spread(statistics.fmean(numbers), std, metric.digits)}.")
    focus = [arm for arm in focus if arm in summary and len(summary) > 1]
    for arm in focus:
        versus = summary[arm]["versus"]
        lines += ["", f"{labels[arm]} is on average"]
        lines += [f"  {_compare(d, labels[other], metric)}" for other, d in versus.items()]
        if seeds > 1:
            lines.append(f"  (p Holm: corrected for these {len(versus)} comparisons)")
    costs = {arm: summary[arm]["cpu_seconds"] for arm in summary}
    most = max((costs[arm] for arm in focus), default=None)
    for arm in [arm for arm in longer if arm in costs and most is not None]:
        verdict = "no less than" if costs[arm] >= most else "LESS than (so this is no comparison at equal time)"
        who = " or ".join(labels[a] for a in focus)
        lines += ["", f"{labels[arm]}: {costs[arm]:.1f} s of CPU time a run, {verdict} {who}: {most:.1f} s."]
    return "\n".join(lines)


def _compare(d: Mapping[str, Any], other: str, metric: Metric) -> str:
    where = "better than" if d["better"] else "NOT better than"
    difference = f"{d['mean']:+.{metric.digits}f} {metric.unit}".rstrip()
    text = f"{where} {other}: {difference}, better for {d['seeds_better']} of {d['seeds']} seeds"
    if d["p"] is None:
        return text
    ps = f"(p {show_p(d['p'])}, Holm {show_p(d['p_holm'])})"
    if d["p"] >= LEVEL:
        return f"{text}; not significant at {LEVEL} {ps}"
    alone = "" if d["p_holm"] < LEVEL else " by itself, not after Holm's correction"
    return f"{text}; significant at {LEVEL}{alone} {ps}"


# ---- figure ----------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: Path, figure: Any) -> None:
    image = io.BytesIO()
    figure.canvas.print_png(image)
    write_atomically(path, lambda file: file.write(image.getvalue()))


def draw(
    path: Path,
    summary: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str],
    metric: Metric,
) -> None:
    """Left: mean curves over training. Right: every seed's last value with mean and standard deviation."""
    figure = new_figure(12.5, max(3.6, 1.6 + 0.55 * len(summary)))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    for row, (arm, numbers) in enumerate(summary.items()):
        color, values = COLORS[row % len(COLORS)], numbers["values"]
        curves = [r["curve"] for r in results if r["arm"] == arm]
        mean = [statistics.fmean(value for _, value in points) for points in zip(*curves, strict=False)]
        steps = [step for step, _ in curves[0]][: len(mean)]
        left.plot(steps, mean, color=color, linewidth=2, marker="o" if len(steps) == 1 else None)
        jitter = [row + 0.16 * (2 * i / max(len(values) - 1, 1) - 1) for i in range(len(values))]
        right.plot(values, jitter, "o", color=color, alpha=0.5, markersize=5, markeredgewidth=0)
        right.errorbar(numbers["mean"], row, xerr=numbers["std"], fmt="|", color="black", markersize=16, capsize=3)
    names = [f"{labels[arm]}\n{spread(n['mean'], n['std'], metric.digits)}" for arm, n in summary.items()]
    right.set_yticks(range(len(summary)), names, fontsize=9)
    for row, tick in enumerate(right.get_yticklabels()):
        tick.set_color(COLORS[row % len(COLORS)])
    right.set_ylim(len(summary) - 0.5, -0.5)
    left.set(xlabel="training step", ylabel=f"{metric.label}, mean over the seeds")
    right.set_xlabel(f"{metric.label} ({'higher' if metric.higher_is_better else 'lower'} is better)")
    left.set_title("While training", fontsize=10, loc="left")
    right.set_title("At the end: seeds, mean ± std", fontsize=10, loc="left")
    for axes in (left, right):
        axes.grid(color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)
