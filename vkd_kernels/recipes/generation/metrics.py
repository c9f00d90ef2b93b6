"""How far generated images are from held-out real ones: the Fréchet distance between Gaussians in a network's features.

In the features of torch-fidelity's Inception v3 it is the FID; for the digits the network is a classifier trained on
the held-out images.
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


def frechet_distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁^½ Σ₂ Σ₁^½)^½) of means (C,) and covariances (C, C)."""
    (mean, covariance), (other_mean, other_covariance) = one, other
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    middle = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0).sqrt().sum()
    return (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * middle


class FrechetDistance:
    """`distance(generated)` to the real images. Both come in parts, float from -1 to 1 or uint8, and are this rank's
    share of them; the distance is that between the images of all ranks.

    Args:
        features: images (N, C, H, W) from -1 to 1, or uint8, on the device -> (N, F).
    """

    def __init__(self, real: Iterable[Tensor], fabric: Any, features: Callable[[Tensor], Tensor]) -> None:
        self.fabric, self.features = fabric, features
        self.real = self.moments(real)

    def __call__(self, generated: Iterable[Tensor]) -> float:
        return frechet_distance(self.real, self.moments(generated)).item()

    @torch.no_grad()
    def moments(self, images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and covariance, N - 1 in the denominator, of the features; float64."""
        sums: Any = 0
        for part in images:
            part = self.fabric.to_device(part)
            with torch.autocast(part.device.type, enabled=False):
                features = self.features(part).double()
            rows = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
            sums = sums + rows.mT @ rows  # [Σ x xᵀ, Σ x; Σ xᵀ, N]
        sums = self.fabric.all_reduce(sums, reduce_op="sum")
        products, total, count = sums[:-1, :-1], sums[:-1, -1], sums[-1, -1]
        mean = total / count
        return mean, (products - count * torch.outer(mean, mean)) / (count - 1)


def features_of(classifier: Any) -> Callable[[Tensor], Tensor]:
    return lambda images: classifier.features(as_float(images))


def inception(weights: str, download: bool, fabric: Any) -> Callable[[Tensor], Tensor]:
    """The 2048 features that the FID is defined in, with weights from a file, or fetched."""
    if not weights and not download:
        raise OptionError(
            "metric.weights: give torch-fidelity's file weights-inception-2015-12-05-6726825d.pth, or "
            "metric.download=true to have it fetched"
        )
    if weights and not Path(weights).is_file():
        raise OptionError(f"metric.weights: there is no file {weights}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise RunError(
            f'metric.features: inception needs torch-fidelity ({error}): pip install "vkd_kernels[generation]"'
        ) from error
    try:
        if weights:
            torch.load(weights, weights_only=True)  # nothing but tensors: torch-fidelity itself would run what it holds
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights or None)
    except Exception as error:  # no network, or a damaged file: as many types as ways to fail
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"metric.weights: cannot read Inception's weights from {weights or 'the network'} ({reason})"
        ) from error
    network = fabric.to_device(network)
    return lambda images: network(as_bytes(images))[0]
