"""The docs' tables of accuracy, from the records: `python tools/evidence.py` writes them, and the figures of claims.

A page marks their places: `<!-- claims -->` or `<!-- arms: RECORD -->`, then `<!-- end -->`. A claim is a paired
difference over seeds. A family of claims is tested together: p-values of paired t-tests with Holm's correction. A test
holds the committed pages and figures to this script.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.claims import FAMILIES, Claim, Family  # noqa: E402
from tools.figures import FAINT, IMAGES, INK, OURS, svg, text  # noqa: E402
from vkd_kernels.recipes import tasks  # noqa: E402
from vkd_kernels.recipes.report import holm, show_p, spread  # noqa: E402

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("evidence", "classification", "detection", "generation")]
RESULTS = ROOT / "benchmarks" / "results"
LEVEL = 0.05
FEWEST_SEEDS = 8


@dataclass(frozen=True)
class Outcome:
    claim: Claim
    mean: float
    low: float  # 95 % interval of the mean
    high: float
    better: int  # in so many seeds
    seeds: int
    p: float
    p_holm: float
    cost: float | None  # processor time of a run, as a multiple of the other arm's in the same record

    @property
    def verdict(self) -> str:
        if self.p_holm < LEVEL:
            return "holds" if self.mean > 0 else "does not hold"
        return "equal" if -self.claim.margin < self.low and self.high < self.claim.margin else "not settled"


Runs = dict[str, dict[int, dict[str, Any]]]  # {arm: {seed: its line of the record}}


def read(records: Sequence[str]) -> Runs:
    """The runs of all records, those of the first one where two have the same arm and seed.

    Runs know their record and teacher: the seeds of an arm may be spread over records of several machines.
    """
    runs: Runs = {}
    for name in records:
        record = json.loads((RESULTS / name).read_text())
        teachers = {teacher["seed"]: {**teacher, "seconds": 0, "cpu_seconds": 0} for teacher in record["teachers"]}
        for run in record["runs"]:
            known = {"record": name, "teacher": teachers.get(run["seed"])}
            runs.setdefault(run["arm"], {}).setdefault(run["seed"], run | known)
    return runs


def outcomes(family: Family) -> list[Outcome]:
    runs, metric = read(family.records), family.metric
    rows, ps = [], []
    for claim in family.claims:
        ours, theirs = runs[claim.arm], runs[claim.over]
        assert ours.keys() == theirs.keys() and len(ours) >= FEWEST_SEEDS, (family.name, claim)
        others = [seed for seed in ours if ours[seed]["teacher"] != theirs[seed]["teacher"]]
        assert not others, f"{claim.arm} and {claim.over}: other teachers for the seeds {others}"
        differences = [family.sign * (ours[seed][metric] - theirs[seed][metric]) for seed in sorted(ours)]
        test = stats.ttest_1samp(differences, 0.0)
        interval = test.confidence_interval(0.95)
        cost = None
        if all(ours[seed]["record"] == theirs[seed]["record"] for seed in ours):
            cost = statistics.fmean(ours[seed]["cpu_seconds"] / theirs[seed]["cpu_seconds"] for seed in ours)
        better = sum(difference > 0 for difference in differences)
        rows.append((claim, statistics.fmean(differences), interval.low, interval.high, better, len(differences), cost))
        ps.append(float(test.pvalue))
    return [
        Outcome(claim, mean, float(low), float(high), better, seeds, p=p, p_holm=p_holm or 0.0, cost=cost)
        for (claim, mean, low, high, better, seeds, cost), p, p_holm in zip(rows, ps, holm(ps), strict=True)
    ]


def markdown(head: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def link_to(record: str) -> str:
    name = record.removesuffix(".json").removesuffix("-8seeds").removeprefix("fashion-mnist-")
    return f"[{name}](../benchmarks/results/{record})"


def table_of_claims() -> str:
    rows = []
    for family in FAMILIES:
        commits = ", ".join(f"`{commit}`" for commit in family.commits)
        anchor = re.sub("[^a-z0-9 -]", "", family.heading.lower()).replace(" ", "-")
        runs = read(family.records)
        arms = dict.fromkeys(arm for claim in family.claims for arm in (claim.arm, claim.over))
        used = dict.fromkeys(run["record"] for arm in arms for run in runs[arm].values())
        records = ", ".join(link_to(record) for record in used)
        rows.append(["", f"**[{family.heading}](#{anchor})**, expected in {commits}; {records}", *[""] * 7])
        for o in outcomes(family):
            expected = o.claim.expected + (f" ± {o.claim.margin:g}" if o.claim.margin else "")
            cells = [o.claim.number, o.claim.text, o.claim.whose, expected, f"**{o.verdict}**"]
            cells += [f"{o.mean:+.2f} ({o.low:+.2f} to {o.high:+.2f})", f"{o.better} of {o.seeds}", show_p(o.p_holm)]
            rows.append([*cells, f"{o.cost:.2f} x" if o.cost else "-"])
    head = " | claim | whose | expected | verdict | difference (95 % interval) | better for | p Holm | cost"
    return markdown(head, rows)


def table_of_arms(name: str) -> str:
    """The record's own summary: every arm, and its difference to the baseline."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    summary, metric = record["summary"], tasks.load(record["task"]).metric
    rows = []
    for arm in summary.values():
        cells = [arm["label"], spread(arm["mean"], arm["std"], metric.digits)]
        error = next(iter(arm["diagnostics"].values()), None)
        if d := arm["minus_baseline"]:
            cells += [spread(d["mean"], d["std"], metric.digits, "+"), f"{d['seeds_better']} of {d['seeds']}"]
            cells += [show_p(d["p"]), show_p(d["p_holm"])]
        else:
            cells += [""] * 4  # the baseline
        rows.append([*cells, "" if error is None else f"{error:.2g}", f"{arm['steps']}", f"{arm['cpu_seconds']:.1f}"])
    baseline = summary[record["baseline"]]["label"]
    return markdown(
        f"arm | {metric.label} | minus {baseline} | better for | p | p Holm | max abs (PᵀP - I) | steps | CPU s", rows
    )


