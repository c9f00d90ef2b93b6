"""The claims of docs/evidence.md, in families that are corrected together, and what was expected before the runs."""

from collections.abc import Sequence
from dataclasses import dataclass


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
    sign: int = 1  # -1: lower is better, and a difference is by how much lower


FASHION_MNIST = ["fashion-mnist-8seeds.json", "fashion-mnist-projectors-8seeds.json"]
WEIGHTS, FURTHER = "fashion-mnist-weights-8seeds.json", "fashion-mnist-further-8seeds.json"
LABELS, QUESTIONS = "fashion-mnist-labels-8seeds.json", "fashion-mnist-questions-8seeds.json"
WIDTHS = [f"fashion-mnist-{part}.json" for part in ("widths-seeds0-3", "width128-seeds0-3", "widths-seeds4-7")]
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
            Claim("7a", "an objection", "Linear: 1.7 times the weight is better.", "linear-strong", "linear", "+0.2"),
            Claim("7b", "an objection", "Scale 1: 1.7 times the weight is better.", "vkd-strong", "vkd", "+0.2"),
            Claim(
                "7c",
                "an objection",
                '`scale="match"` is better than linear of that weight.',
                "vkd-match",
                "linear-strong",
                "+0.3",
            ),
            Claim(
                "7d",
                "an objection",
                '`scale="match"` is better than scale 1 of that weight.',
                "vkd-match",
                "vkd-strong",
                "+0.3",
            ),
            Claim("8", "the paper", "Layer norm is better than no normalization.", "vkd", "orthogonal-none", "+0.3"),
            Claim("9a", "this library", "The released projector helps beyond logits.", "released", "logits", "0"),
            Claim(
                "9b", "this library", "The library's is better than the released projector.", "vkd", "released", "+2.2"
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
                "13", "the paper", '`scale="match"` at 17 is better than linear at 30.', "match-17", "linear-30", "0"
            ),
            Claim(
                "14", "the paper", '`scale="match"` at 30 is better than linear at 52.', "match-30", "linear-52", "0"
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
        "No normalization at weight 24, and cosine",
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
                "22a",
                "popular belief",
                "Linear: every position is better than their mean.",
                "linear-tokens",
                "linear",
                "+0.5",
            ),
            Claim(
                "22b",
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
        "Batch norm: weight and projection",
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
                "Weight 30: batch norm is better than linear, layer norm.",
                "batch_norm-30",
                "linear-30",
                "+0.3",
            ),
        ],
    ),
    Family(
        "fashion-mnist-longer",
        "Labels alone for twice the steps",
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
        ["c1eeab9", "b17ad59", "dee3dfd"],
        "Fashion-MNIST, labels for 6000 images and for all 60,000: difference of test accuracy, points, eight seeds",
        [LABELS, QUESTIONS],
        [
            Claim(
                "20a",
                "popular belief",
                "10 % of labels: features help beyond logits.",
                "linear-10pct",
                "logits-10pct",
                "+1",
            ),
            Claim(
                "20b",
                "this library",
                '10 % of labels: `scale="match"` is better than linear.',
                "match-10pct",
                "linear-10pct",
                "+0.3",
            ),
            Claim(
                "20c",
                "popular belief",
                "All labels: features help beyond logits.",
                "linear-100pct",
                "logits-100pct",
                "+0.3",
            ),
            Claim(
                "20d",
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
        "fashion-mnist-widths",
        "Narrower and wider students",
        ["c1eeab9", "b17ad59"],
        "Fashion-MNIST, students of width 32 and of 128: difference of test accuracy, points, eight seeds",
        WIDTHS,
        [
            Claim(
                "21a",
                "this library",
                'Width 32: `scale="match"` is better than linear.',
                "match-w32",
                "linear-w32",
                "+0.8",
            ),
            Claim(
                "21b",
                "this library",
                'Width 128: `scale="match"` is better than linear.',
                "match-w128",
                "linear-w128",
                "+0.2",
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
    Family(
        "generation",
        "Generation of garments",
        ["829eb1b"],
        "Generation of garments: by how much the Fréchet distance is smaller, with 95 % intervals, eight seeds",
        ["generation-fashion-mnist-8seeds.json"],
        [
            Claim("G1", "the paper", "V_kD is better than the GAN alone.", "vkd", "alone", "0", margin=0.05),
            Claim("G2", "the paper", "Semi-orthogonal is better than linear.", "vkd", "linear", "0", margin=0.05),
        ],
        metric="frechet",
        sign=-1,
    ),
]
