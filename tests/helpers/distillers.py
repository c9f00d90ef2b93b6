"""Small models as timm, torchvision and Hugging Face have them, and distillers of them."""

import collections
import warnings

import torch
from torch import nn

import vkd_kernels as vk


class ViT(nn.Module):
    """Tokens as timm's models have them: prefix tokens first, "norm" last, the head on the first token."""

    def __init__(self, width=6, prefix=1, classes=3):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        self.cls_token = nn.Parameter(torch.randn(1, prefix, width))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def no_weight_decay(self):
        return {"cls_token"}

    def forward(self, images):  # (N, 3, 8, 8)
        tokens = self.embed(images).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], 1)  # (N, prefix + 16, width)
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class CNN(nn.Module):
    """Maps as torchvision's models have them, with batch norm's state and a change in place."""

    def __init__(self, width=10, classes=3, stride=2):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=stride, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, classes)

    def forward(self, images):
        return self.fc(self.relu(self.bn(self.conv(images))).mean((2, 3)))  # the map: (N, width, 4, 4)


class ModelOutput(collections.OrderedDict):
    """What Hugging Face's models return: entries by name, by attribute and by position."""

    __getattr__ = collections.OrderedDict.__getitem__


class Encoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.layer = nn.GRU(width, width, batch_first=True)  # returns a tuple

    def forward(self, input_ids):
        states = self.layer(self.embedding(input_ids))[0]
        return ModelOutput(last_hidden_state=states, pooler_output=states[:, 0])


class TextModel(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder = Encoder(width)
        self.classifier = nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask=None):
        encoded = self.encoder(input_ids)
        return ModelOutput(logits=self.classifier(encoded.pooler_output))


TOKENS_TO_MAP = {
    "student": "norm",
    "student_pool": "mean_tokens",
    "student_skip": 1,
    "teacher": "relu",
    "teacher_pool": "spatial_mean",
}
SEVERAL = [
    {**TOKENS_TO_MAP, "name": "a", "weight": 2.0, "loss": "mse", "scale": "match"},
    {**TOKENS_TO_MAP, "name": "b", "student": "blocks.1", "weight": 0.5, "normalization": "batch_norm", "eps": 1e-2},
    {
        **TOKENS_TO_MAP,
        "name": "c",
        "student": "embed",
        "student_pool": "spatial_mean",
        "teacher": "conv",
        "scale": "learned",
        "weight": 0.0,
    },
    {
        **TOKENS_TO_MAP,
        "name": "wide",
        "student_pool": "class_token",
        "teacher": "fc",
        "teacher_pool": None,
        "beta": 0.5,
        "scale": 3.0,
    },
]
OPTIONS = {  # of SEVERAL, by name
    "a": {"loss": "mse", "scale": "match"},
    "b": {"normalization": "batch_norm", "eps": 1e-2},
    "c": {"scale": "learned"},
    "wide": {"beta": 0.5, "scale": 3.0},
}
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def make(pairs=(TOKENS_TO_MAP,), student=None, teacher=None, **options):
    torch.manual_seed(0)
    options.setdefault("example_input", IMAGES[:1])
    return vk.FeatureDistiller(student or ViT(), teacher or CNN(), list(pairs), **options)


def outputs_of(model, names, *args):
    """The definition of a tap: hooks of the test's own."""
    outputs = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda _, __, y, n=n: outputs.__setitem__(n, y)) for n in names
    ]
    model(*args)
    for handle in handles:
        handle.remove()
    return outputs


def hooks_on(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def loss_like(distiller, name, s, t, **options):
    """An OrthoProjLoss of its own with the projection of that pair."""
    module = vk.OrthoProjLoss(s, t, **options)
    module.projection.weight = distiller.projection(name).detach()
    return module


# A student and a teacher of linear layers.
FEATURES = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
LAYERS = {"student": "0", "teacher": "0", "dims": (8, 32), "name": "x"}


def layers(width, inputs=6):
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 4))


def distiller_of_layers(**options):
    return vk.FeatureDistiller(layers(8), layers(32), [LAYERS], **options)


def messages(function):
    """What it warns of in training, each warning as often as it comes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    said = [str(warning.message) for warning in caught]
    return [message for message in said if "have no graph" in message or "did not move" in message]
