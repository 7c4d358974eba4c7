"""The arguments of a decoder layer of ``transformers``: the residual stream, who sees whom, and the rotation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from probattn.errors import InputError
from probattn.hf.layers.sublayer import Sublayer

__all__ = ["Arguments", "Stream", "padding_of", "read_stream", "sees_any"]

_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
_EXACT = ("eager", "sdpa")  # these are given every mask as a tensor


@dataclass(frozen=True)
class Stream:
    """Arguments of the attention sublayer of a decoder layer.

    Attributes:
        tokens: the residual stream u before the norm, ``(B, T, p)``.
        visible: tokens that each token sees, ``(1 or B, 1, T, T)`` boolean; None: itself and its past in the window.
        padding: False on padding, ``(B, T)``; None: there is none.
        rotation: cosine and sine of the rotary embedding as the layer was given them, ``(1 or B, T, d)`` each; None:
            it was given none.
    """

    tokens: Tensor
    visible: Tensor | None
    padding: Tensor | None
    rotation: tuple[Tensor, Tensor] | None

    def turned(self, sublayer: Sublayer) -> Sublayer:
        """The sublayer with the rotation of this call, which then does not ask for positions."""
        if self.rotation is None or sublayer.rotary is None:
            return sublayer
        cos, sin = (part.to(sublayer.output) for part in self.rotation)
        return sublayer._replace(rotary=lambda positions, like: (cos, sin))


class Arguments:
    """The names of a module's arguments, by which positional ones are found.

    Args:
        module: a module; decorators around its ``forward`` are seen through.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names = list(inspect.signature(module.forward).parameters)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The first argument, however it was passed."""
        found: Tensor = args[0] if args else kwargs[self.names[0]]
        return found

    def with_first(self, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments with another first one."""
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, self.names[0]: value})


def read_stream(tokens: Tensor, given: dict[str, Any], sublayer: Sublayer, number: int, kernel: str) -> Stream:
    """Read the arguments of a decoder layer in training.

    Args:
        tokens: its first argument, ``(B, T, p)``.
        given: its arguments by name.
        sublayer: its parameters; of these the window is read.
        number: of the layer.
        kernel: name of the attention function of the model, ``config._attn_implementation``.

    Returns:
        :class:`Stream`.

    Raises:
        InputError: tokens that a cache holds already, a mask that adds biases to the logits, or that is no tensor.
    """
    compiling = torch.compiler.is_compiling()
    length = tokens.shape[1]
    if not compiling:
        for name in _CACHES:
            cache = given.get(name)
            if cache is not None and int(cache.get_seq_length(number)):
                raise InputError(
                    f"layer {number} reads {int(cache.get_seq_length(number))} tokens from a cache in training; the "
                    "barrier needs the whole sequence in one pass."
                )
    rotation = given.get("position_embeddings")
    mask = given.get("attention_mask")
    stream = Stream(tokens, None, padding_of(mask, length), rotation if isinstance(rotation, tuple) else None)
    if mask is None:
        positions = given.get("position_ids")
        if kernel not in _EXACT and not compiling and positions is not None and bool((positions.diff() != 1).any()):
            raise InputError(
                f"sequences are packed, and the attention {kernel!r} gets no mask that says so; load the model with "
                "attn_implementation='sdpa'."
            )
        return stream
    assert isinstance(mask, Tensor)  # padding_of refuses the rest
    if mask.dim() == 2:
        visible = _causal(length, sublayer.window, mask.device) & mask[:, None, None, -length:].bool()
        return replace(stream, visible=visible)
    if mask.shape[-1] != length:
        raise InputError(
            f"layer {number} was given a mask of {mask.shape[-1]} keys for {length} tokens; the barrier needs the "
            "whole sequence in one pass, without a cache."
        )
    visible = _allowed(mask)
    if mask.dtype != torch.bool and not compiling and bool(((mask != 0) & visible).any()):
        raise InputError(
            f"layer {number} was given a mask that adds biases to the logits; the blocks are derived for masks that "
            "show or hide a token."
        )
    if visible.shape[1] > 1:
        raise InputError(f"layer {number} was given a mask for each of {visible.shape[1]} heads; give one for all.")
    return replace(stream, visible=visible)


def padding_of(mask: Any, length: int) -> Tensor | None:
    """False on padding, ``(B, T)``, read off a mask: no position sees the key of padding.

    Args:
        mask: ``(B, 1, T, S)``, boolean or additive, or ``(B, S)`` with zeros on padding; None: no padding.
        length: T, the last of the S tokens.

    Raises:
        InputError: a mask that is no tensor.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise InputError(
            f"the attention mask is a {type(mask).__name__}, whose entries the barrier cannot read; load the model "
            "with attn_implementation='sdpa'."
        )
    if mask.dim() == 2:
        return mask[:, -length:].bool()
    return _allowed(mask)[:, 0, :, mask.shape[-1] - length :].diagonal(dim1=-2, dim2=-1)


def sees_any(mask: Any, tokens: Tensor) -> Tensor:
    """True for tokens that see any token, themselves included, ``(B, t)``; padding on the left sees none.

    Args:
        mask: of the new tokens against all keys, ``(B or 1, 1, t, S)``, or ``(B, S)`` with zeros on padding; None: all
            tokens see themselves.
        tokens: the new tokens, ``(B, t, p)``.
    """
    batch, length = tokens.shape[:2]
    if not isinstance(mask, Tensor):
        return torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if mask.dim() == 2:
        return mask[:, -length:].bool()
    return _allowed(mask).any(-1).any(1).expand(batch, -1)


def _allowed(mask: Tensor) -> Tensor:
    """True where a token is seen; libraries write "never" as the lowest number of a precision."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _causal(length: int, window: int | None, device: torch.device) -> Tensor:
    """The past, itself included, within the window, ``(T, T)``."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)
