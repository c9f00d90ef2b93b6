"""How far generated images are from held-out real ones: the Fréchet distance between Gaussians in a network's features.

In the features of Inception v3 it is the FID, which torchmetrics computes with torch-fidelity's weights; for the digits
the network is a classifier trained on the held-out images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import OptionError
from ..runs import RunError
from .data import as_bytes, as_float

Judge = Callable[
    [Iterable[Tensor]], float
]  # this rank's share of the generated images -> distance of those of all ranks
INCEPTION_CHANNELS = 2048


def frechet_distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁^½ Σ₂ Σ₁^½)^½) of means (C,) and covariances (C, C)."""
    (mean, covariance), (other_mean, other_covariance) = one, other
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    middle = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0).sqrt().sum()
    return (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * middle


class ClassifierDistance:
    """In the features of a frozen classifier. Called with float images from -1 to 1, or uint8."""

    def __init__(self, real: Iterable[Tensor], fabric: Any, classifier: Any) -> None:
        self.fabric, self.classifier = fabric, classifier
        self.real = self.moments(real)

    def __call__(self, generated: Iterable[Tensor]) -> float:
        return frechet_distance(self.real, self.moments(generated)).item()

    @torch.no_grad()
    def moments(self, images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and covariance, N - 1 in the denominator, of the features of all ranks' images; float64."""
        sums: Any = 0
        for part in images:
            features = self.classifier.features(self.fabric.to_device(as_float(part))).double().cpu()
            rows = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
            sums = sums + rows.mT @ rows  # [Σ x xᵀ, Σ x; Σ xᵀ, N]
        sums = self.fabric.all_reduce(self.fabric.to_device(sums), reduce_op="sum").cpu()
        products, total, count = sums[:-1, :-1], sums[:-1, -1], sums[-1, -1]
        mean = total / count
        return mean, (products - count * torch.outer(mean, mean)) / (count - 1)


class FID:
    """In Inception's features, its weights from a file or from where torch-fidelity keeps or fetches them."""

    def __init__(self, real: Iterable[Tensor], fabric: Any, weights: str = "") -> None:
        if weights and not Path(weights).is_file():
            raise OptionError(f"metric.weights: there is no file {weights}")
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            metric = FrechetInceptionDistance(
                INCEPTION_CHANNELS, reset_real_features=False, feature_extractor_weights_path=weights or None
            )
        except ModuleNotFoundError as error:
            raise RunError(
                f"metric.features: inception needs torchmetrics and torch-fidelity ({error}): "
                'pip install "vkd_kernels[generation]"'
            ) from error
        except Exception as error:  # no network, or a damaged file: as many types as ways to fail
            raise RunError(
                f"metric.weights: cannot get Inception's weights ({error}); give a file with torch-fidelity's "
                "weights-inception-2015-12-05"
            ) from error
        self.metric: Any = fabric.to_device(metric)
        self.update(real, real=True)

    def update(self, images: Iterable[Tensor], *, real: bool) -> None:
        for part in images:
            with torch.autocast(self.metric.device.type, enabled=False):
                self.metric.update(as_bytes(part).to(self.metric.device), real=real)

    def __call__(self, generated: Iterable[Tensor]) -> float:
        self.metric.reset()  # of the generated images alone
        self.update(generated, real=False)
        return self.metric.compute().item()  # over all ranks
