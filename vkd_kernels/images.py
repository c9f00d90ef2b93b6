"""``renormalize``: images as one model expects them, made from images as another one does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .ops import checks

FORMS = (
    "(mean, std), a timm model or its configuration, a transformers image processor or its configuration, or a "
    "torchvision transform with mean and std"
)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
OF_PILLOW = {0: "nearest", 1: "bicubic", 2: "bilinear", 3: "bicubic"}  # its numbers; 1 is Lanczos, near bicubic
RESCALED_BY = 1 / 255  # what processors do before mean and std, to images in [0, 255]


@dataclass(frozen=True)
class ImageConfig:
    """How a model wants its images: (x - mean) / std of x in [0, 1]; their size, and how to get there."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | int | None = None  # (H, W), or the shorter side
    interpolation: str = "bicubic"


def renormalize(
    images: torch.Tensor,  # (N, C, H, W) or (C, H, W)
    *,
    from_: Any,
    to: Any,
    size: tuple[int, int] | int | None = None,
    interpolation: str | None = None,
) -> torch.Tensor:
    r"""Images normalized for one model, as another one expects them: its mean and std, and its size.

    ::

        y = (x · std_from + mean_from - mean_to) / std_to        per channel, computed in float32 or float64

    Resizing is antialiased (``F.interpolate``) and keeps the view: nothing is cropped.

    Args:
        images: floating point, normalized as ``from_`` says.
        from_, to: a pair (mean, std) of numbers or sequences, of images in [0, 1]; or what knows them: a timm model
            (``pretrained_cfg``) or its configuration, a transformers image processor or its configuration, a
            torchvision transform with ``mean`` and ``std``.
        size: (H, W), or the shorter side; by default what ``to`` says; a bare (mean, std) leaves the size as it is.
        interpolation: ``"bicubic"``, ``"bilinear"`` or ``"nearest"``; by default what ``to`` says, else bicubic.

    Returns:
        Images in the dtype of ``images``; ``images`` itself where nothing changes.

    Raises:
        TypeError, ValueError: no mean and std can be read there; the channels differ.

    Example:
        >>> import torch, vkd_kernels as vk
        >>> images = torch.zeros(2, 3, 224, 224)  # the mean of ImageNet
        >>> imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        >>> for_siglip = vk.renormalize(images, from_=imagenet, to=(0.5, 0.5), size=(256, 256))
        >>> for_siglip.shape, round(for_siglip[0, 0, 0, 0].item(), 4)
        (torch.Size([2, 3, 256, 256]), -0.03)
    """
    checks.check_tensor("images", images)
    if images.dim() not in (3, 4):
        raise ValueError(f"images must have the shape (N, C, H, W) or (C, H, W); got {tuple(images.shape)}")
    source, target = image_config("from_", from_), image_config("to", to)
    checks.check_choice("interpolation", interpolation, (None, *INTERPOLATIONS))
    height_and_width = _size_of(images, target.size if size is None else size)
    resized = height_and_width != tuple(images.shape[-2:])
    if (source.mean, source.std) == (target.mean, target.std) and not resized:
        return images
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    if resized:
        mode = interpolation or target.interpolation
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        batch = F.interpolate(batch, height_and_width, mode=mode, antialias=mode != "nearest")
        x = batch if x.dim() == 4 else batch[0]
    mean_from, std_from = (_per_channel("from_", values, x) for values in (source.mean, source.std))
    mean_to, std_to = (_per_channel("to", values, x) for values in (target.mean, target.std))
    return (x * (std_from / std_to) + (mean_from - mean_to) / std_to).to(images.dtype)


def image_config(name: str, given: Any) -> ImageConfig:
    """What an argument says of a model's images; a TypeError if it says nothing."""
    config = _config(name, given)
    if config is None:
        hint = ""
        if hasattr(given, "config") and not hasattr(given, "pretrained_cfg"):
            hint = ". A transformers model does not know its mean and std: give its image processor"
        raise TypeError(f"{name} must be {FORMS}; got {type(given).__name__}{hint}")
    if not all(value > 0 for value in config.std):
        raise ValueError(f"{name}: std must be positive; got {config.std}")
    return config


def different_normalization(student: nn.Module, teacher: nn.Module, name: str = "") -> str:
    """What to say where both models' own configurations show that they expect different images; "" otherwise.

    ``name``: the teacher's, where there are several.
    """
    try:
        configs = [_config(name, model) for name, model in (("student", student), ("teacher", teacher))]
    except (TypeError, ValueError):  # a configuration of another kind
        return ""
    expects, gets = configs
    if expects is None or gets is None or (expects.mean, expects.std) == (gets.mean, gets.std):
        return ""
    which, own, same = "teacher", "vkd_kernels.renormalize(images, from_=student, to=teacher)", "images"
    if name:
        which, own, same = f"teacher {name!r}", f"{{{name!r}: {own}}}", f"{{{name!r}: images}}"
    return (
        f"student and {which} were made for images of different normalization (mean and std {expects.mean}, "
        f"{expects.std} and {gets.mean}, {gets.std}), and get the same images. Give the teacher its own: "
        f"teacher_input={own}; or teacher_input={same}, if they are as the teacher expects them"
    )


