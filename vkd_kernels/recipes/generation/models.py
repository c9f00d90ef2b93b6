"""The bundled run's generator and discriminator, and which pair `student.name` means; biggan.py has the other one.

A generator is called with latents and labels and gives images from -1 to 1. A discriminator gives its pooled features,
which are what is distilled, and one logit per image: real where it is large.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..config import OptionError

SLOPE = 0.2  # of the leaky ReLUs


class Shape(NamedTuple):
    """What a data set asks of a model."""

    channels: int
    size: int  # side of the images
    classes: int


class Verdict(NamedTuple):
    features: Tensor  # (N, F), pooled
    logits: Tensor  # (N,)


class SmallGenerator(nn.Module):
    """Latents to a quarter of the size by a linear layer, then twice upsampling and a 3x3 convolution; no classes."""

    def __init__(self, latent: int, widths: tuple[int, ...], shape: Shape) -> None:
        super().__init__()
        first, second, third = widths
        self.latent, self.grid = latent, shape.size // 4
        self.project = nn.Linear(latent, first * self.grid**2)
        self.body = nn.Sequential(
            nn.BatchNorm2d(first), nn.ReLU(), nn.Upsample(scale_factor=2),
            nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU(), nn.Upsample(scale_factor=2),
            nn.Conv2d(second, third, 3, padding=1), nn.BatchNorm2d(third), nn.ReLU(),
            nn.Conv2d(third, shape.channels, 3, padding=1), nn.Tanh(),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:  # (N, latent), (N,) -> (N, C, H, W)
        return self.body(self.project(latents).unflatten(1, (-1, self.grid, self.grid)))


class SmallDiscriminator(nn.Module):
    """Convolutions with spectral norm: 3x3, then 4x4 with stride 2, one per width; mean over the positions; linear."""

    def __init__(self, widths: tuple[int, ...], shape: Shape) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (before, width) in enumerate(zip((shape.channels, *widths[:-1]), widths, strict=True)):
            convolution = nn.Conv2d(before, width, 4, 2, 1) if index else nn.Conv2d(before, width, 3, 1, 1)
            layers += [spectral_norm(convolution), nn.LeakyReLU(SLOPE)]
        self.body, self.head = nn.Sequential(*layers), spectral_norm(nn.Linear(widths[-1], 1))
        self.num_features = widths[-1]

    def forward(self, images: Tensor, labels: Tensor) -> Verdict:  # (N, C, H, W), (N,)
        features = self.body(images).mean(dim=(2, 3))
        return Verdict(features, self.head(features).squeeze(1))


class Classifier(nn.Module):
    """The bundled teacher, and the network whose features measure the images: convolution, batch norm, ReLU, once per
    width; halved after the first; mean over the positions; linear."""

    def __init__(self, widths: tuple[int, ...], shape: Shape) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (before, width) in enumerate(zip((shape.channels, *widths[:-1]), widths, strict=True)):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index == 0 else []
        self.body, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], shape.classes)
        self.num_features = widths[-1]

    def features(self, images: Tensor) -> Tensor:  # (N, C, H, W) from -1 to 1 -> (N, F)
        return self.body(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


# ---- by name ---------------------------------------------------------------------------------------------------------


def check_sizes(config: Any, shape: Shape) -> None:
    """An OptionError where the networks cannot make or judge images of this shape."""
    g, d = config.student, config.discriminator
    if g.name == "small":
        if len(g.widths) != 3:
            raise OptionError(f"student.widths: the small generator has three, got {len(g.widths)}")
        if shape.size % 4 or shape.size < 2 ** len(d.widths):
            raise OptionError(
                f"data.size: must be a multiple of 4, and at least {2 ** len(d.widths)} for {len(d.widths)} "
                f"discriminator.widths; got {shape.size}"
            )
        return
    if shape.size < 16 or shape.size & (shape.size - 1):
        raise OptionError(f"data.size: biggan makes images of 16, 32, 64, ... pixels; got {shape.size}")
    inside = [2**n for n in range(3, shape.size.bit_length() - 1)]  # 8, 16, ... below the images' own
    for side, attention in (("student", g.attention), ("discriminator", d.attention)):
        if attention and attention not in inside:
            raise OptionError(f"{side}.attention: must be 0 or one of {inside}, got {attention}")


def make_pair(config: Any, shape: Shape) -> tuple[nn.Module, nn.Module]:
    """The generator `student.name` and its discriminator, in this order: the same initial weights in every arm."""
    check_sizes(config, shape)
    g, d = config.student, config.discriminator
    if g.name == "small":
        return SmallGenerator(g.latent, g.widths, shape), SmallDiscriminator(d.widths, shape)
    from .biggan import BigDiscriminator, BigGenerator

    return (
        BigGenerator(g.latent, g.width, shape, attention=g.attention),
        BigDiscriminator(d.width, shape, attention=d.attention),
    )