def figure(family: Family) -> str:
    """Every claim's difference with its interval, and the line of no difference."""
    rows = outcomes(family)
    left, right, step = 390, 830, 40
    low, high = math.floor(min(0.0, *(o.low for o in rows))), math.ceil(max(o.high for o in rows))

    def at(points: float) -> float:
        return left + (right - left) * (points - low) / (high - low)

    bottom = 62 + step * len(rows)
    body = [text(24, 32, family.title, size=15, anchor="start")]
    for tick in range(low, high + 1):
        if tick % (1 if high - low <= 8 else 2):
            continue
        color = INK if tick == 0 else "#e5e7eb"
        body.append(f"<line x1='{at(tick):g}' y1='52' x2='{at(tick):g}' y2='{bottom - 8}' stroke='{color}'/>")
        body.append(text(at(tick), bottom + 10, f"{tick:+d}" if tick else "0", size=12, color=FAINT))
    for index, o in enumerate(rows):
        y, color = 74 + step * index, OURS if o.verdict == "holds" else FAINT
        name = escape(o.claim.text.replace("`", ""))
        body.append(text(left - 14, y + 5, name, size=13, anchor="end"))
        ends = f"x1='{at(o.low):.1f}' y1='{y}' x2='{at(o.high):.1f}' y2='{y}'"
        body.append(f"<line {ends} stroke='{color}' stroke-width='3'/>")
        body.append(f"<circle cx='{at(o.mean):.1f}' cy='{y}' r='6' fill='{color}'/>")
        body.append(text(right + 14, y + 5, f"{o.mean:+.2f}, {o.verdict}", size=13, color=color, anchor="start"))
    return svg(1000, bottom + 28, family.title, body)


def with_tables(page: str) -> str:
    """The page with the tables between its marks computed anew."""

    def computed(match: re.Match[str]) -> str:
        mark, record = match.groups()
        return f"<!-- {mark} -->\n\n{table_of_arms(record) if record else table_of_claims()}\n\n<!-- end -->"

    return re.sub(r"<!-- (claims|arms: (\S+)) -->\n.*?<!-- end -->", computed, page, flags=re.DOTALL)


def figures() -> dict[str, str]:
    return {f"evidence-{family.name}.svg": figure(family) for family in FAMILIES}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
    for name, drawing in figures().items():
        (IMAGES / name).write_text(drawing)
        print(IMAGES / name)
