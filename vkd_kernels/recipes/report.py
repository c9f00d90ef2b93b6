"""What a run found, for people: paired statistics over the seeds, a table, the same in words, and a figure."""

from __future__ import annotations

import io
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .runs import write_atomically
from .tasks import Metric

LEVEL = 0.05


# ---- statistics ------------------------------------------------------------------------------------------------------


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], higher_is_better: bool = True
) -> dict[str, Any]:
    """Mean of d = values - baseline, seed by seed, and the two-sided paired t-test of "it is zero".

    t = mean(d) / (std(d) / sqrt(n)) has n - 1 degrees of freedom; `p` is None when one seed leaves nothing to estimate.
    """
    if len(values) != len(baseline):
        raise ValueError(f"values and baseline must pair up, got {len(values)} and {len(baseline)}")
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    std = statistics.stdev(differences) if n > 1 else None
    if std is None:
        p = None
    elif std == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        from scipy.special import stdtr  # the cumulative t distribution

        p = float(2 * stdtr(n - 1, -abs(mean / (std / math.sqrt(n)))))
    better = 1 if higher_is_better else -1
    return {
        "mean": mean, "std": std, "seeds": n, "better": mean * better > 0,
        "seeds_better": sum(d * better > 0 for d in differences), "p": p,
    }  # fmt: skip


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for several comparisons: each p times the number of comparisons not yet rejected, in order."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[index] = largest
    return corrected


