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
from .gan import as_float
from .loading import Key, Views, read
from .models import Shape, SmallCNN, created
from .runs import RunError
from .task import Optim, Run, generator, parameter_groups, seed_all

SPLIT, CLASSIFIER, AT_ONCE = 0, 1, 250  # the first two: what a draw is for, beside the seed and the step


Learned = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Shape]  # images and labels to learn, others to test


class Pictures:
    """All images in memory, as uint8. `pool`: the training images, of which the GAN sees `data.fraction` of every class
    (`seen`, their rows). Generated images are compared with the `held_out` ones."""

    def __init__(self, data: Any, seed: int) -> None:
        train, test, classes = images.open_images(data, seed)
        self.parts = [in_memory(part, data) for part in (train, test)]
        (self.pool, self.labels), (self.held_out, _) = self.parts
        self.shape = Shape(classes, data.size, data.channels)
        draw = generator(seed, SPLIT)
        self.seen = images.share_of_classes(self.labels, classes, data.fraction, draw)


def in_memory(dataset: Any, data: Any) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) uint8 and labels (N,), cropped to squares in the middle and resized."""
    to_size = v2.Compose([v2.Resize(data.size), v2.CenterCrop(data.size), v2.PILToTensor()])
    views = Views(dataset, partial(images.transformed, to_size, "RGB" if data.channels == 3 else "L"))
    parts = [*read(views, map(Key, range(len(dataset))), images.collate, run=Run(accelerator="cpu"), at_once=AT_ONCE)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


# ---- the frozen teacher ----------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Images from -1 to 1 to features: as many channels as its network takes, enlarged (nearest), normalized."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, width: int, about: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.num_features, (self.channels, *self.size) = network, width, about["input_size"]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(about[name]).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, pictures: Tensor) -> Tensor:  # (N, C, H, W) -> (N, T)
        pictures = F.interpolate(pictures.expand(-1, self.channels, -1, -1), self.size, mode="nearest")
        return self.network(((pictures + 1) / 2 - self.mean) / self.std)


def classifier_features(config: Any, shape: Shape, weights: Path | None) -> Encoder:
    """The mean of a classifier's last maps; `weights`: a file with those of the classifier."""
    classifier = SmallCNN(config.widths, shape, pools=(1,))
    if weights is not None:
        runs.load_state(classifier, runs.load_weights(weights), str(weights))
    network = nn.Sequential(classifier.body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    about = {"input_size": (shape.channels, shape.size, shape.size), "mean": [0.5], "std": [0.5]}
    return Encoder(network, classifier.num_features, about)


def make_encoder(config: Any, shape: Shape, weights: Path, *, empty: bool = False) -> Encoder:
    """`teacher.name`, frozen: the classifier with weights of a file, or one of timm; `empty`: to see its size."""
    with torch.device("meta" if empty else "cpu"):
        if config.name == "classifier":
            return classifier_features(config, shape, None if empty else weights)
        options: dict[str, Any] = {} if config.features == "head" else {"num_classes": 0}
        pretrained = config.pretrained and not (config.weights or empty)
        network = created("teacher", config.name, "as encoder", pretrained=pretrained, **options)
        if config.weights and not empty:
            state, wanted = runs.load_weights(Path(config.weights), "teacher.weights"), network.state_dict()
            state = {name: tensor for name, tensor in state.items() if name in wanted}  # there may be another head
            runs.load_state(network, state, f"teacher.weights: {config.weights}")
        width = network.num_classes if config.features == "head" else network.head_hidden_size
        return Encoder(network, width, timm.data.resolve_model_data_config(network))


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
    if not all(parameter.isfinite().all() for parameter in classifier.parameters()):
        raise RunError(f"the weights of the classifier of seed {seed} are not finite; lower teacher.lr")
    with torch.no_grad():
        said = torch.cat([classifier(as_float(part).to(device)).argmax(1).cpu() for part in others.split(AT_ONCE)])
    return classifier, 100 * (said == truth).double().mean().item()
