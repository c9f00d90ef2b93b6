"""DiffAugment (Zhao et al. 2020): the same random changes for real and for generated images, differentiable.

The discriminator never sees an image without them, so it cannot learn a limited data set by heart, and the generator
learns through them. What is drawn is separate from what is done: `draw` takes a generator, `augment` is a function.
"""

from __future__ import annotations

import torch
from torch import Tensor

POLICIES = ("translation", "cutout", "color")
BACKGROUND = -1.0  # of pixels from -1 to 1: what enters from outside, and what a cut leaves: black


def draw(
    policy: tuple[str, ...], count: int, size: int, generator: torch.Generator, *, shift: float, cut: float
) -> dict[str, Tensor]:
    """Amounts for `count` images: a whole number of pixels up to `shift` times the side each way, a square of `cut`
    times the side anywhere (also partly outside), and a brightness, saturation and contrast."""
    amounts = {}
    if "translation" in policy:
        reach = round(shift * size)
        amounts["translation"] = torch.randint(-reach, reach + 1, (count, 2), generator=generator)
    if "cutout" in policy:
        length = round(cut * size)
        corner = torch.randint(size + 1 - length % 2, (count, 2), generator=generator) - length // 2
        amounts["cutout"] = torch.cat([corner, torch.full((count, 1), length)], dim=1)
    if "color" in policy:
        amounts["color"] = torch.rand(count, 3, generator=generator)
    return amounts


def augment(images: Tensor, amounts: dict[str, Tensor]) -> Tensor:  # (N, C, H, W) from -1 to 1, each amount (N, ...)
    """Colour, translation and cutout, as far as there are amounts of them."""
    if "color" in amounts:
        images = recolor(images, amounts["color"])
    if "translation" in amounts:
        images = translate(images, amounts["translation"])
    if "cutout" in amounts:
        images = cut_out(images, amounts["cutout"])
    return images


def translate(images: Tensor, shift: Tensor) -> Tensor:  # (N, C, H, W), (N, 2) whole rows and columns
    """out[y, x] = in[y - shift_y, x - shift_x], background where that is outside."""
    n, c, h, w = images.shape
    rows, inside_rows = _source(shift[:, 0], h)
    columns, inside_columns = _source(shift[:, 1], w)
    moved = images.gather(2, rows[:, None, :, None].expand(n, c, h, w)).gather(
        3, columns[:, None, None].expand(n, c, h, w)
    )
    return torch.where((inside_rows[:, :, None] & inside_columns[:, None])[:, None], moved, BACKGROUND)


def _source(shift: Tensor, size: int) -> tuple[Tensor, Tensor]:  # (N,) -> (N, size) positions, and whether they exist
    wanted = torch.arange(size, device=shift.device) - shift[:, None]
    return wanted.clamp(0, size - 1), (wanted >= 0) & (wanted < size)


def cut_out(images: Tensor, square: Tensor) -> Tensor:  # (N, C, H, W), (N, 3): first row, first column, side
    rows, columns = (_covered(square[:, i], square[:, 2], images.shape[2 + i]) for i in (0, 1))
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], BACKGROUND)


def _covered(first: Tensor, length: Tensor, size: int) -> Tensor:  # (N,), (N,) -> (N, size)
    position = torch.arange(size, device=first.device) - first[:, None]
    return (position >= 0) & (position < length[:, None])


def recolor(images: Tensor, amounts: Tensor) -> Tensor:  # (N, C, H, W), (N, 3) from 0 to 1
    """Brightness by -0.5 to 0.5, then saturation times 0 to 2, then contrast times 0.5 to 1.5."""
    brightness, saturation, contrast = amounts.to(images.dtype).view(-1, 3, 1, 1, 1).unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    return middle + (images - middle) * (contrast + 0.5)
