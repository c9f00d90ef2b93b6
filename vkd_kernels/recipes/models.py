"""The networks of the classification task: the paper's students, the two of the digits task, any of timm's by name.

All are timm models: `forward_features` gives tokens or a map, `forward_head` logits; `run` reads both from any of them.
"""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import ConvNormAct, PatchEmbed
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from .config import OptionError
from .runs import load_state, load_weights

STEM_WIDTH = 64
STUDENTS = {
    "vkd_deit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vkd_deit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
}
SMALL_VIT, SMALL_CNN = "small_vit", "small_cnn"


Model = Any  # an nn.Module with timm's forward_features, forward_head, num_features and num_classes


class Shape(NamedTuple):
    """What a data set asks of a model."""

    classes: int
    size: int  # side of the images
    channels: int


def shape_of(data: Any) -> Shape:
    return Shape(data.classes, data.size, data.channels)


# ---- the paper's students --------------------------------------------------------------------------------------------


class ConvStem(PatchEmbed):
    """16x16 patches by convolutions: 7x7 stride 2 to 64 channels, two 3x3, then 8x8 stride 8 to the embedding."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **options: Any) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, **options)
        self.proj: Any = nn.Sequential(
            ConvNormAct(in_chans, STEM_WIDTH, 7, stride=2),  # each with batch norm and ReLU
            ConvNormAct(STEM_WIDTH, STEM_WIDTH, 3),
            ConvNormAct(STEM_WIDTH, STEM_WIDTH, 3),
            nn.Conv2d(STEM_WIDTH, embed_dim, patch_size // 2, stride=patch_size // 2),
        )


class DistilledViT(VisionTransformerDistilled):
    """DeiT with a convolutional stem whose distillation token is the mean of the patch embeddings.

    198 positions at 224x224: the class token, the distillation token, 14x14 patches; a head on each of the first two.
    In training mode ``forward`` gives both heads' logits, in evaluation their mean.
    """

    cls_token: nn.Parameter
    pos_embed: nn.Parameter

    def __init__(self, **options: Any) -> None:
        super().__init__(patch_size=16, embed_layer=ConvStem, **options)
        self.dist_token = None  # type: ignore[assignment]  # the mean takes the place of the learned token

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:  # (N, P, C) -> (N, 2 + P, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.mean(dim=1, keepdim=True), x], dim=1)
        return self.pos_drop(x + self.pos_embed)


def paper_student(config: Any, shape: Shape) -> DistilledViT:
    if shape.size % 16:
        raise OptionError(f"data.size: {config.name} takes patches of 16 pixels, got {shape.size}")
    return DistilledViT(
        img_size=shape.size,
        in_chans=shape.channels,
        num_classes=shape.classes,
        drop_path_rate=config.drop_path,
        **STUDENTS[config.name],
    )


# ---- the digits task's models ----------------------------------------------------------------------------------------


class SmallCNN(nn.Module):
    """The bundled teacher: convolution, batch norm, ReLU, halved after those of `pools`; mean; linear."""

    def __init__(self, widths: tuple[int, ...], shape: Shape, pools: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (before, width) in enumerate(zip((shape.channels, *widths[:-1]), widths, strict=True)):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if index + 1 in pools:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], shape.classes)
        self.num_features, self.num_classes = widths[-1], shape.classes

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:  # (N, channels, H, W) -> (N, C, H / 2, W / 2)
        return self.body(images)

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features.mean(dim=(2, 3)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


def small_vit(config: Any, shape: Shape) -> Model:
    """The digits' student: class and register token, a few blocks; the head sits on the mean of the patch tokens."""
    if config.width % config.heads:
        raise OptionError(f"student.heads: {config.heads} does not divide student.width {config.width}")
    if shape.size % config.patch:
        raise OptionError(f"student.patch: {config.patch} does not divide the images' size {shape.size}")
    model: Model = VisionTransformer(
        img_size=shape.size,
        patch_size=config.patch,
        in_chans=shape.channels,
        num_classes=shape.classes,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        reg_tokens=1,
        drop_path_rate=config.drop_path,
        global_pool="avg",
        fc_norm=False,
        weight_init="reset",
    )
    # PyTorch's initial weights, and positions of 0.5: in a few hundred steps timm's 0.02 for both doesn't grow enough.
    nn.init.normal_(model.pos_embed, std=0.5)
    return model


