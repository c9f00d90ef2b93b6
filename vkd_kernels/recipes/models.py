"""The networks of the classification task: the paper's students, the two bundled ones, any of timm's by name.

All have timm's `forward_features`, which gives tokens or a map, and `forward_head`; `run` reads both from any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import ConvNormAct, PatchEmbed
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from .config import OptionError, nearest
from .runs import RunError, load_state, load_weights

STEM_WIDTH = 64
STUDENTS = {
    "vkd_deit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vkd_deit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
}
Model = Any  # an nn.Module with timm's forward_features, forward_head and num_features


class Shape(NamedTuple):
    """What a data set asks of a model."""

    classes: int
    size: int  # side of the images
    channels: int

    @classmethod
    def of(cls, data: Any) -> Shape:
        return cls(data.classes, data.size, data.channels)


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

    def _pos_embed(self, x: Tensor) -> Tensor:  # (N, P, C) -> (N, 2 + P, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.mean(dim=1, keepdim=True), x], dim=1)
        return self.pos_drop(x + self.pos_embed)


# ---- the bundled models ----------------------------------------------------------------------------------------------


class SmallCNN(nn.Module):
    """A bundled teacher: convolution, batch norm, ReLU, halved after those of `pools`; mean; linear."""

    def __init__(self, widths: tuple[int, ...], shape: Shape, pools: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, width) in enumerate(zip((shape.channels, *widths[:-1]), widths, strict=True), start=1):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number in pools else []
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], shape.classes)
        self.num_features = widths[-1]

    def forward_features(self, images: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, C, H', W')
        return self.body(images)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features.mean(dim=(2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def small_vit(config: Any, shape: Shape) -> Model:
    """The bundled student: class and register tokens, a few blocks, a head on the mean of the patch tokens."""
    if config.width % config.heads:
        raise OptionError(f"student.heads: {config.heads} does not divide student.width {config.width}")
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
    """`student.name`, with `student.weights`; `empty`: on PyTorch's meta device, to look at sizes and shapes."""
    common = {"num_classes": shape.classes, "in_chans": shape.channels}
    with torch.device("meta" if empty else "cpu"):
        if config.name == "small_vit":
            model: Model = small_vit(config, shape)
        elif config.name in STUDENTS:
            sizes: Any = STUDENTS[config.name]
            model = DistilledViT(img_size=shape.size, drop_path_rate=config.drop_path, **common, **sizes)
        else:
            model = timm_model("student", config.name, shape, drop_path_rate=config.drop_path or None, **common)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # both heads' logits in training mode
    if config.weights:
        put_weights(model, load_weights(Path(config.weights), "student.weights"), f"student.weights: {config.weights}")
    return model


def make_teacher(config: Any, shape: Shape, weights: str = "", *, logits: bool = True, empty: bool = False) -> Model:
    """`teacher.name` with these weights. Without `logits`, a model of timm has no head, and may know other classes."""
    wanted = config.pretrained and not weights
    if wanted and logits:
        check_classes(config.name, shape)
    with torch.device("meta" if empty else "cpu"):
        if config.name == "small_cnn":
            model: Model = SmallCNN(config.widths, shape, config.pools)
        else:
            classes = shape.classes if logits else 0
            common = {"num_classes": classes, "in_chans": shape.channels, "pretrained": wanted and not empty}
            model = timm_model("teacher", config.name, shape, **common)
    if weights:
        state, wanted = load_weights(Path(weights), "teacher.weights"), model.state_dict()
        state = state if logits else {name: tensor for name, tensor in state.items() if name in wanted}
        hint = "; if only the head differs, distill.logit_weight=0 leaves it out" if logits else ""
        put_weights(model, state, f"teacher.weights: {weights}", hint)
    return model


def put_weights(model: Model, state: dict[str, Tensor], what: str, hint: str = "") -> None:
    """Load the weights, or of an empty model only check that they fit."""
    empty = next(model.parameters()).is_meta
    if empty:
        state = {name: tensor.to("meta") for name, tensor in state.items()}
    load_state(model, state, what, hint=hint, assign=empty)


