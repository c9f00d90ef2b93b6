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

from tools.figures import FAINT, IMAGES, INK, OURS, svg, text  # noqa: E402
from vkd_kernels.recipes import tasks  # noqa: E402
from vkd_kernels.recipes.report import holm, show_p, spread  # noqa: E402

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("evidence", "classification", "detection", "generation")]
RESULTS = ROOT / "benchmarks" / "results"
LEVEL = 0.05
FEWEST_SEEDS = 8


@dataclass(frozen=True)
class Claim:
    number: str  # by which the page's text speaks of it
    whose: str
    text: str
    arm: str  # is better than `over`
    over: str
    expected: str  # before the runs
    margin: float = 0.0  # of claims that expect no difference: how small it must be


@dataclass(frozen=True)
class Family:
    """Claims that are corrected for each other, and the records of their arms."""

    name: str  # of its figure
    heading: str  # of its section in the page
    commits: Sequence[str]  # in which its expectations were written down
    title: str
    records: Sequence[str]
    claims: Sequence[Claim]
    metric: str = "accuracy"
    waiting: int = 0  # further claims of the family, not run yet: the correction counts them too


FASHION_MNIST = ["fashion-mnist-8seeds.json", "fashion-mnist-projectors-8seeds.json"]
WEIGHTS, FURTHER = "fashion-mnist-weights-8seeds.json", "fashion-mnist-further-8seeds.json"
LABELS, QUESTIONS = "fashion-mnist-labels-8seeds.json", "fashion-mnist-questions-8seeds.json"
FAMILIES = [
    Family(
        "fashion-mnist",
        "Logits, features, projections",
        ["2ad1fd5"],
        "Fashion-MNIST, 1000 labels: difference of test accuracy, points, with 95 % intervals, eight seeds",
        ["fashion-mnist-8seeds.json"],
        [
            Claim("1", "common knowledge", "A teacher's logits help.", "logits", "alone", "+7"),
            Claim("2", "popular belief", "Its features help beyond its logits.", "linear", "logits", "+1.5"),
            Claim("3", "the paper", "Semi-orthogonal is better than linear.", "vkd", "linear", "+0.1"),
            Claim("4", "this library", '`scale="match"` is better than linear.', "vkd-match", "linear", "+0.8"),
            Claim("5", "this library", '`scale="match"` is better than scale 1.', "vkd-match", "vkd", "+0.7"),
        ],
    ),
    Family(
        "fashion-mnist-projectors",
        "The weight, the normalization, the released projector",
        ["14555ea"],
        "Fashion-MNIST: the loss's weight, its normalization, the released projector; points, eight seeds",
        FASHION_MNIST,
        [
            Claim("7", "an objection", "Linear: 1.7 times the weight is better.", "linear-strong", "linear", "+0.2"),
            Claim("7", "an objection", "Scale 1: 1.7 times the weight is better.", "vkd-strong", "vkd", "+0.2"),
            Claim(
                "7",
                "an objection",
                '`scale="match"` is better than linear of that weight.',
                "vkd-match",
                "linear-strong",
                "+0.3",
            ),
            Claim(
                "7",
                "an objection",
                '`scale="match"` is better than scale 1 of that weight.',
                "vkd-match",
                "vkd-strong",
                "+0.3",
            ),
            Claim("8", "the paper", "Layer norm is better than no normalization.", "vkd", "orthogonal-none", "+0.3"),
            Claim("9", "this library", "The released projector helps beyond logits.", "released", "logits", "0"),
            Claim(
                "9", "this library", "The library's is better than the released projector.", "vkd", "released", "+2.2"
            ),
        ],
    ),
    Family(
        "fashion-mnist-weights",
        "Larger weights",
        ["5cc678a"],
        "Fashion-MNIST: larger weights of the loss, and both projections where they pull alike; points, eight seeds",
        [*FASHION_MNIST, WEIGHTS],
        [
            Claim("10", "this library", "Linear: weight 30 is better than 17.", "linear-30", "linear-strong", "+0.2"),
            Claim("11", "this library", "Linear: weight 52 is better than 30.", "linear-52", "linear-30", "0"),
            Claim(
                "12", "this library", '`scale="match"`: weight 17 is better than 10.', "match-17", "vkd-match", "+0.2"
            ),
            Claim(
                "13", "an objection", '`scale="match"` at 17 is better than linear at 30.', "match-17", "linear-30", "0"
            ),
            Claim(
                "14", "an objection", '`scale="match"` at 30 is better than linear at 52.', "match-30", "linear-52", "0"
            ),
        ],
    ),
    Family(
        "fashion-mnist-targets",
        "Other normalizations, and no projection",
        ["5cc678a", "f85a887"],
        "Fashion-MNIST: normalization, projection and loss; points, eight seeds",
        [*FASHION_MNIST, WEIGHTS],
        [
            Claim(
                "15",
                "the paper",
                "Layer norm is better than batch norm.",
                "vkd",
                "orthogonal-batch_norm",
                "0",
                margin=0.3,
            ),
            Claim(
                "16", "the paper", "Layer norm is better than whitening.", "vkd", "orthogonal-whiten", "0", margin=0.3
            ),
            Claim(
                "18", "the paper", "Semi-orthogonal is better than no projection.", "vkd", "identity-layer_norm", "+0.5"
            ),
        ],
    ),
    Family(
        "fashion-mnist-losses",
        "No normalization, cosine",
        ["5cc678a", "f85a887", "2a8601f"],
        "Fashion-MNIST: no normalization with a larger weight, and cosine; points, eight seeds",
        [*FASHION_MNIST, FURTHER],
        [
            Claim("17", "an objection", "Layer norm is better than none at weight 24.", "vkd", "none-24", "+0.6"),
            Claim(
                "19",
                "this library",
                'Smooth L1, `scale="match"`, is better than cosine.',
                "vkd-match",
                "cosine",
                "0",
                margin=0.3,
            ),
        ],
    ),
    Family(
        "fashion-mnist-tokens",
        "Dense features",
        ["b17ad59"],
        "Fashion-MNIST: dense features against pooled ones; points, eight seeds",
        [*FASHION_MNIST, FURTHER],
        [
            Claim(
                "22",
                "popular belief",
                "Linear: every position is better than their mean.",
                "linear-tokens",
                "linear",
                "+0.5",
            ),
            Claim(
                "22",
                "popular belief",
                '`"match"`: every position is better than their mean.',
                "match-tokens",
                "vkd-match",
                "+0.5",
            ),
        ],
    ),
    Family(
        "fashion-mnist-batch-norm",
        "Batch norm, again",
        ["b17ad59"],
        "Fashion-MNIST: batch norm with a linear projection, and with a larger weight; points, eight seeds",
        [*FASHION_MNIST, WEIGHTS, FURTHER],
        [
            Claim(
                "23",
                "the paper",
                "Batch norm: semi-orthogonal is better than linear.",
                "orthogonal-batch_norm",
                "linear-batch_norm",
                "0",
                margin=0.3,
            ),
            Claim(
                "24",
                "this library",
                "Batch norm: weight 30 is better than 10.",
                "batch_norm-30",
                "orthogonal-batch_norm",
                "+0.2",
            ),
            Claim(
                "25",
                "this library",
                "At weight 30, batch norm is better than layer norm.",
                "batch_norm-30",
                "linear-30",
                "+0.3",
            ),
        ],
    ),
    Family(
        "fashion-mnist-longer",
        "Labels alone, for as long",
        ["e4e2d11"],
        "Fashion-MNIST: logits against labels alone that train as long; points, eight seeds",
        ["fashion-mnist-8seeds.json", FURTHER],
        [
            Claim(
                "26",
                "common knowledge",
                "Logits are better than labels alone for twice the steps.",
                "logits",
                "alone-longer",
                "+8",
            )
        ],
    ),
    Family(
        "fashion-mnist-labels",
        "More labels",
        ["c1eeab9", "dee3dfd"],
        "Fashion-MNIST, labels for 6000 images and for all 60,000: difference of test accuracy, points, eight seeds",
        [LABELS, QUESTIONS],
        [
            Claim(
                "20",
                "popular belief",
                "10 % of labels: features help beyond logits.",
                "linear-10pct",
                "logits-10pct",
                "+1",
            ),
            Claim(
                "20",
                "this library",
                '10 % of labels: `scale="match"` is better than linear.',
                "match-10pct",
                "linear-10pct",
                "+0.3",
            ),
            Claim(
                "20",
                "popular belief",
                "All labels: features help beyond logits.",
                "linear-100pct",
                "logits-100pct",
                "+0.3",
            ),
            Claim(
                "20",
                "this library",
                'All labels: `scale="match"` is better than linear.',
                "match-100pct",
                "linear-100pct",
                "0",
                margin=0.3,
            ),
        ],
    ),
    Family(
        "fashion-mnist-batch-norm-30",
        "Batch norm at weight 30",
        ["36660fd"],
        "Fashion-MNIST: batch norm at weight 30, semi-orthogonal against linear; points, eight seeds",
        [FURTHER, QUESTIONS],
        [
            Claim(
                "27",
                "the paper",
                "At weight 30: semi-orthogonal is better than linear.",
                "batch_norm-30",
                "linear-batch_norm-30",
                "+0.2",
            )
        ],
    ),
    Family(
        "detection",
        "Detection in scenes of garments",
        ["119c3d2", "e7293fc"],
        "Detection in scenes of garments: difference of AP, points, with 95 % intervals, eight seeds",
        ["detection-fashion-mnist-8seeds.json"],
        [
            Claim("D1", "the paper", "V_kD is better than the student alone.", "vkd", "alone", "+6"),
            Claim(
                "D2", "popular belief", "A linear projection is better than the student alone.", "linear", "alone", "+6"
            ),
            Claim("D3", "the paper", "Semi-orthogonal is better than linear.", "vkd", "linear", "0", margin=1.0),
            Claim(
                "D4",
                "an objection",
                "V_kD is better than alone at 1.7 times the steps.",
                "vkd",
                "alone-longer",
                "+6",
            ),
        ],
        metric="AP",
    ),
]


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


