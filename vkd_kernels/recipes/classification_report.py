"""The table of the digits task: paired statistics over the seeds, a table, the same in words, a CSV and a figure."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

from .runs import write_atomically

LEVEL = 0.05


# ---- statistics ------------------------------------------------------------------------------------------------------


def paired_difference(values: list[float], baseline: list[float]) -> dict[str, Any]:
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
        from scipy.special import stdtr  # the cumulative t distribution; scikit-learn brings scipy

        p = float(2 * stdtr(n - 1, -abs(mean / (std / math.sqrt(n)))))
    return {
        "mean": mean, "std": std, "seeds": n, "seeds_above": sum(d > 0 for d in differences), "p": p,
        "significant": p is not None and p < LEVEL,
    }  # fmt: skip


def summarise(results: list[dict[str, Any]], arms: tuple[str, ...]) -> dict[str, Any]:
    """For every arm: accuracy, orthogonality, cost, and the paired difference to every other arm."""
    by_arm = {arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"]) for arm in arms}
    accuracies = {arm: [r["accuracy"] for r in found] for arm, found in by_arm.items()}
    summary = {}
    for arm, found in by_arm.items():
        errors = [r["orthogonality_error"] for r in found if r["orthogonality_error"] is not None]
        summary[arm] = {
            "accuracy_mean": statistics.fmean(accuracies[arm]),
            "accuracy_std": statistics.stdev(accuracies[arm]) if len(found) > 1 else None,
            "orthogonality_error_max": max(errors) if errors else None,
            "steps": found[0]["steps"],
            "seconds_mean": statistics.fmean(r["seconds"] for r in found),
            "cpu_seconds_mean": statistics.fmean(r["cpu_seconds"] for r in found),
            "above": {o: paired_difference(accuracies[arm], accuracies[o]) for o in arms if o != arm},
        }
    return summary


def machine() -> dict[str, Any]:
    """Where the numbers were made."""
    import numpy
    import sklearn
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
    return {
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
        "numpy": numpy.__version__, "scikit-learn": sklearn.__version__, "vkd_kernels": vkd_kernels.__version__,
        "commit": commit,
    }  # fmt: skip


# ---- text ------------------------------------------------------------------------------------------------------------


def _spread(mean: float, std: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.1f}" + (f" ± {std:.1f}" if std is not None else "")


def _p(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def table(metrics: dict[str, Any], labels: dict[str, str], baseline: str) -> str:
    columns = ["accuracy %", f"above {labels[baseline]}", "p", f"p < {LEVEL}", "max |PᵀP - I|", "steps", "CPU s"]
    head = ["arm", *columns]
    rows = []
    for arm, found in metrics["summary"].items():
        if arm == baseline:
            difference = ["(baseline)", "", ""]
        else:
            d = found["above"][baseline]
            difference = [_spread(d["mean"], d["std"], "+"), _p(d["p"]), "yes" if d["significant"] else "no"]
        error = found["orthogonality_error_max"]
        rows.append([
            labels[arm], _spread(found["accuracy_mean"], found["accuracy_std"]), *difference,
            "" if error is None else f"{error:.1e}", str(found["steps"]), f"{found['cpu_seconds_mean']:.1f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in [head, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def in_words(metrics: dict[str, Any], labels: dict[str, str]) -> str:
    """Is V_kD above the others on average, and is that more than chance? Said either way."""
    summary, teachers = metrics["summary"], [t["accuracy"] for t in metrics["teachers"]]
    std = statistics.stdev(teachers) if len(teachers) > 1 else None
    lines = [
        f"Teachers: {_spread(statistics.fmean(teachers), std)} % on the test images. {len(teachers)} seed(s), each "
        "with its own split, teacher and initial weights.",
        "±: standard deviation over the seeds. p: paired t-test over the seeds, one comparison at a time.",
    ]
    for arm in [arm for arm in ("vkd", "vkd-match") if arm in summary]:
        lines += ["", f"{labels[arm]} is on average"]
        others = [other for other in ("alone", "logits", "logits-longer", "linear") if other in summary]
        lines += [f"  {_compare(summary[arm]['above'][other], labels[other])}" for other in others]
    costs = {arm: found["cpu_seconds_mean"] for arm, found in summary.items()}
    if {"vkd", "vkd-match", "logits-longer"} <= costs.keys():
        longer, most = costs["logits-longer"], max(costs["vkd"], costs["vkd-match"])
        verdict = "no less than V_kD's" if longer >= most else "LESS than V_kD's (raise --equal-time):"
        lines += ["", f"{labels['logits-longer']}: {longer:.1f} s of CPU time a run, {verdict} {most:.1f} s."]
    return "\n".join(lines)


def _compare(d: dict[str, Any], other: str) -> str:
    where = "above" if d["mean"] > 0 else "NOT above"
    verdict = "significant" if d["significant"] else "not significant"
    return (
        f"{where} {other}: {d['mean']:+.1f} points, above for {d['seeds_above']} of {d['seeds']} seeds; "
        f"{verdict} at {LEVEL} (p {_p(d['p'])})"
    )


def save_csv(path: Path, results: list[dict[str, Any]]) -> None:
    columns = [name for name in results[0] if name != "curve"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


# ---- figure ----------------------------------------------------------------------------------------------------------

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = {
    "alone": "#666666", "logits": "#56B4E9", "logits-longer": "#0072B2", "linear": "#CC79A7", "vkd": "#009E73",
    "vkd-match": "#D55E00",
}  # fmt: skip


def save_figure(path: Path, metrics: dict[str, Any], labels: dict[str, str]) -> None:
    """Left: mean training curves. Right: every seed's final test accuracy with mean and standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display and no global state
    from matplotlib.figure import Figure

    arms, summary = list(metrics["summary"]), metrics["summary"]
    figure = Figure(figsize=(12.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    hidden = metrics["config"]["pool"] - 10 * metrics["config"]["labels_per_class"]

    ends = {}
    for arm in arms:
        curves = [[value for _, value in r["curve"]] for r in metrics["runs"] if r["arm"] == arm]
        steps = [step for step, _ in next(r["curve"] for r in metrics["runs"] if r["arm"] == arm)]
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        left.plot(steps, mean, color=COLOURS[arm], linewidth=2, solid_capstyle="round")
        ends[arm] = (steps[-1], mean[-1])
    last = max(step for step, _ in ends.values())
    top = max(value for _, value in ends.values())
    bottom = max(0.0, min(value for _, value in ends.values()) - 25)
    left.set(xlim=(0, last), ylim=(bottom, top + 2), xlabel="training step", ylabel="accuracy, %, mean over the seeds")
    left.set_title(f"While training: the {hidden} pool images whose labels no student sees", fontsize=10, loc="left")
    heights = _spread_out({arm: value for arm, (_, value) in ends.items()}, gap=(top + 2 - bottom) * 0.062)
    for arm in arms:
        left.annotate(
            labels[arm], ends[arm], (last * 1.05, heights[arm]), color=COLOURS[arm], fontsize=9, va="center",
            annotation_clip=False, ha="left",
            arrowprops={"arrowstyle": "-", "color": COLOURS[arm], "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 1},
        )  # fmt: skip

    for row, arm in enumerate(arms):
        values = [r["accuracy"] for r in metrics["runs"] if r["arm"] == arm]
        jitter = [row + 0.16 * (2 * i / max(len(values) - 1, 1) - 1) for i in range(len(values))]
        right.plot(values, jitter, "o", color=COLOURS[arm], alpha=0.5, markersize=5, markeredgewidth=0)
        mean, std = summary[arm]["accuracy_mean"], summary[arm]["accuracy_std"]
        right.errorbar(mean, row, xerr=std, fmt="|", color="black", markersize=16, markeredgewidth=2, capsize=3)
    names = [f"{labels[arm]}\n{_spread(summary[arm]['accuracy_mean'], summary[arm]['accuracy_std'])} %" for arm in arms]
    right.set_yticks(range(len(arms)), names, fontsize=9)
    right.set_ylim(len(arms) - 0.5, -0.5)
    for tick, arm in zip(right.get_yticklabels(), arms, strict=True):
        tick.set_color(COLOURS[arm])
    right.set_xlabel("accuracy, %")
    right.set_title("At the end, test images: seeds, mean ± std", fontsize=10, loc="left")
    right.grid(axis="x", color="#e5e5e5")
    left.grid(axis="y", color="#e5e5e5")
    for axes in (left, right):
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    right.spines["left"].set_visible(False)
    right.tick_params(axis="y", length=0)

    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(path, lambda file: file.write(image.getvalue()))


def _spread_out(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Label heights at least `gap` apart, as near their lines as neighbours allow, none above the highest line."""
    placed: dict[str, float] = {}
    limit = math.inf
    for name in sorted(heights, key=heights.__getitem__, reverse=True):
        limit = placed[name] = min(heights[name], limit - gap)
    return placed
