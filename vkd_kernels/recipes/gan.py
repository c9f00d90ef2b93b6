"""The networks of the generation task, and DiffAugment.

BigGAN (Brock et al. 2019) as it is used at 32x32: residual blocks, class-conditional batch norm, spectral norm,
projection discriminator (Miyato & Koyama 2018). 4.3 and 4.2 million parameters at 32x32 with width 256 and ten classes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from .models import Shape

INITIAL_STD = 0.02  # BigGAN's N02
GRID = 4  # side of BigGAN's first map
SHIFT, CUT = 0.125, 0.5  # of DiffAugment, as shares of the side


class Verdict(NamedTuple):
    features: Tensor  # (N, F), pooled
    logits: Tensor  # (N,)


def as_float(images: Tensor) -> Tensor:
    """From -1 to 1."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def as_bytes(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()


# ---- networks --------------------------------------------------------------------------------------------------------


def normed(layer: Any) -> Any:
    """Small normal weights, zero biases, spectral norm."""
    nn.init.normal_(layer.weight, std=INITIAL_STD)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer)


def convolution(before: int, after: int, kernel: int) -> nn.Module:
    return normed(nn.Conv2d(before, after, kernel, padding=kernel // 2))


@torch.no_grad()
def renew_spectral_norms(network: nn.Module) -> None:
    """The singular vectors by which spectral norm divides, of the weights as they are. A moving average's buffers hold
    averages of other weights' vectors, by which its layers would have norms above 1."""
    for layer in network.modules():
        weight: Any = layer.parametrizations.weight if is_parametrized(layer, "weight") else ()  # type: ignore[union-attr]
        for part in weight:
            vectors = dict(part.named_buffers())
            if vectors.keys() == {"_u", "_v"}:  # spectral norm's
                left, _, right = torch.linalg.svd(weight.original.movedim(part.dim, 0).flatten(1), full_matrices=False)
                vectors["_u"].copy_(left[:, 0])
                vectors["_v"].copy_(right[0])


class ConditionalBatchNorm(nn.Module):
    """Batch norm with a gain and a bias per class."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.gain, self.bias = nn.Parameter(torch.ones(classes, width)), nn.Parameter(torch.zeros(classes, width))

    def no_weight_decay(self) -> set[str]:
        """One dimension per class."""
        return {"gain", "bias"}

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # (N, C, H, W), (N,)
        return self.norm(x) * self.gain[labels][:, :, None, None] + self.bias[labels][:, :, None, None]


class UpBlock(nn.Module):
    """Twice the resolution: batch norm, ReLU, upsampling, convolution, batch norm, ReLU, convolution; 1x1 beside it."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (ConditionalBatchNorm(width, classes) for _ in range(2))
        self.conv1, self.conv2 = convolution(width, width, 3), convolution(width, width, 3)
        self.shortcut = convolution(width, width, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.conv1(F.interpolate(F.relu(self.norm1(x, labels)), scale_factor=2))
        y = self.conv2(F.relu(self.norm2(y, labels)))
        return y + F.interpolate(self.shortcut(x), scale_factor=2)


class DownBlock(nn.Module):
    """ReLU, convolution, ReLU, convolution, average pooling where `down`; no first ReLU on images."""

    def __init__(self, before: int, width: int, *, down: bool, first: bool = False) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.conv1, self.conv2 = convolution(before, width, 3), convolution(width, width, 3)
        self.shortcut = convolution(before, width, 1) if down or before != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x)))) + self.shortcut(x)
        return F.avg_pool2d(y, 2) if self.down else y


class Generator(nn.Module):
    """Latents and labels to images from -1 to 1."""

    def __init__(self, latent: int, width: int, shape: Shape) -> None:
        super().__init__()
        self.num_features = width
        self.project = normed(nn.Linear(latent, width * GRID**2))
        self.blocks = nn.ModuleList(UpBlock(width, shape.classes) for _ in range(int(math.log2(shape.size // GRID))))
        self.norm, self.out = nn.BatchNorm2d(width), convolution(width, shape.channels, 3)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:  # (N, latent), (N,) -> (N, C, H, W)
        x = self.project(latents).unflatten(1, (-1, GRID, GRID))
        for block in self.blocks:
            x = block(x, labels)
        return self.out(F.relu(self.norm(x))).tanh()


class Discriminator(nn.Module):
    """Blocks that halve the maps to 8x8 (images of 8x8: to 4x4), two more of that size (there one), ReLU, and the sum
    over the positions: the features that are distilled. The logit, large for a real image, is linear in them, with
    weights that depend on the class."""

    def __init__(self, width: int, shape: Shape) -> None:
        super().__init__()
        halvings = int(math.log2(shape.size // 8))
        blocks = [DownBlock(shape.channels, width, down=True, first=True)]
        blocks += [DownBlock(width, width, down=index < halvings) for index in range(1, halvings + 2)]
        self.blocks = nn.Sequential(*blocks)
        self.head, self.classes = normed(nn.Linear(width, 1)), normed(nn.Embedding(shape.classes, width))
        self.num_features = width

    def forward(self, images: Tensor, labels: Tensor) -> Verdict:  # (N, C, H, W), (N,)
        features = F.relu(self.blocks(images)).sum(dim=(2, 3))
        return Verdict(features, self.head(features).squeeze(1) + (self.classes(labels) * features).sum(dim=1))


# ---- DiffAugment -----------------------------------------------------------------------------------------------------


def diff_augment(
    images: Tensor,  # (N, C, H, W) from -1 to 1
    policy: tuple[str, ...],
    background: float,
) -> Tensor:
    """DiffAugment (Zhao et al. 2020): the same kind of changes for real and generated images, differentiable.

    Translation shifts an image by whole pixels, up to an eighth of its side each way. Cutout blanks a square of half
    the side, which may lie partly outside. `background` is what moves in from outside, and what a cut leaves.
    """
    count, side, device = len(images), images.shape[-1], images.device
    if "translation" in policy:
        reach = round(SHIFT * side)
        images = translate(images, torch.randint(-reach, reach + 1, (count, 2), device=device), background)
    if "cutout" in policy:
        length = round(CUT * side)
        corner = torch.randint(side + 1 - length % 2, (count, 2), device=device) - length // 2
        images = cut_out(images, corner, length, background)
    return images


def translate(images: Tensor, shift: Tensor, background: float) -> Tensor:  # (N, C, H, W), (N, 2) rows and columns
    """out[y, x] = in[y - shift_y, x - shift_x], background where that is outside."""
    n, _, h, w = images.shape
    padded, number = F.pad(images, (1, 1, 1, 1), value=background), torch.arange(n, device=images.device)
    rows, columns = (torch.arange(side, device=images.device) - shift[:, i : i + 1] for i, side in enumerate((h, w)))
    rows, columns = rows.clamp(-1, h)[:, :, None] + 1, columns.clamp(-1, w)[:, None] + 1
    return padded[number[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def cut_out(
    images: Tensor,  # (N, C, H, W)
    corner: Tensor,  # (N, 2) first row and column
    length: int,
    background: float,
) -> Tensor:
    sides = enumerate(images.shape[2:])
    rows, columns = (torch.arange(side, device=images.device) - corner[:, i : i + 1] for i, side in sides)
    covered = [(place >= 0) & (place < length) for place in (rows, columns)]
    return images.masked_fill((covered[0][:, :, None] & covered[1][:, None])[:, None], background)
