"""What a state dict must hold of an orthogonal map, so that loading never yields another matrix than was saved."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

from .diagnostics import orthogonality_error
from .ops import checks
from .ops.cayley import cayley_inverse
from .ops.cayley.api import SEMI_ORTHOGONAL

SIGN = 127
UNINITIALIZED = (
    "this orthogonal weight was never initialized: its buffer of signs holds other numbers. After to_empty() call "
    "reset_parameters(). In a PreTrainedModel of transformers, whose from_pretrained() leaves new modules undefined, "
    "_init_weights(self, module) must call module.reset_parameters() for vkd_kernels.OrthoProjLoss, OrthogonalLinear "
    "and parametrization.OrthogonalWeight"
)


def are_signs(signs: torch.Tensor) -> bool:
    """Whether every entry is a sign as maps keep it (±127, or rounded by an average of such) or as they did (±1)."""
    magnitude = signs.float().abs()
    return bool(((magnitude == 1) | ((magnitude >= 100) & (magnitude <= SIGN))).all())


def prepare_map_state(
    orthogonal_map: nn.Module,
    state_dict: dict[str, Any],
    *,
    parameter_key: str,
    map_prefix: str,
    error_messages: list[str],
) -> None:
    """Called before a module with a parameter and its map loads: converts ``state_dict``, or refuses these entries.

    An entry of ``error_messages`` is an error whatever ``strict`` says; what is refused is not copied either.
    """
    buffers = [f"{map_prefix}{name}" for name, _ in orthogonal_map.named_buffers()]
    held = [key for key in (parameter_key, *buffers, f"{map_prefix}base") if key in state_dict]
    try:
        if held:
            _convert(state_dict, held, buffers, parameter_key=parameter_key, map_prefix=map_prefix)
    except ValueError as error:
        error_messages.append(str(error))
        for key in held:
            state_dict.pop(key, None)


def _convert(
    state_dict: dict[str, Any], held: list[str], buffers: list[str], *, parameter_key: str, map_prefix: str
) -> None:
    signs_key = f"{map_prefix}signs"
    of_pytorch = state_dict.pop(f"{map_prefix}base", None)
    if of_pytorch is not None and f"{map_prefix}map.base" in buffers:
        state_dict[f"{map_prefix}map.base"] = of_pytorch
    elif of_pytorch is not None and parameter_key in state_dict:
        state_dict[parameter_key], state_dict[signs_key] = _from_pytorch(
            parameter_key, state_dict[parameter_key], of_pytorch
        )
    missing = [key for key in (parameter_key, *buffers) if key not in state_dict]
    if missing:
        raise ValueError(
            f"{', '.join(held)} without {', '.join(missing)} would be another matrix: load the module's whole "
            "state_dict(), buffers included, or assign the matrix to the weight"
        )
    signs = state_dict.get(signs_key)
    if isinstance(signs, torch.Tensor) and not (checks.is_sharded(signs) or signs.is_meta):
        if not are_signs(signs):
            raise ValueError(
                f"{signs_key} must hold ±{SIGN}, or ±1 as in commits before 0.1: an average of weights whose signs "
                "differ is no matrix; average the matrices and assign the result to the weight"
            )
        state_dict[signs_key] = (signs.float().sign() * SIGN).to(torch.int8)


def _from_pytorch(
    key: str,
    original: torch.Tensor,  # (..., T, S)
    base: torch.Tensor,  # (..., n, n), n the larger of T and S
) -> tuple[torch.Tensor, torch.Tensor]:  # (..., T, S) and (..., 1, S) or (..., T, 1)
    """The parameter and signs of the matrix that ``torch.nn.utils.parametrizations.orthogonal`` computes from these.

    Its checkpoints don't say by which map: its default for the shape is assumed.
    """
    holder: Any = nn.Module()
    eye = torch.eye(*original.shape[-2:], dtype=torch.float64)
    holder.register_parameter("weight", nn.Parameter(eye.expand(original.shape).clone()))
    parametrizations.orthogonal(holder, "weight")
    holder.load_state_dict({"parametrizations.weight.original": original, "parametrizations.weight.0.base": base})
    matrix: torch.Tensor = holder.weight.detach()
    error = orthogonality_error(matrix).max().item()
    default = "matrix_exp" if original.shape[-2] == original.shape[-1] else "householder"
    if not error <= SEMI_ORTHOGONAL:
        raise ValueError(
            f"{key}: the matrix of this checkpoint of torch.nn.utils.parametrizations.orthogonal is not "
            f"semi-orthogonal, max |PᵀP - I| = {error:.1e}. Weight decay does that to PyTorch's map 'householder'"
        )
    if (original + torch.eye(*original.shape[-2:]).to(original)).any():  # trained; before, all of its maps agree
        warnings.warn(
            f"vkd_kernels: {key} was saved by torch.nn.utils.parametrizations.orthogonal and is converted as by "
            f"orthogonal_map={default!r}, its default for the shape {tuple(original.shape)}. If it was trained with "
            "another map, load it there and assign: layer.weight = old.weight.",
            stacklevel=2,
        )
    weight, signs = cayley_inverse(matrix)
    return weight.to(original.dtype).contiguous().to(original.device), (signs * SIGN).to(original.device, torch.int8)
