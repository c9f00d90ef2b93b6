"""Deformable DETR of transformers: object queries and four levels of maps, on a Swin backbone.

Of the detectors that well-kept libraries hold it is the nearest to the paper's ViDT, whose neck is Deformable DETR's
decoder with box refinement, on Swin. ViDT's detection tokens inside the backbone have no counterpart in it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from torchvision.ops import box_convert

from .config import OptionError
from .detectors import KEPT, Detector, Prediction, image_sizes
from .runs import RunError

Net: Any = transformers.DeformableDetrForObjectDetection
SwinBackbone: Any = transformers.SwinBackbone
SWIN = {  # channels after the first stage, blocks and heads of the four stages, ViDT's rate of stochastic depth
    "swin-nano": (48, (2, 2, 6, 2), (3, 6, 12, 24), 0.0),
    "swin-tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "swin-small": (96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
    "swin-base": (128, (2, 2, 18, 2), (4, 8, 16, 32), 0.3),
}
CLASS_WEIGHT = 2  # of the class loss, and of its cost in matching: ViDT's and Deformable DETR's; the library has 1
STAGES = ["stage2", "stage3", "stage4"]
LOGIT = math.log(0.01 / 0.99)  # of any class at the start: nearly everything is background


class Deformable(Detector):
    """Features: map0 ... map3, the levels after the input projection; queries, as they leave the first layer of the
    decoder, which is the first that has seen the image; decoder, as they leave each of its layers."""

    def __init__(self, net: Any) -> None:
        config: Any = net.config
        names = [*(f"map{level}" for level in range(config.num_feature_levels)), "queries", "decoder"]
        super().__init__(config.num_labels, dict.fromkeys(names, config.d_model))
        self.net: Any = net
        if swin := getattr(net.model.backbone.model, "swin", None):
            swin.layernorm.requires_grad_(False)  # of no use in a backbone, and without a gradient

    def predict(self, images: Tensor, inside: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Prediction:
        wanted = None
        if targets is not None:
            sizes = image_sizes(inside).flip(1).repeat(1, 2)  # (N, 4)
            wanted = [
                {"class_labels": t["labels"], "boxes": box_convert(t["boxes"] / size, "xyxy", "cxcywh")}
                for t, size in zip(targets, sizes, strict=True)
            ]
        with captured(self.net.model.input_proj) as maps:
            outputs = self.net(pixel_values=images, pixel_mask=inside.long(), labels=wanted)
        states = outputs.intermediate_hidden_states  # (N, layers, queries, dim)
        features = {f"map{level}": x.permute(0, 2, 3, 1) for level, x in enumerate(maps)}
        features |= {"queries": states[:, 0], "decoder": states}
        if targets is None:
            return Prediction(outputs, features)
        objects = torch.tensor(sum(len(t["labels"]) for t in targets), device=images.device)
        return Prediction(outputs, features, self.losses(outputs.loss_dict), objects)

    def losses(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The library's losses of all decoder layers; its weights of the boxes are ViDT's, too."""
        c = self.net.config
        weights = {"loss_ce": CLASS_WEIGHT, "loss_bbox": c.bbox_loss_coefficient, "loss_giou": c.giou_loss_coefficient}
        sums = {name: w * torch.stack([v for k, v in parts.items() if name in k]).sum() for name, w in weights.items()}
        return {"classes": sums["loss_ce"], "boxes": sums["loss_bbox"] + sums["loss_giou"]}

    def detections(self, prediction: Prediction, inside: Tensor) -> list[dict[str, Tensor]]:
        outputs = prediction.outputs
        exact = SimpleNamespace(logits=outputs.logits.float(), pred_boxes=outputs.pred_boxes.float())
        processor: Any = transformers.DeformableDetrImageProcessor()
        sizes = image_sizes(inside)
        return processor.post_process_object_detection(exact, threshold=0.0, target_sizes=sizes, top_k=KEPT)


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
    """A new one on a Swin, or a trained one by folder or hub name, whose heads are new where its classes differ."""
    try:
        if config.name != "deformable-detr":
            options: Any = {"num_labels": classes, "auxiliary_loss": True, "class_cost": CLASS_WEIGHT}
            about: Any = transformers.AutoConfig.from_pretrained(config.name, **options)
            if about.model_type != "deformable_detr":  # the library would begin with new weights
                raise ValueError(f"it is a {about.model_type}")
            options = {"config": about, "ignore_mismatched_sizes": True, "dtype": torch.float32}
            return Deformable(Net(about) if empty else Net.from_pretrained(config.name, **options))
        with torch.device("meta" if empty else "cpu"):
            net = new_net(config, classes)
        if config.backbone_weights and empty:
            transformers.AutoConfig.from_pretrained(config.backbone_weights)  # is it there?
        elif config.backbone_weights:
            backbone = SwinBackbone.from_pretrained(config.backbone_weights, out_features=STAGES)
            net.model.backbone.model.load_state_dict(backbone.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:600]
        where = f"{config.side}.name, {config.side}.backbone_weights"
        raise RunError(f"{where}: cannot make {config.name} {config.backbone_weights}: {said}") from error
    return Deformable(net)


def new_net(config: Any, classes: int) -> Any:
    """The paper's 100 queries and box refinement; six layers each, 256 channels and 8 heads are the library's own."""
    if config.backbone not in SWIN:
        raise OptionError(f"{config.side}.backbone: unknown {config.backbone!r}; there are {', '.join(SWIN)}")
    width, depths, heads, drop = SWIN[config.backbone]
    of_swin: Any = {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": 7, "out_features": STAGES}
    of_swin["drop_path_rate"] = drop
    options: Any = {"num_queries": 100, "with_box_refine": True, "auxiliary_loss": True, "num_labels": classes}
    options["class_cost"] = CLASS_WEIGHT
    net = Net(transformers.DeformableDetrConfig(backbone_config=transformers.SwinConfig(**of_swin), **options))
    with torch.no_grad():  # as Deformable DETR begins, which the library, made for trained weights, leaves out
        for index, (head, sides) in enumerate(zip(net.class_embed, net.bbox_embed, strict=True)):
            head.bias.fill_(LOGIT)
            sides.layers[-1].weight.zero_()
            sides.layers[-1].bias.zero_()[2:].fill_(0.0 if index else -2.0)
    return net
