"""The frozen teacher: an image encoder, its weights, and its features as they are distilled, whitened where asked for.

The covariance of a batch with fewer images than channels is singular, so that whitening by a batch's own statistics
would amplify rounding. Here they are computed once, over all training images (`distill.statistics`), and then fixed.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vkd_kernels as vk

from .. import runs
from ..config import OptionError
from ..runs import RunError
from .data import Images, as_float
from .models import Classifier, Shape

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_REPOSITORY = "openai/clip-vit-base-patch32"
WHITENING_EPS = 0.05  # tuned for the digits; the paper's value is not published
AT_ONCE = 250  # images, when statistics are computed


class Encoder(nn.Module):
    """Images from -1 to 1 to features: three channels, enlarged (nearest), normalised, and through a network."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, width: Any, size: Any, mean: Any, std: Any) -> None:
        super().__init__()
        self.network, self.num_features, self.size = network, width, size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:  # (N, 1 or 3, H, W) -> (N, T)
        images = F.interpolate(images.expand(-1, 3, -1, -1), (self.size, self.size), mode="nearest")
        found = self.network(((images + 1) / 2 - self.mean) / self.std)
        return found if isinstance(found, Tensor) else found.image_embeds


class Target:
    """images (N, C, H, W) -> what the discriminator's features are compared with (N, T): a constant."""

    def __init__(self, encoder: Any, whitening: vk.Whitening | None = None) -> None:
        self.encoder = encoder
        self.map: tuple[Tensor, Tensor] | None = None
        if whitening is not None:  # (y - mean) A = y A + shift
            whitening.eval()
            eye = torch.eye(whitening.num_features, dtype=torch.float64, device=whitening.running_mean.device)
            shift = whitening(torch.zeros_like(eye[:1]))
            self.map = shift.float(), (whitening(eye) - shift).float()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        features = self.encoder.features(images).float()
        if self.map is None:
            return features
        with torch.autocast(features.device.type, enabled=False):
            return torch.addmm(self.map[0], features, self.map[1])


@torch.no_grad()
def measure(encoder: Any, images: Images, statistics: str, fabric: Any) -> dict[str, Tensor]:
    """Mean and covariance of the encoder's features over the training images, as a `Whitening` holds them."""
    rows = images.seen if statistics == "gan" else torch.arange(len(images.pool))
    parts = []
    for part in rows.split(AT_ONCE):
        with fabric.autocast():
            parts.append(encoder.features(fabric.to_device(as_float(images.pool[part]))).float().cpu())
    whitening = vk.Whitening(encoder.num_features, momentum=1.0)
    whitening(torch.cat(parts))  # the first update takes the statistics over as they are
    return whitening.state_dict()


def make_target(config: Any, encoder: Any, folder: Path, fabric: Any) -> Target:
    """The teacher as this arm's `distill` section asks for it."""
    if config.distill.normalization != "whiten":
        return Target(encoder)
    d = config.distill
    whitening = vk.Whitening(encoder.num_features, method=d.method, eps=d.eps or WHITENING_EPS, momentum=1.0)
    runs.load_state(whitening, runs.load_safetensors(folder / "statistics.safetensors"), "statistics.safetensors")
    return Target(encoder, fabric.to_device(whitening))


# ---- by name ---------------------------------------------------------------------------------------------------------


def make_encoder(config: Any, shape: Shape, weights: str = "", *, empty: bool = False) -> nn.Module:
    """`teacher.name`, frozen, with these weights; `empty`: with none, to look at its size."""
    if config.name == "classifier":
        encoder: nn.Module = Classifier(config.widths, shape)
        if not empty:
            runs.load_state(encoder, runs.load_safetensors(Path(weights)), weights)
    elif config.name == "clip":
        encoder = clip(config, empty)
    else:
        encoder = timm_encoder(config, shape, empty)
    return encoder.requires_grad_(False).eval()


def needs_weights(config: Any, what: str) -> None:
    if not config.weights and not config.pretrained:
        raise OptionError(
            f"teacher.weights: give {what} with the weights of {config.name}, or teacher.pretrained=true to have them "
            "fetched"
        )


def clip(config: Any, empty: bool) -> Encoder:
    """CLIP's vision tower of transformers with its projection: the embedding that CLIP compares with text."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if empty or config.weights == "random":
        with torch.device("meta" if empty else "cpu"):
            network = CLIPVisionModelWithProjection(CLIPVisionConfig())  # ViT-B/32, 512 channels
    else:
        needs_weights(config, "a folder that save_pretrained wrote")
        try:
            network = CLIPVisionModelWithProjection.from_pretrained(
                config.weights or CLIP_REPOSITORY, local_files_only=bool(config.weights)
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(
                f"teacher.weights: cannot read CLIP from {config.weights or CLIP_REPOSITORY} ({error})"
            ) from error
    size = config.size or network.config.image_size
    return Encoder(network, network.config.projection_dim, size, CLIP_MEAN, CLIP_STD)


def timm_encoder(config: Any, shape: Shape, empty: bool) -> Encoder:
    import timm

    if not timm.is_model(config.name.split(".")[0]):
        near = difflib.get_close_matches(config.name, ["classifier", "clip", *timm.list_models()], n=4, cutoff=0.3)
        raise OptionError(f"teacher.name: unknown {config.name!r}; nearest: {', '.join(near)}")
    options: dict[str, Any] = {} if config.features == "head" else {"num_classes": 0}
    if not empty and config.weights != "random":
        needs_weights(config, "a .safetensors or .pth file")
        options["pretrained"] = not config.weights
    with torch.device("meta" if empty else "cpu"):
        network = timm.create_model(config.name, **options)
    if config.weights not in ("", "random") and not empty:
        load_weights(network, config.weights)
    about = timm.data.resolve_model_data_config(network)
    width = network.num_classes if config.features == "head" else network.head_hidden_size
    return Encoder(network, width, config.size or about["input_size"][-1], about["mean"], about["std"])


def load_weights(network: nn.Module, path: str) -> None:
    """All of the network's tensors from a file, which may hold more (a head that is not used), or an error."""
    import timm

    if not Path(path).is_file():
        raise OptionError(f"teacher.weights: there is no file {path}")
    try:
        found = timm.models.load_state_dict(path, weights_only=True)
    except Exception as error:  # every kind of damage has its own type
        raise RunError(f"teacher.weights: cannot read tensors from {path} ({type(error).__name__}: {error})") from error
    wanted = network.state_dict()
    wrong = [name for name, tensor in wanted.items() if name not in found or found[name].shape != tensor.shape]
    if wrong:
        raise RunError(
            f"teacher.weights: {path} is of another architecture: {len(wrong)} of {len(wanted)} tensors are missing "
            f"or of another shape, such as {', '.join(wrong[:3])}"
        )
    network.load_state_dict({name: found[name] for name in wanted})
