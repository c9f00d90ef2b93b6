"""Further arms of the study in docs/evidence.md, as a task of one's own: is it the projection, or the size of its loss?

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


class ProjectorStudy(ReleasedProjector):
    arms = {
        **ReleasedProjector.arms,
        "linear-strong": Arm("linear projection, weight 17", {**LINEAR, "distill.weight": WEIGHT_17}),
        "linear-30": Arm("linear projection, weight 30", {**LINEAR, "distill.weight": WEIGHT_30}),
        "linear-52": Arm("linear projection, weight 52", {**LINEAR, "distill.weight": WEIGHT_52}),
        "vkd-strong": Arm("V_kD, scale 1, weight 17", {**VKD, "distill.weight": WEIGHT_17}),
        "match-17": Arm('V_kD, scale="match", weight 17', {**MATCH, "distill.weight": WEIGHT_17}),
        "match-30": Arm('V_kD, scale="match", weight 30', {**MATCH, "distill.weight": WEIGHT_30}),
        "none-24": Arm(
            "V_kD, none, weight 24", {**VKD, "distill.normalization": "none", "distill.weight": 10 / FEATURES_STD}
        ),
        "match-cosine": Arm("V_kD, cosine", {**MATCH, "distill.loss": "cosine"}),
    }
