"""BigGAN (Brock et al. 2019) as it is used at 32x32: residual blocks, class-conditional batch norm, spectral norm,
projection discriminator (Miyato & Koyama 2018). 4.3 and 4.2 million parameters at width 256 with ten classes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .models import Shape, Verdict

INITIAL_STD = 0.02  # BigGAN's N02
GRID = 4  # side of the generator's first map


def normed(layer: Any) -> Any:
    """Small normal weights, zero biases, spectral norm."""
    nn.init.normal_(layer.weight, std=INITIAL_STD)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer)


def convolution(before: int, after: int, kernel: int) -> nn.Module:
    return normed(nn.Conv2d(before, after, kernel, padding=kernel // 2))


class Attention(nn.Module):
    """Self-attention over positions (Zhang et al. 2019) with a gain that starts at 0; keys at half the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = (normed(nn.Conv2d(width, width // 8, 1, bias=False)) for _ in range(2))
        self.value = normed(nn.Conv2d(width, width // 2, 1, bias=False))
        self.out = normed(nn.Conv2d(width // 2, width, 1, bias=False))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        query = self.query(x).flatten(2).mT  # (N, HW, C / 8)
        key, value = (F.max_pool2d(f(x), 2).flatten(2).mT for f in (self.key, self.value))
        found = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.gain * self.out(found.mT.unflatten(2, x.shape[2:]))


class ConditionalBatchNorm(nn.Module):
    """Batch norm with a gain and a bias per class."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.gain, self.bias = nn.Parameter(torch.ones(classes, width)), nn.Parameter(torch.zeros(classes, width))

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


class BigGenerator(nn.Module):
    def __init__(self, latent: int, width: int, shape: Shape, *, attention: int = 0) -> None:
        super().__init__()
        self.latent, self.attend_at = latent, attention
        self.project = normed(nn.Linear(latent, width * GRID**2))
        self.blocks = nn.ModuleList(UpBlock(width, shape.classes) for _ in range(int(math.log2(shape.size // GRID))))
        self.attention = Attention(width) if attention else None
        self.norm, self.out = nn.BatchNorm2d(width), convolution(width, shape.channels, 3)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:  # (N, latent), (N,) -> (N, C, H, W) from -1 to 1
        x = self.project(latents).unflatten(1, (-1, GRID, GRID))
        for block in self.blocks:
            x = block(x, labels)
            if self.attention is not None and x.shape[-1] == self.attend_at:
                x = self.attention(x)
        return self.out(F.relu(self.norm(x))).tanh()


class BigDiscriminator(nn.Module):
    """Blocks down to 8x8, two more there, ReLU, the sum over the positions; logit: linear plus class embedding."""

    def __init__(self, width: int, shape: Shape, *, attention: int = 0) -> None:
        super().__init__()
        self.attend_at = attention
        halvings = int(math.log2(shape.size // 8))
        blocks = [DownBlock(shape.channels, width, down=True, first=True)]
        blocks += [DownBlock(width, width, down=index < halvings) for index in range(1, halvings + 2)]
        self.blocks = nn.ModuleList(blocks)
        self.attention = Attention(width) if attention else None
        self.head, self.classes = normed(nn.Linear(width, 1)), normed(nn.Embedding(shape.classes, width))
        self.num_features = width

    def forward(self, images: Tensor, labels: Tensor) -> Verdict:  # (N, C, H, W), (N,)
        x = images
        for block in self.blocks:
            x = block(x)
            if self.attention is not None and x.shape[-1] == self.attend_at:
                x = self.attention(x)
        features = F.relu(x).sum(dim=(2, 3))
        return Verdict(features, self.head(features).squeeze(1) + (self.classes(labels) * features).sum(dim=1))