def _config(name: str, given: Any) -> ImageConfig | None:
    given = getattr(given, "_orig_mod", given)  # compiled
    if hasattr(given, "pretrained_cfg"):  # a timm model
        config = _config(name, given.pretrained_cfg)
        built_for = getattr(getattr(given, "patch_embed", None), "img_size", None)
        if config is not None and isinstance(built_for, (tuple, list)):
            config = ImageConfig(config.mean, config.std, (built_for[0], built_for[1]), config.interpolation)
        return config
    if isinstance(given, nn.Module) and not _has(given, "mean", "std"):
        return None
    if isinstance(given, (tuple, list)):
        if len(given) != 2:
            raise ValueError(f"{name} must be a pair (mean, std); got {checks.describe(given)}")
        return ImageConfig(_values(name, given[0]), _values(name, given[1]))
    if _has(given, "image_mean", "image_std"):  # an image processor
        rescales, factor = _get(given, "do_rescale"), _get(given, "rescale_factor")
        if rescales is False or (factor is not None and not math.isclose(factor, RESCALED_BY, rel_tol=1e-6)):
            raise ValueError(
                f"{name} is a processor that does not rescale images by 1/255 before its mean and std; give (mean, "
                "std) of images in [0, 1]"
            )
        normalizes = _get(given, "do_normalize") is not False
        mean = _values(name, _get(given, "image_mean") if normalizes else 0.0)
        std = _values(name, _get(given, "image_std") if normalizes else 1.0)
        crops = _get(given, "do_center_crop") and _get(given, "crop_size")
        if isinstance(crops, int) and not isinstance(crops, bool):  # of a crop: both sides
            crops = {"height": crops, "width": crops}
        resizes = _get(given, "size") if _get(given, "do_resize") is not False else None
        resample = _get(given, "resample")
        mode = "bicubic" if resample is None else OF_PILLOW.get(int(resample), "bicubic")
        return ImageConfig(mean, std, _processor_size(crops or resizes), mode)
    if _has(given, "mean", "std"):  # timm's configuration, or a transform
        size = _get(given, "input_size")
        size = tuple(size)[-2:] if size is not None else _get(given, "crop_size")
        if isinstance(size, (tuple, list)):
            size = (size[0], size[-1])
        mode = str(getattr(_get(given, "interpolation"), "value", _get(given, "interpolation")))
        mean, std = _values(name, _get(given, "mean")), _values(name, _get(given, "std"))
        return ImageConfig(mean, std, size, mode if mode in INTERPOLATIONS else "bicubic")
    return None


def _get(given: Any, key: str) -> Any:
    return given.get(key) if isinstance(given, Mapping) else getattr(given, key, None)


def _has(given: Any, *keys: str) -> bool:
    return all(_get(given, key) is not None for key in keys)


def _values(name: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, torch.Tensor):
        values = values.flatten().tolist()
    numbers = tuple(values) if isinstance(values, Sequence) else (values,)
    for number in numbers:
        checks.check_number(f"{name}: mean and std", number)
    return tuple(float(number) for number in numbers)


def _processor_size(size: Any) -> tuple[int, int] | int | None:
    if size is None or isinstance(size, int):
        return size
    if _has(size, "height", "width"):
        return _get(size, "height"), _get(size, "width")
    return _get(size, "shortest_edge")


def _size_of(images: torch.Tensor, size: Any) -> tuple[int, int]:
    height, width = images.shape[-2:]
    if size is None:
        return height, width
    if isinstance(size, int) and not isinstance(size, bool):
        checks.check_dim("size", size)
        shorter = min(height, width)
        return round(height * size / shorter), round(width * size / shorter)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size must be (height, width) or the shorter side; got {checks.describe(size)}")
    for side in size:
        checks.check_dim("size", side)
    return size[0], size[1]


def _per_channel(name: str, values: tuple[float, ...], images: torch.Tensor) -> torch.Tensor:
    channels = images.shape[-3]
    if len(values) not in (1, channels):
        raise ValueError(f"{name} has {len(values)} means or stds, and images {channels} channels")
    return torch.tensor(values, device=images.device, dtype=images.dtype).view(-1, 1, 1)
