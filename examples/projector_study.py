"""Further arms of the study in docs/evidence.md, as a task of one's own: is it the projection, or the size of its loss?

    vkd distill examples.projector_study:ProjectorStudy --recipe fashion-mnist data.root=FOLDER --seeds 8 \\
        --arms linear-strong,vkd-strong,released,orthogonal-none

With `scale="match"` the loss pulls on the student sqrt(T / S) times as strongly as with scale 1, where T and S are the
teacher's and the student's widths. The arms "strong" have that factor in the weight instead, of the recipe's widths.
"""

import math

from examples.released_projector import ReleasedProjector
from vkd_kernels.recipes.task import Arm

WEIGHT = 10 * math.sqrt(192 / 64)


class ProjectorStudy(ReleasedProjector):
    arms = {
        **ReleasedProjector.arms,
        "linear-strong": Arm(
            "linear projection, weight 17", {"distill.projection": "linear", "distill.weight": WEIGHT}
        ),
        "vkd-strong": Arm(
            "V_kD, scale 1, weight 17",
            {"distill.projection": "orthogonal", "distill.scale": 1.0, "distill.weight": WEIGHT},
        ),
    }
