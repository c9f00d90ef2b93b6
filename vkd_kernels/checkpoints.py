"""Weights in a file: of safetensors, or of torch.save, also inside of a training checkpoint."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Where a training checkpoint of timm or DeiT holds weights: the moving average, then those of the last step.
WEIGHTS = ("state_dict_ema", "model_ema", "state_dict", "model")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors by name, on the CPU. Nothing in the file is run: it is read with ``weights_only``.

    Of a training checkpoint they are what it has as ``state_dict_ema``, ``model_ema``, ``state_dict`` or ``model``; of
    several, the first in this order.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds no weights.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = _content(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # as many types as kinds of damage; SafetensorError is no public name
        reason = " ".join(str(error).rsplit("WeightsUnpickler error: ", 1)[-1].split())[:400]
        raise ValueError(f"cannot read tensors from {path} ({type(error).__name__}: {reason})") from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"cannot read tensors from {path}: it holds a {type(content).__name__}, where a dict of tensors by name is "
            "needed, as model.state_dict() gives it"
        )
    state = next((content[key] for key in WEIGHTS if isinstance(content.get(key), Mapping)), content)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        names = ", ".join(repr(name) for name in list(content)[:8]) or "nothing"
        raise ValueError(
            f"cannot read tensors from {path}: it holds {names}, and no tensors by name, neither there nor in one of "
            f"{', '.join(WEIGHTS)}"
        )
    return tensors


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm and DeiT save the arguments of the run along
        return torch.load(path, map_location="cpu", weights_only=True)
