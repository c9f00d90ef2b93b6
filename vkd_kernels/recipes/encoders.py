"""The frozen networks of the generation task: the teacher, and the one that measures."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import gan, runs
from .config import OptionError
from .gan import Shape, as_bytes, as_float
from .runs import RunError


class Encoder(nn.Module):
    """Images from -1 to 1 to features: three channels, enlarged (nearest), normalized, and through a network."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, width: int, size: int, mean: Any, std: Any) -> None:
        super().__init__()
        self.network, self.num_features, self.size = network, width, size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:  # (N, 1 or 3, H, W) -> (N, T)
        pictures = F.interpolate(pictures.expand(-1, 3, -1, -1), (self.size, self.size), mode="nearest")
        return self.network(((pictures + 1) / 2 - self.mean) / self.std)


def make_encoder(config: Any, shape: Shape, weights: str = "", *, empty: bool = False) -> Any:
    """`teacher.name`, frozen: the classifier with weights of a file, or one of timm; `empty`: to see its size."""
    if config.name == "classifier":
        classifier = gan.Classifier(config.widths, shape)
        if not empty:
            runs.load_state(classifier, runs.load_weights(Path(weights)), weights)
        return Features(classifier.requires_grad_(False).eval())
    import timm

    if not timm.is_model(config.name.split(".")[0]):
        near = difflib.get_close_matches(config.name, ["classifier", *timm.list_models()], n=4, cutoff=0.3)
        raise OptionError(f"teacher.name: unknown {config.name!r}; nearest: {', '.join(near)}")
    options: dict[str, Any] = {} if config.features == "head" else {"num_classes": 0}
    if not empty and not config.weights and not config.pretrained:
        raise OptionError(
            f"teacher.weights: give a file with the weights of {config.name}, or teacher.pretrained=true to have timm "
            "fetch them"
        )
    with torch.device("meta" if empty else "cpu"):
        network = timm.create_model(config.name, pretrained=config.pretrained and not empty, **options)
    if config.weights not in ("", "random") and not empty:
        state = runs.load_weights(Path(config.weights), "teacher.weights")
        wanted = network.state_dict()  # the file may hold more: a head that is not used
        runs.load_state(network, {k: v for k, v in state.items() if k in wanted}, f"teacher.weights: {config.weights}")
    about = timm.data.resolve_model_data_config(network)
    width: Any = network.num_classes if config.features == "head" else network.head_hidden_size
    with torch.device("meta" if empty else "cpu"):
        encoder = Encoder(network, width, config.size or about["input_size"][-1], about["mean"], about["std"])
    return encoder.requires_grad_(False).eval()


class Features(nn.Module):
    """A classifier's features, or those of Inception, computed in float32 also under autocast, of uint8 or from -1 to
    1; as float64, in which distances are summed."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.num_features = network, getattr(network, "num_features", 2048)

    def forward(self, pictures: Tensor) -> Tensor:
        with torch.autocast(pictures.device.type, enabled=False):
            if isinstance(self.network, gan.Classifier):
                return self.network.features(as_float(pictures).float()).double()
            return self.network(as_bytes(pictures))[0].double()


def inception(weights: str) -> nn.Module:
    """The 2048 features that the FID is defined in, with weights from a file, or fetched."""
    if weights and not Path(weights).is_file():
        raise OptionError(f"metric.weights: there is no file {weights}")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        if weights:
            torch.load(weights, weights_only=True)  # nothing but tensors: torch-fidelity itself would run what it holds
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights or None)
    except Exception as error:  # no network, or a damaged file: as many types as ways to fail
        where, reason = weights or "the network", " ".join(str(error).split())[:300]
        raise RunError(f"metric.weights: cannot read Inception's weights from {where} ({reason})") from error
