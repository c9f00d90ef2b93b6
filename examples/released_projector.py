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
    """An `OrthoProjLoss` with a projection that its user made: `vk.functional.ortho_proj_loss`."""

    def __init__(self, loss):
        super().__init__()
        teacher_dim, student_dim = loss.projection.weight.shape
        self.projection, self.scale = orthogonal(nn.Linear(student_dim, teacher_dim, bias=False)), loss.scale
        self.options = {name: getattr(loss, name) for name in ("normalization", "loss", "beta", "eps", "process_group")}

    def forward(self, student, teacher):
        scale = self.scale[0] if isinstance(self.scale, nn.Parameter) else self.scale
        weight = self.projection.weight  # (T, S)
        return vk.functional.ortho_proj_loss(student, teacher, weight, scale=scale, **self.options)


class ReleasedProjector(classification.Classification):
    Config = Config
    arms = {
        **classification.Classification.arms,
        "released": Arm("V_kD, the released projector", {"distill.released": True}),
    }

    def make_model(self, student):
        model = super().make_model(student)
        if self.config.distill.released and model.feature_loss is not None:
            model.feature_loss = ReleasedLoss(model.feature_loss)
        return model

    def diagnostics(self):
        """How far P^T P is from the identity: 1 for a matrix of zeros."""
        loss = getattr(self.model, "feature_loss", None)
        if not isinstance(loss, ReleasedLoss):
            return super().diagnostics()
        error = vk.diagnostics.orthogonality_error(loss.projection.weight.detach()).max()
        return {"max |PᵀP - I|": float(error)}