def timm_model(side: str, name: str, shape: Shape, **options: Any) -> Model:
    known = timm.models.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    if known is not None and known.fixed_input_size:
        options["img_size"] = shape.size
    return created(side, name, f"for {shape}", **options)


def check_classes(teacher: str, shape: Shape) -> None:
    """An error where timm would begin with a head that knows nothing; teachers may be hf-hub: or local-dir: ones."""
    with torch.device("meta"):
        known = created("teacher", teacher, "to see its classes").pretrained_cfg["num_classes"]
    if known != shape.classes:
        raise OptionError(
            f"teacher.pretrained: {teacher} has {known} classes, not {shape.classes}; with "
            "distill.logit_weight=0 its features alone teach"
        )


@cache
def fetch(teacher: str) -> None:
    """Have timm download the weights now, before anything is trained; they are read from its cache later."""
    created("teacher", teacher, "with its weights", pretrained=True)


def created(side: str, name: str, what: str, **options: Any) -> Model:
    """One of timm's, or an error that names the option."""
    try:
        return timm.create_model(name, **options)
    except OSError as error:  # no network, or nothing stored of it
        raise RunError(
            f"{side}.pretrained: timm cannot fetch the weights of {name}: {error}; without a network, "
            f"give {side}.weights=FILE in its place"
        ) from error
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        near = nearest(name, [*STUDENTS, "small_vit", "small_cnn", *timm.list_models()])
        raise OptionError(f"{side}.name: cannot make {name!r} {what}: {error}{near}") from error


def check_network(side: str, name: str, shape: Shape, make: Callable[..., Model], *, features: bool) -> Output:
    """What a network makes of one image, or an error that names it, also where its `features` are no patches.
    `make(empty=...)` makes it: it runs on PyTorch's meta device, and for real where an operation is unknown there."""
    for empty in (True, False):
        model = make(empty=empty).eval()
        device = next(model.parameters()).device
        try:
            with torch.no_grad():
                output = run(model, torch.zeros(1, shape.channels, shape.size, shape.size, device=device))
            break
        except (RuntimeError, AttributeError, AssertionError, IndexError, TypeError, ValueError) as error:
            if not empty:
                said = " ".join(str(error).split())[:300]
                raise OptionError(f"{side}.name: {name} cannot take an image {tuple(shape[1:])}: {said}") from error
    of_class = any("cls_token" in parameter for parameter, _ in model.named_parameters())
    if features and of_class and not hasattr(model, "num_prefix_tokens"):
        raise OptionError(f"{side}.name: timm does not say which tokens of {name} are patches; choose another model")
    if features and (width := output.tokens.shape[-1]) != model.num_features:
        said = f"{width} channels, and not the {model.num_features} that timm says"
        raise OptionError(f"{side}.name: the features of {name} have {said}; choose another model")
    return output


# ---- features and logits ---------------------------------------------------------------------------------------------


class Output(NamedTuple):
    tokens: Tensor  # (N, P, C): patches or positions of the map, after the final norm
    logits: Tensor  # (N, classes), of the class token's head where there are two
    distilled: Tensor  # (N, classes), of the distillation token's head; the same logits where there is one head


def run(model: Model, images: Tensor) -> Output:
    """Features and logits of one forward pass of any model with timm's `forward_features` and `forward_head`."""
    features = model.forward_features(images)
    heads = model.forward_head(features)
    logits, distilled = heads if isinstance(heads, tuple) else (heads, heads)
    return Output(positions(model, features), logits, distilled)


def positions(model: Model, features: Tensor) -> Tensor:
    """What `forward_features` gives as (N, P, C): without class, distillation and register tokens, channels last."""
    if features.dim() == 4:  # a map; some of timm's transformers have channels last
        last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return (features if last else features.permute(0, 2, 3, 1)).flatten(1, 2)
    return features[:, getattr(model, "num_prefix_tokens", 0) :] if features.dim() == 3 else features.unsqueeze(1)
