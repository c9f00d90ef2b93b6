"""The losses of the generation task, with generator and discriminator inside.

    discriminator:  ADV(D(real), D(fake)) + weight * smooth_l1(X P^T, whiten(Y))
    generator:      ADV(D(fake))

X are the discriminator's pooled features, Y the teacher's, of the same augmented images. The feature loss trains the
discriminator and its projection, on real and on generated images. No feature loss reaches the generator: it learns of
the teacher only through what the discriminator has learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import augment

Amounts = dict[str, Tensor]


@dataclass
class Batch:
    """One rank's share of one discriminator step."""

    real: Tensor  # (N, C, H, W) from -1 to 1
    labels: Tensor  # (N,) of the real images
    latents: Tensor  # (N, latent)
    fake_labels: Tensor  # (N,) of the images to be generated
    amounts: Amounts  # of augmentation, of 2 N images: the real ones first


@dataclass
class GeneratorBatch:
    """One rank's share of one generator step."""

    latents: Tensor  # (N, latent)
    labels: Tensor  # (N,)
    amounts: Amounts  # of N images


class DistilledGAN(nn.Module):
    """Generator, discriminator and projection: `forward(batch)` -> the losses of the one that the batch is for.

    They are in one module so that data-parallel wrapping reduces all gradients; in either kind of step the parameters
    of the other network get none. `teacher` (images -> targets (N, T)) is frozen and no part of it.
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, feature_loss: nn.Module | None, teacher: Any, *,
        kind: str, weight: float, distilled: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.generator, self.discriminator, self.feature_loss = generator, discriminator, feature_loss
        self.kind, self.weight, self.distilled, self.frozen = kind, weight, distilled, (teacher,)

    def forward(self, batch: Batch | GeneratorBatch) -> dict[str, Tensor]:
        if isinstance(batch, GeneratorBatch):
            return self.generator_losses(batch)
        return self.discriminator_losses(batch)

    def discriminator_losses(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = self.generator(batch.latents, batch.fake_labels)
        images = augment(torch.cat([batch.real, fake]), batch.amounts)
        verdict = self.discriminator(images, torch.cat([batch.labels, batch.fake_labels]))
        real_logits, fake_logits = verdict.logits.float().chunk(2)
        losses = {"discriminator": adversarial(self.kind, real_logits, fake_logits)}
        total = losses["discriminator"]
        if self.feature_loss is not None:
            count = len(batch.real) if self.distilled == "real" else len(images)
            with torch.no_grad():
                target = self.frozen[0](images[:count])
            losses["features"] = self.feature_loss(verdict.features[:count], target)
            total = total + self.weight * losses["features"]
        return {**losses, "total": total}

    def generator_losses(self, batch: GeneratorBatch) -> dict[str, Tensor]:
        fake = augment(self.generator(batch.latents, batch.labels), batch.amounts)
        logits = self.discriminator(fake, batch.labels).logits.float()
        return {"generator": -logits.mean() if self.kind == "hinge" else F.softplus(-logits).mean()}


def adversarial(kind: str, real: Tensor, fake: Tensor) -> Tensor:  # logits (N,), (N,)
    """The discriminator's loss: hinge, or the logistic one whose generator's side is the non-saturating loss."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()
