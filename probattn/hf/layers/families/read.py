"""Parameters as the modules of ``transformers`` keep them, read into the forms of this package, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probattn.errors import InputError
from probattn.hf.layers.tokenwise import Norm, Projection

__all__ = ["layer_norm", "linear", "output_map", "projection", "require_causal", "rms_norm", "rotary"]


def linear(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight (rows, columns) and bias of a linear map.

    Args:
        module: the module that holds it.
        name: its name there.

    Raises:
        InputError: it is no plain linear map in floating point.
    """
    found = getattr(module, name)
    plain = type(found) is nn.Linear or type(found).__name__ == "Conv1D"
    if not plain or not found.weight.is_floating_point():
        raise InputError(
            f"{name} of {type(module).__name__} is a {type(found).__name__}, not a plain linear map in floating point; "
            "merge adapters (model.merge_and_unload()) and load quantised weights dequantised."
        )
    weight = found.weight.mT if type(found).__name__ == "Conv1D" else found.weight
    return weight, found.bias


def projection(module: Any, name: str, rank: int) -> Projection:
    """The map of the token to heads of ``rank`` features."""
    weight, bias = linear(module, name)
    return Projection(weight.unflatten(0, (-1, rank)), None if bias is None else bias.unflatten(0, (-1, rank)))


def output_map(module: Any, name: str, rank: int) -> tuple[Tensor, Tensor | None]:
    """W_O, ``(p, H, dv)``, and its bias."""
    weight, bias = linear(module, name)
    return weight.unflatten(1, (-1, rank)), bias


def layer_norm(norm: Any) -> Norm:
    """A LayerNorm over the last axis."""
    if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
        raise InputError(f"a norm of the attention is {type(norm).__name__}, where nn.LayerNorm is expected.")
    return Norm(norm.weight, norm.bias, norm.eps, centred=True)


def rms_norm(norm: Any, *, one_plus: bool = False) -> Norm:
    """A root-mean-square norm.

    Args:
        norm: the module.
        one_plus: whether the gain is 1 + weight, as Gemma has it.
    """
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if epsilon is None or not isinstance(getattr(norm, "weight", None), Tensor):
        raise InputError(
            f"a norm of the attention is {type(norm).__name__}, where a root-mean-square norm is expected."
        )
    gain = norm.weight.to(torch.promote_types(norm.weight.dtype, torch.float32))
    return Norm(1 + gain if one_plus else gain, None, float(epsilon), centred=False)


def rotary(module: nn.Module | None, **options: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The model's rotary embedding as a function of positions and of a tensor for dtype and device.

    Args:
        module: the rotary embedding.
        options: what it needs beside the positions, such as the type of the layer.

    Raises:
        InputError: the model has none.
    """
    if module is None:
        raise InputError("the model has no rotary embedding (rotary_emb) where its attention needs one.")
    return partial(_rotate, module, options)


def _rotate(module: nn.Module, options: dict[str, Any], positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = module(like, positions, **options)
    return cos, sin


def require_causal(attention: Any) -> None:
    """Refuse attention that looks ahead."""
    if not getattr(attention, "is_causal", True):
        raise InputError(
            f"{type(attention).__name__} looks ahead (use_bidirectional_attention or is_causal=False); the blocks of "
            "the Jacobian are those of causal attention."
        )
