"""The two networks of the digits task: a convolutional teacher, a vision transformer as its student."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Output(NamedTuple):
    features: torch.Tensor  # (N, C), what feature distillation compares
    logits: torch.Tensor  # (N, classes)


class ConvTeacher(nn.Module):
    """Convolution, batch norm, ReLU, once per width; halved once, half way; global average; linear."""

    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (before, width) in enumerate(zip((1, *widths[:-1]), widths, strict=True)):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if index == len(widths) // 2 - 1:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: torch.Tensor) -> Output:  # (N, 1, 8, 8)
        features = self.body(images).mean(dim=(2, 3))
        return Output(features, self.head(features))


class Block(nn.Module):
    """Self-attention and an MLP, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, tokens, width)
        rows, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, tokens, width / heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.mix(attended.transpose(1, 2).reshape(rows, tokens, width))
        return x + self.mlp(self.mlp_norm(x))


class TinyViT(nn.Module):
    """Patches, positions, blocks, a final norm; features are the mean of the patch tokens, the head sits on them."""

    def __init__(self, *, width: int, depth: int, heads: int, mlp_ratio: int, patch: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        # 0.5, not the usual 0.02: in a few hundred steps nothing smaller grows enough to tell the patches apart
        self.position = nn.Parameter(torch.randn(1, (8 // patch) ** 2, width) * 0.5)
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> Output:  # (N, 1, 8, 8)
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position  # (N, tokens, width)
        features = self.norm(self.blocks(tokens)).mean(dim=1)
        return Output(features, self.head(features))

    def no_weight_decay(self) -> set[str]:
        return {"position"}
