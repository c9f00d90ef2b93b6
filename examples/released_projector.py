"""The released method's projector against the library's, as a task of one's own for `vkd distill`.

    vkd distill examples.released_projector:ReleasedProjector --arms logits,linear,vkd,released --seeds 8

The released code projects by a plain linear layer under `torch.nn.utils.parametrizations.orthogonal`, and its optimizer
decays what lies under that parametrization like any other weight. PyTorch's map for a matrix that is not square is the
Householder map, whose diagonal is truncated to integers: decay turns ones into zeros, and the projection with them.
"""

from torch import nn
from torch.nn.utils.parametrizations import orthogonal

import vkd_kernels as vk
from vkd_kernels.recipes import classification
from vkd_kernels.recipes.config import option, section
from vkd_kernels.recipes.task import Arm


class Distill(classification.Distill):
    released: bool = option(False, "project by PyTorch's Householder map, under weight decay", source="released code")


class Config(classification.Config):
    distill: Distill = section(Distill, weight=10.0)


class ReleasedLoss(nn.Module):
    """`vk.functional.ortho_proj_loss` with a projection that its user made."""

    def __init__(self, student_dim, teacher_dim, distill):
        super().__init__()
        self.projection = orthogonal(nn.Linear(student_dim, teacher_dim, bias=False))
        self.normalization, self.loss = distill.normalization, distill.loss

    def forward(self, student, teacher):
        weight = self.projection.weight  # (T, S)
        return vk.functional.ortho_proj_loss(student, teacher, weight, normalization=self.normalization, loss=self.loss)


class ReleasedProjector(classification.Classification):
    Config = Config
    arms = {
        **classification.Classification.arms,
        "released": Arm("V_kD, the released projector", {"distill.released": True}),
    }

    def make_model(self, student):
        model = super().make_model(student)
        if self.config.distill.released and model.feature_loss is not None:
            teacher_dim, student_dim = model.feature_loss.projection.weight.shape
            model.feature_loss = ReleasedLoss(student_dim, teacher_dim, self.config.distill)
        return model

    def diagnostics(self):
        """How far P^T P is from the identity: 1 for a matrix of zeros."""
        loss = getattr(self.model, "feature_loss", None)
        if not isinstance(loss, ReleasedLoss):
            return super().diagnostics()
        error = vk.diagnostics.orthogonality_error(loss.projection.weight.detach()).max()
        return {"max |PᵀP - I|": float(error)}