def read(records: Sequence[str], metric: str = "accuracy") -> Runs:
    """The arms of all records, those of the first one where two have the same. Runs know their record and teacher."""
    runs: Runs = {}
    for name in records:
        record = json.loads((RESULTS / name).read_text())
        teachers = {teacher["seed"]: teacher[metric] for teacher in record["teachers"]}
        for arm in dict.fromkeys(run["arm"] for run in record["runs"] if run["arm"] not in runs):
            runs[arm] = {
                run["seed"]: run | {"record": name, "teacher": teachers.get(run["seed"])}
                for run in record["runs"]
                if run["arm"] == arm
            }
    return runs


def outcomes(family: Family) -> list[Outcome]:
    runs, metric = read(family.records, family.metric), family.metric
    rows, ps = [], []
    for claim in family.claims:
        ours, theirs = runs[claim.arm], runs[claim.over]
        assert ours.keys() == theirs.keys() and len(ours) >= FEWEST_SEEDS, (family.name, claim)
        others = [seed for seed in ours if ours[seed]["teacher"] != theirs[seed]["teacher"]]
        assert not others, f"{claim.arm} and {claim.over}: other teachers for the seeds {others}"
        differences = [ours[seed][metric] - theirs[seed][metric] for seed in sorted(ours)]
        test = stats.ttest_1samp(differences, 0.0)
        interval = test.confidence_interval(0.95)
        cost = None
        if all(ours[seed]["record"] == theirs[seed]["record"] for seed in ours):
            cost = statistics.fmean(ours[seed]["cpu_seconds"] / theirs[seed]["cpu_seconds"] for seed in ours)
        better = sum(difference > 0 for difference in differences)
        rows.append((claim, statistics.fmean(differences), interval.low, interval.high, better, len(differences), cost))
        ps.append(float(test.pvalue))
    corrected = holm([*ps, *[1.0] * family.waiting])  # 1: no later result makes one of these p's larger
    return [
        Outcome(claim, mean, float(low), float(high), better, seeds, p=p, p_holm=p_holm or 0.0, cost=cost)
        for (claim, mean, low, high, better, seeds, cost), p, p_holm in zip(rows, ps, corrected, strict=False)
    ]


def markdown(head: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def link_to(record: str) -> str:
    return f"[{record.removesuffix('-8seeds.json').removeprefix('fashion-mnist-')}](../benchmarks/results/{record})"


def table_of_claims() -> str:
    rows = []
    for family in FAMILIES:
        commits = ", ".join(f"`{commit}`" for commit in family.commits)
        anchor = re.sub("[^a-z -]", "", family.heading.lower()).replace(" ", "-")
        runs = read(family.records, family.metric)
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
