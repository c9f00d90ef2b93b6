"""What tests of training stacks share: the examples as modules, small models and batches, comparisons."""

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """The module examples/<name>.py, importable by its own name, as the examples import each other."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


def needs(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"needs {name} (the extra integrations)")


def bert(width: int, kind: str = "BertForSequenceClassification", **options: Any) -> nn.Module:
    """A BERT of two layers without dropout; ``width`` is that of its hidden states."""
    transformers = needs("transformers")
    config = transformers.BertConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    return getattr(transformers, kind)(config)


def sentences(lengths: Iterable[int], labels: str = "tokens") -> list[dict[str, torch.Tensor]]:
    """One sample per length, padded; labels per token (padding is -100) or one per sentence."""
    lengths = torch.tensor(list(lengths))
    mask = torch.arange(12) < lengths[:, None]
    ids = torch.randint(50, mask.shape, generator=torch.Generator().manual_seed(1))
    target = ids.masked_fill(~mask, -100) if labels == "tokens" else ids[:, 0] % 2
    fields = {"input_ids": ids, "attention_mask": mask.long(), "labels": target}
    return [{name: value[i] for name, value in fields.items()} for i in range(len(lengths))]


def assert_same(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor], **tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def orthogonality_error(p: torch.Tensor) -> float:
    p = p.detach().double()
    p = p if p.shape[0] >= p.shape[1] else p.T
    return (p.T @ p - torch.eye(p.shape[1])).abs().max().item()
