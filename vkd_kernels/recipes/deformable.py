"""Deformable DETR of transformers: object queries and four levels of maps, on a Swin backbone or one of timm.

Of the detectors that well-kept libraries hold it is the nearest to the paper's ViDT, whose neck is Deformable DETR's
decoder with box refinement, on Swin. What ViDT has and this has not: detection tokens inside the backbone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torchvision.ops import box_convert

from .config import OptionError
from .detectors import LOGIT, Detections, Detector, Prediction, image_sizes
from .runs import RunError, load_weights

Net: Any = transformers.DeformableDetrForObjectDetection
Config: Any = transformers.DeformableDetrConfig  # Any: these take options of their base classes, which mypy can't see
Swin: Any = transformers.SwinConfig
Timm: Any = transformers.TimmBackboneConfig
STRIDES = (8, 16, 32, 64)
SWIN = {  # channels after the first stage, blocks and heads of the four stages
    "swin-nano": (48, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin-tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin-small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin-base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}
STAGES = ["stage2", "stage3", "stage4"]
KEPT = 100  # detections of an image


class Deformable(Detector):
    """Features: map0 ... map3, the levels after the input projection; queries, as they leave the first layer of the
    decoder, which is the first that has seen the image; decoder, as they leave each of its layers."""

    def __init__(self, net: Any) -> None:
        config: Any = net.config
        names = [*(f"map{level}" for level in range(config.num_feature_levels)), "queries", "decoder"]
        super().__init__(config.num_labels, dict.fromkeys(names, config.d_model))
        self.net: Any = net

    def predict(
        self, images: Tensor, inside: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None
    ) -> Prediction:
        sizes = image_sizes(inside)  # (N, 2)
        sides = sizes.repeat(1, 2)[:, None]  # (N, 1, 4)
        if boxes is None or labels is None:
            targets, objects = None, None
        else:
            objects = (labels >= 0).sum()
            shares = box_convert(boxes / sides, "xyxy", "cxcywh")
            targets = [
                {"class_labels": ours[ours >= 0], "boxes": share[ours >= 0]}
                for ours, share in zip(labels, shares, strict=True)
            ]
        with captured(self.net.model.input_proj) as maps:
            outputs = self.net(pixel_values=images, pixel_mask=inside.long(), labels=targets)
        states = outputs.intermediate_hidden_states  # (N, layers, queries, dim)
        features = {f"map{level}": x.permute(0, 2, 3, 1) for level, x in enumerate(maps)}
        features |= {"queries": states[:, 0], "decoder": states}
        predicted = box_convert(outputs.pred_boxes, "cxcywh", "xyxy") * sides
        losses = {} if objects is None else self.losses(outputs.loss_dict, objects)
        return Prediction(outputs.logits, predicted, features, losses, objects)

    def losses(self, parts: dict[str, Tensor], objects: Tensor) -> dict[str, Tensor]:
        """The library's losses of all decoder layers, with its weights; it has divided them by the number of boxes."""
        c, sums = self.net.config, {}
        weights = {"loss_ce": 1, "loss_bbox": c.bbox_loss_coefficient, "loss_giou": c.giou_loss_coefficient}
        for kind, weight in weights.items():
            sums[kind] = weight * objects.clamp(min=1) * torch.stack([v for k, v in parts.items() if kind in k]).sum()
        return {"classes": sums["loss_ce"], "boxes": sums["loss_bbox"] + sums["loss_giou"]}

    def detections(self, prediction: Prediction, inside: Tensor) -> list[Detections]:
        scores, order = prediction.logits.float().sigmoid().flatten(1).topk(min(KEPT, prediction.logits[0].numel()))
        detections = []
        for score, index, boxes, size in zip(scores, order, prediction.boxes, image_sizes(inside), strict=True):
            kept = boxes[index // self.classes].float().clamp(min=0).minimum(size.repeat(2))
            detections.append(Detections(kept, score, index % self.classes))
        return detections


@contextlib.contextmanager
def captured(modules: Any) -> Iterator[list[Tensor]]:
    """What modules return while it lasts."""
    seen: list[Tensor] = []
    handles = [module.register_forward_hook(lambda _, __, output: seen.append(output)) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# ---- building --------------------------------------------------------------------------------------------------------


def make_deformable(config: Any, classes: int, *, empty: bool = False) -> Deformable:
    if config.name == "deformable-detr":
        return Deformable(new_net(config, classes, empty=empty))
    try:
        about: Any = transformers.AutoConfig.from_pretrained(config.name)
    except (OSError, ValueError) as error:
        raise RunError(f"{config.name}: no Deformable DETR of transformers: {' '.join(str(error).split())}") from error
    if about.model_type != "deformable_detr" or about.two_stage:
        raise RunError(f"{config.name}: must be a deformable_detr with learned queries; it is a {about.model_type}")
    if about.num_labels != classes:
        raise RunError(f"{config.name}: has {about.num_labels} classes, and {classes} are needed")
    if empty:
        return Deformable(Net(about))
    net = Net.from_pretrained(config.name, auxiliary_loss=True, dtype=torch.float32)
    return Deformable(net)


def new_net(config: Any, classes: int, *, empty: bool = False) -> Any:
    described = Config(
        backbone_config=backbone_config(config),
        num_labels=classes,
        num_queries=config.queries,
        d_model=config.dim,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        dropout=config.dropout,
        encoder_attention_heads=config.heads,
        decoder_attention_heads=config.heads,
        with_box_refine=True,
        auxiliary_loss=True,
    )
    if empty:
        with torch.device("meta"):
            return Net(described)
    net: Any = Net(described)
    with torch.no_grad():  # as Deformable DETR begins, which the library, made for trained weights, leaves out
        for index, (head, sides) in enumerate(zip(net.class_embed, net.bbox_embed, strict=True)):
            head.bias.fill_(LOGIT)
            sides.layers[-1].weight.zero_()
            sides.layers[-1].bias.copy_(torch.tensor([0.0, 0.0, *((-2.0, -2.0) if index == 0 else (0.0, 0.0))]))
    backbone = net.model.backbone.model
    if config.backbone in SWIN:
        backbone.swin.layernorm.requires_grad_(False)  # of no use in a backbone, and without a gradient
    if config.backbone_weights not in ("", "timm"):
        load_backbone(backbone, config)
    return net


def backbone_config(config: Any) -> Any:
    if config.backbone in SWIN:
        width, depths, heads = SWIN[config.backbone]
        return Swin(embed_dim=width, depths=depths, num_heads=heads, window_size=7, out_features=STAGES)
    import timm

    try:
        with torch.device("meta"):
            features: Any = timm.create_model(config.backbone, features_only=True)
    except (RuntimeError, ValueError, AttributeError) as error:
        names = ", ".join(SWIN)
        raise OptionError(f"backbone: {config.backbone!r} is not {names}, or a backbone of timm ({error})") from error
    strides = features.feature_info.reduction()
    if getattr(features, "output_fmt", "NCHW") != "NCHW" or not {*STRIDES[:3]} <= {*strides}:
        raise OptionError(f"backbone: {config.backbone} must give maps (N, C, H, W) at strides {STRIDES[:3]}")
    return Timm(
        backbone=config.backbone,
        features_only=True,
        out_indices=[strides.index(s) for s in STRIDES[:3]],
        use_pretrained_backbone=config.backbone_weights == "timm",
    )


def load_backbone(backbone: nn.Module, config: Any) -> None:
    """Its pretrained weights: a file with a state dict or, of Swin, a folder or hub name of transformers."""
    name = config.backbone_weights
    if Path(name).is_file():
        state = load_weights(Path(name), "backbone_weights")
    elif config.backbone in SWIN:
        try:
            state = transformers.SwinBackbone.from_pretrained(name, out_features=STAGES).state_dict()
        except (OSError, RuntimeError) as error:
            raise RunError(f"backbone_weights: {name}: {' '.join(str(error).split())[:600]}") from error
    else:
        raise RunError(f"backbone_weights: there is no file {name}")
    try:
        missing = backbone.load_state_dict(state, strict=False).missing_keys  # a classifier's head may be left over
    except RuntimeError as error:
        raise RunError(f"backbone_weights: {name}: {' '.join(str(error).split())[:600]}") from error
    kept = [key for key in missing if "hidden_states_norms" not in key]  # a detector's own
    if kept:
        raise RunError(f"backbone_weights: {name}: is not of {config.backbone}; it lacks {', '.join(kept[:5])}")
