"""What the generation task learns from: images, all in memory, the frozen teacher, and a classifier of the images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from . import images, runs
from .config import OptionError
from .digits import POOL, read_digits
from .gan import as_float
from .loading import Key, Views, read
from .models import Shape, SmallCNN
from .task import Optim, generator, parameter_groups, seed_all

SPLIT, CLASSIFIER, AT_ONCE = 0, 1, 250  # the first two: what a draw is for, beside the seed and the step


Learned = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Shape]  # images and labels to learn, others to test


class Pictures:
    """All images in memory: the pool is for training, of which the GAN sees `data.fraction` of every class (`seen`,
    rows of the pool); generated images are compared with the held-out ones. uint8, or float from -1 to 1."""

    def __init__(self, data: Any, seed: int) -> None:
        if data.name == "digits":
            pictures, labels = read_digits()
            order = torch.randperm(len(labels), generator=generator(seed, SPLIT))
            parts = [(pictures[rows] * 2 - 1, labels[rows]) for rows in (order[:POOL], order[POOL:])]
            classes = 10
        else:
            train, test, classes = images.open_images(data)
            parts = [in_memory(part, data) for part in (train, test)]
        (self.pool, self.labels), (self.held_out, _) = parts
        self.shape, self.parts = Shape(classes, self.pool.shape[-1], self.pool.shape[1]), parts
        draw = generator(seed, SPLIT, 1)
        self.seen = images.share_of_classes(self.labels, classes, data.fraction, draw)


def in_memory(dataset: Any, data: Any) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) uint8 and labels (N,), cropped to squares in the middle and resized."""
    to_size = v2.Compose([v2.Resize(data.size), v2.CenterCrop(data.size), v2.PILToTensor()])
    views = Views(dataset, partial(images.transformed, to_size, "RGB" if data.channels == 3 else "L"))
    parts = [*read(views, map(Key, range(len(dataset))), images.collate, workers=0, at_once=AT_ONCE)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


# ---- the frozen teacher ----------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Images from -1 to 1 to features: three channels, enlarged (nearest), normalized, then a network of timm."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, width: int, about: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.num_features, self.size = network, width, about["input_size"][1:]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(about[name]).view(-1, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:  # (N, 1 or 3, H, W) -> (N, T)
        pictures = F.interpolate(pictures.expand(-1, 3, -1, -1), self.size, mode="nearest")
        return self.network(((pictures + 1) / 2 - self.mean) / self.std)


class ClassifierFeatures(nn.Module):
    """A classifier's features of images, uint8 or from -1 to 1, in float32 also under autocast."""

    def __init__(self, classifier: SmallCNN) -> None:
        super().__init__()
        self.classifier, self.num_features = classifier, classifier.num_features

    def forward(self, pictures: Tensor) -> Tensor:  # (N, C, H, W) -> (N, F)
        with torch.autocast(pictures.device.type, enabled=False):
            return self.classifier.forward_features(as_float(pictures).float()).mean(dim=(2, 3)).double()


def make_classifier(config: Any, shape: Shape, weights: Path | None = None) -> SmallCNN:
    classifier = SmallCNN(config.widths, shape, pools=(1,))
    if weights is not None:
        runs.load_state(classifier, runs.load_weights(weights), str(weights))
    return classifier


def make_encoder(config: Any, shape: Shape, weights: Path, *, empty: bool = False) -> Any:
    """`teacher.name`, frozen: the classifier with weights of a file, or one of timm; `empty`: to see its size."""
    with torch.device("meta" if empty else "cpu"):
        if config.name == "classifier":
            encoder: Any = ClassifierFeatures(make_classifier(config, shape, None if empty else weights))
            return encoder.requires_grad_(False).eval()
        options: dict[str, Any] = {} if config.features == "head" else {"num_classes": 0}
        try:
            network: Any = timm.create_model(config.name, pretrained=config.pretrained and not empty, **options)
        except RuntimeError as error:
            raise OptionError(f"teacher.name: {error}") from error
        if config.weights and not empty:
            state, wanted = runs.load_weights(Path(config.weights), "teacher.weights"), network.state_dict()
            state = {name: tensor for name, tensor in state.items() if name in wanted}  # there may be another head
            runs.load_state(network, state, f"teacher.weights: {config.weights}")
        width = network.num_classes if config.features == "head" else network.head_hidden_size
        encoder = Encoder(network, width, timm.data.resolve_model_data_config(network))
        return encoder.requires_grad_(False).eval()


def train_classifier(config: Any, seed: int, data: Learned, device: Any) -> tuple[SmallCNN, float]:
    """The classifier of the section `teacher`, trained on images and labels; and its accuracy on others."""
    (pictures, labels), (others, truth), shape = data
    optim = Optim(lr=config.lr, warmup=0.1, steps=config.steps)
    seed_all(seed)
    classifier = SmallCNN(config.widths, shape, pools=(1,)).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(classifier, weight_decay=0.05), lr=config.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: optim.rate(step, config.steps))
    for step in range(config.steps):
        rows = torch.randint(len(labels), (config.batch_size,), generator=generator(seed, step, CLASSIFIER))
        logits = classifier(as_float(pictures[rows]).to(device))
        F.cross_entropy(logits, labels[rows].to(device), label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        said = torch.cat([classifier(as_float(part).to(device)).argmax(1).cpu() for part in others.split(AT_ONCE)])
    return classifier, 100 * (said == truth).double().mean().item()