# ---- by name ---------------------------------------------------------------------------------------------------------


def make_student(config: Any, shape: Shape, *, empty: bool = False) -> Model:
    """`student.name`: one of the paper's, the digits' transformer, or any model of timm; with `student.weights`.

    `empty`: without memory, on PyTorch's meta device, to look at sizes and shapes.
    """
    with torch.device("meta") if empty else contextlib.nullcontext():
        if config.name == SMALL_VIT:
            model: Model = small_vit(config, shape)
        elif config.name in STUDENTS:
            model = paper_student(config, shape)
        else:
            model = timm_model("student", config.name, shape, drop_path_rate=config.drop_path or None)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # both heads' logits in training mode
    if config.weights and not empty:
        load_all(model, config.weights, "student.weights")
    return model


def make_teacher(config: Any, shape: Shape, weights: str = "", *, empty: bool = False) -> Model:
    """`teacher.name`: the digits' CNN or any model of timm, with these weights."""
    shape = shape._replace(classes=config.classes or shape.classes)
    with torch.device("meta") if empty else contextlib.nullcontext():
        if config.name == SMALL_CNN:
            model: Model = SmallCNN(config.widths, shape, config.pools)
        else:
            model = timm_model(
                "teacher", config.name, shape, pretrained=config.pretrained and not weights and not empty
            )
    if weights:
        load_all(model, weights, "teacher.weights")
    return model


def teacher_width(config: Any, shape: Shape) -> int:
    """Channels of the teacher's features."""
    return make_teacher(config, shape, empty=True).num_features


def timm_model(side: str, name: str, shape: Shape, **options: Any) -> Model:
    if not timm.is_model(name.split(".")[0]):
        bundled = [*STUDENTS, SMALL_VIT] if side == "student" else [SMALL_CNN]
        near = difflib.get_close_matches(name, [*bundled, *timm.list_models()], n=4, cutoff=0.3)
        raise OptionError(f"{side}.name: unknown {name!r}; nearest: {', '.join(near)} (timm.list_models() has all)")
    known = timm.models.get_pretrained_cfg(name)
    if known is not None and known.fixed_input_size:
        options["img_size"] = shape.size
    # Otherwise timm would begin with a head that knows nothing.
    if options.get("pretrained") and known is not None and known.num_classes != shape.classes:
        raise OptionError(
            f"{side}.pretrained: {name} has {known.num_classes} classes, not {shape.classes}; {side}.classes="
            f"{known.num_classes} distill.logit_weight=0 distils its features alone"
        )
    try:
        return timm.create_model(name, num_classes=shape.classes, in_chans=shape.channels, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise OptionError(f"{side}.name: timm cannot make {name!r} for {shape}: {error}") from error


def load_all(model: Model, path: str, option: str) -> None:
    """All tensors of a file into `model`, or an error that names the first that differ."""
    load_state(model, load_weights(Path(path), option), f"{option}: {path}")


# ---- features and logits ---------------------------------------------------------------------------------------------


class Output(NamedTuple):
    tokens: torch.Tensor  # (N, P, C): patches or positions of the map, after the final norm
    logits: torch.Tensor  # (N, classes), of the class token's head where there are two
    distilled: torch.Tensor  # (N, classes), of the distillation token's head; the same logits where there is one head


def run(model: Model, images: torch.Tensor) -> Output:
    """Features and logits of one forward pass of any model with timm's `forward_features` and `forward_head`."""
    features = model.forward_features(images)
    heads = model.forward_head(features)
    logits, distilled = heads if isinstance(heads, tuple) else (heads, heads)
    return Output(positions(model, features), logits, distilled)


def positions(model: Model, features: torch.Tensor) -> torch.Tensor:
    """What `forward_features` gives as (N, P, C): without class, distillation and register tokens, channels last."""
    if features.dim() == 4:  # a map; some of timm's transformers have channels last
        return (features if getattr(model, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)).flatten(
            1, 2
        )
    return features[:, getattr(model, "num_prefix_tokens", 0) :] if features.dim() == 3 else features.unsqueeze(1)