def summarise(results: Sequence[Mapping[str, Any]], arms: Sequence[str], metric: Metric) -> dict[str, Any]:
    """For every arm: the metric, diagnostics, cost, and its paired difference to every other arm."""
    by_arm = {arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"]) for arm in arms}
    values = {arm: [r[metric.key] for r in found] for arm, found in by_arm.items()}
    summary: dict[str, Any] = {}
    for arm, found in by_arm.items():
        versus = {o: paired_difference(values[arm], values[o], metric.higher_is_better) for o in arms if o != arm}
        for difference, p in zip(versus.values(), holm([d["p"] for d in versus.values()]), strict=True):
            difference["p_holm"] = p
        summary[arm] = {
            "mean": statistics.fmean(values[arm]),
            "std": statistics.stdev(values[arm]) if len(found) > 1 else None,
            "values": values[arm],
            "diagnostics": {
                name: max(r["diagnostics"][name] for r in found) for name in found[0]["diagnostics"]
            },  # the worst of the seeds
            "steps": found[0]["steps"],
            "seconds": statistics.fmean(r["seconds"] for r in found),
            "cpu_seconds": statistics.fmean(r["cpu_seconds"] for r in found),
            "images_per_second": statistics.fmean(r["images_per_second"] for r in found),
            "versus": versus,
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
        git = subprocess.run(describe, capture_output=True, text=True)  # ends in -dirty with uncommitted changes
        commit = git.stdout.strip() or None
    packages: dict[str, str | None] = {}
    for name in ("numpy", "lightning", "timm", "torchvision", "scikit-learn"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__, **packages,
        "vkd_kernels": vkd_kernels.__version__, "commit": commit,
    }  # fmt: skip


# ---- text ------------------------------------------------------------------------------------------------------------


def spread(mean: float, std: float | None, digits: int, sign: str = "") -> str:
    return f"{mean:{sign}.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")


def show_p(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def significant(p: float | None) -> bool:
    return p is not None and p < LEVEL


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, the first row as a head, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table(summary: Mapping[str, Any], labels: Mapping[str, str], metric: Metric, baseline: str) -> str:
    """One row per arm: the metric, its difference to the baseline with both p-values, diagnostics, cost."""
    others = [arm for arm in summary if arm != baseline]
    corrected = dict(zip(others, holm([summary[arm]["versus"][baseline]["p"] for arm in others]), strict=True))
    diagnostics = list(dict.fromkeys(name for found in summary.values() for name in found["diagnostics"]))
    rows = [
        ["arm", metric.label, f"minus {labels[baseline]}", "better in", "p", "p Holm", *diagnostics, "steps", "CPU s"]
    ]
    for arm, found in summary.items():
        compared = ["(baseline)", "", "", ""]
        if arm != baseline:
            d = found["versus"][baseline]
            compared = [
                spread(d["mean"], d["std"], metric.digits, "+"), f"{d['seeds_better']}/{d['seeds']}", show_p(d["p"]),
                show_p(corrected[arm]),
            ]  # fmt: skip
        numbers = [f"{found['diagnostics'][name]:.1e}" if name in found["diagnostics"] else "" for name in diagnostics]
        rows.append([
            labels[arm], spread(found["mean"], found["std"], metric.digits), *compared, *numbers, str(found["steps"]),
            f"{found['cpu_seconds']:.1f}",
        ])  # fmt: skip
    return align(rows)


def in_words(
    summary: Mapping[str, Any], labels: Mapping[str, str], metric: Metric, baseline: str, focus: Sequence[str],
    longer: Mapping[str, float], teachers: Sequence[Mapping[str, Any]] = (),
) -> str:  # fmt: skip
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
    for arm in [arm for arm in focus if arm in summary and len(summary) > 1]:
        lines += ["", f"{labels[arm]} is on average"]
        lines += [f"  {_compare(d, labels[o], metric)}" for o, d in summary[arm]["versus"].items()]
        if seeds > 1:
            lines.append(f"  (p Holm: corrected for these {len(summary[arm]['versus'])} comparisons)")
    costs = {arm: found["cpu_seconds"] for arm, found in summary.items()}
    most = max((costs[arm] for arm in focus if arm in costs), default=None)
    for arm in [arm for arm in summary if longer.get(arm, 1.0) > 1 and most is not None]:
        verdict = "no less than" if costs[arm] >= most else "LESS than (so this is no comparison at equal time)"
        who = " or ".join(labels[a] for a in focus if a in costs)
        lines += ["", f"{labels[arm]}: {costs[arm]:.1f} s of CPU time a run, {verdict} {who}: {most:.1f} s."]
    return "\n".join(lines)


def _compare(d: Mapping[str, Any], other: str, metric: Metric) -> str:
    where = "better than" if d["better"] else "NOT better than"
    difference = f"{d['mean']:+.{metric.digits}f} {metric.unit}".rstrip()
    text = f"{where} {other}: {difference}, better for {d['seeds_better']} of {d['seeds']} seeds"
    if d["p"] is None:
        return text
    ps = f"(p {show_p(d['p'])}, Holm {show_p(d['p_holm'])})"
    if not significant(d["p"]):
        return f"{text}; not significant at {LEVEL} {ps}"
    alone = "" if significant(d["p_holm"]) else " by itself, not after Holm's correction"
    return f"{text}; significant at {LEVEL}{alone} {ps}"


# ---- figure ----------------------------------------------------------------------------------------------------------

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#666666", "#000000")


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
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    colours = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(summary)}
    ends: dict[str, tuple[float, float]] = {}
    for arm in summary:
        curves = [r["curve"] for r in results if r["arm"] == arm]
        mean = [statistics.fmean(value for _, value in points) for points in zip(*curves, strict=True)]
        steps = [step for step, _ in curves[0]]
        marker = "o" if len(steps) == 1 else None
        left.plot(steps, mean, color=colours[arm], linewidth=2, marker=marker, solid_capstyle="round")
        ends[arm] = (steps[-1], mean[-1])
    last = max(step for step, _ in ends.values())
    low, high = left.get_ylim()
    heights = _spread_out({arm: value for arm, (_, value) in ends.items()}, (high - low) * 0.065)
    left.set(xlim=(0, last), xlabel="training step", ylabel=f"{metric.label}, mean over the seeds")
    left.set_title("While training", fontsize=10, loc="left")
    for arm in summary:
        left.annotate(
            labels[arm], ends[arm], (last * 1.05, heights[arm]), color=colours[arm], fontsize=9, va="center",
            annotation_clip=False, ha="left",
            arrowprops={"arrowstyle": "-", "color": colours[arm], "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 1},
        )  # fmt: skip
    for row, (arm, found) in enumerate(summary.items()):
        values = found["values"]
        jitter = [row + 0.16 * (2 * i / max(len(values) - 1, 1) - 1) for i in range(len(values))]
        right.plot(values, jitter, "o", color=colours[arm], alpha=0.5, markersize=5, markeredgewidth=0)
        right.errorbar(
            found["mean"], row, xerr=found["std"], fmt="|", color="black", markersize=16, markeredgewidth=2, capsize=3
        )
    names = [f"{labels[arm]}\n{spread(found['mean'], found['std'], metric.digits)}" for arm, found in summary.items()]
    right.set_yticks(range(len(summary)), names, fontsize=9)
    right.set_ylim(len(summary) - 0.5, -0.5)
    for tick, arm in zip(right.get_yticklabels(), summary, strict=True):
        tick.set_color(colours[arm])
    right.set_xlabel(f"{metric.label} ({'higher' if metric.higher_is_better else 'lower'} is better)")
    right.set_title("At the end: seeds, mean ± std", fontsize=10, loc="left")
    right.grid(axis="x", color="#e5e5e5")
    left.grid(axis="y", color="#e5e5e5")
    for axes in (left, right):
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    right.spines["left"].set_visible(False)
    right.tick_params(axis="y", length=0)
    save_figure(path, figure)


def _spread_out(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Label heights at least `gap` apart, as near their lines as neighbours allow, none above the highest line."""
    placed: dict[str, float] = {}
    limit = math.inf
    for name in sorted(heights, key=heights.__getitem__, reverse=True):
        limit = placed[name] = min(heights[name], limit - gap)
    return placed
