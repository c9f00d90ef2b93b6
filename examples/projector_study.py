"""Further arms of the study in docs/evidence.md, as a task of one's own: weights, normalizations, labels, widths.

    vkd distill examples.projector_study:ProjectorStudy --recipe fashion-mnist data.root=FOLDER --seeds 8 \\
        --arms linear-strong,vkd-strong,released,orthogonal-none

With `scale="match"` the loss pulls on the student sqrt(T / S) = sqrt(3) times as strongly as with scale 1, where T and
S are the teacher's and the student's widths. Weights therefore go up in steps of sqrt(3), from the recipe's 10: a
linear projection pulls as strongly as `"match"` at the weight below.
"""

import math

from examples.released_projector import ReleasedProjector
from vkd_kernels.recipes.task import Arm

STEP = math.sqrt(192 / 64)  # of the recipe's widths
FEATURES_STD = 0.41  # of two teachers over 640 test images: without normalization residuals are so much smaller
WEIGHT_17, WEIGHT_30, WEIGHT_52 = (10 * STEP**n for n in (1, 2, 3))
LINEAR = {"distill.projection": "linear"}
VKD = {"distill.projection": "orthogonal", "distill.scale": 1.0}
MATCH = {"distill.projection": "orthogonal", "distill.scale": "match"}
TOKENS = {"distill.features": "tokens"}
BATCH_NORM = {"distill.normalization": "batch_norm"}


class ProjectorStudy(ReleasedProjector):
    arms = {
        **ReleasedProjector.arms,
        "alone-longer": Arm(  # takes as long as logits, whose batches have as many unlabeled images again
            "student alone, twice the steps", {"distill.logit_weight": 0.0, "distill.weight": 0.0}, longer=2.0
        ),
        "linear-strong": Arm("linear projection, weight 17", {**LINEAR, "distill.weight": WEIGHT_17}),
        "linear-30": Arm("linear projection, weight 30", {**LINEAR, "distill.weight": WEIGHT_30}),
        "linear-52": Arm("linear projection, weight 52", {**LINEAR, "distill.weight": WEIGHT_52}),
        "vkd-strong": Arm("V_kD, scale 1, weight 17", {**VKD, "distill.weight": WEIGHT_17}),
        "match-17": Arm('V_kD, scale="match", weight 17', {**MATCH, "distill.weight": WEIGHT_17}),
        "match-30": Arm('V_kD, scale="match", weight 30', {**MATCH, "distill.weight": WEIGHT_30}),
        "none-24": Arm(
            "V_kD, none, weight 24", {**VKD, "distill.normalization": "none", "distill.weight": 10 / FEATURES_STD}
        ),
        "cosine": Arm("V_kD, cosine", {**VKD, "distill.loss": "cosine"}),
        "batch_norm-30": Arm("V_kD, batch norm, weight 30", {**VKD, **BATCH_NORM, "distill.weight": WEIGHT_30}),
        "linear-batch_norm-30": Arm(
            "linear projection, batch norm, weight 30", {**LINEAR, **BATCH_NORM, "distill.weight": WEIGHT_30}
        ),
        "linear-tokens": Arm("linear projection, every position", {**LINEAR, **TOKENS}),
        "match-tokens": Arm('V_kD, scale="match", every position', {**MATCH, **TOKENS}),
    }
    for _percent in (10, 100):
        _name, _labels = f"{_percent} % of labels", {"data.labels": _percent / 100}
        arms[f"logits-{_percent}pct"] = Arm(f"logits, {_name}", {"distill.weight": 0.0, **_labels})
        arms[f"linear-{_percent}pct"] = Arm(f"linear projection, {_name}", {**LINEAR, **_labels})
        arms[f"match-{_percent}pct"] = Arm(f'V_kD, scale="match", {_name}', {**MATCH, **_labels})
    for _width in (32, 128):
        arms[f"linear-w{_width}"] = Arm(f"linear projection, width {_width}", {**LINEAR, "student.width": _width})
        arms[f"match-w{_width}"] = Arm(f'V_kD, scale="match", width {_width}', {**MATCH, "student.width": _width})
