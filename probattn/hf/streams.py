"""Texts for a language model, and the residual streams and predictions that the model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.layers import AttentionLayer
from probattn.hf.layers.build import find_site
from probattn.hf.layers.families.registry import family_of

__all__ = [
    "Text",
    "predictions",
    "read_text",
    "require_prefix",
    "residual_streams",
    "seen_by",
    "text_streams",
    "unpacked",
]

_AGREEMENT = 0.1  # relative; kernels of half precision round to three digits
_ROWS = 64  # predictions over the whole vocabulary that exist at a time


class Text(NamedTuple):
    """Token ids with what a model must know beside them, all on the model's device.

    Attributes:
        ids: token ids, ``(B, T)``.
        mask: 0 on padding, ``(B, T)``; None: there is none.
        positions: positions as the model counts them, ``(B, T)``; None: 0, 1, ..., without padding.
        prefix: number of first tokens that all see each other, ``(B,)``; None: none do.
    """

    ids: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    prefix: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """Positions of the tokens, ``(B, T)``."""
        if self.positions is not None:
            return self.positions
        shown = torch.ones_like(self.ids) if self.mask is None else (self.mask != 0).long()
        return (shown.cumsum(1) - 1).clamp(min=0)

    @property
    def past(self) -> Tensor:
        """Number of tokens before each one, padding not counted; -1 on padding, ``(B, T)``."""
        shown = torch.ones_like(self.ids) if self.mask is None else (self.mask != 0).long()
        return (shown.cumsum(1) - 1).masked_fill(shown == 0, -1)

    def columns(self, begin: int, end: int) -> Text:
        """The tokens from begin to end as a text of its own."""
        return Text(
            self.ids[:, begin:end],
            None if self.mask is None else self.mask[:, begin:end],
            None if self.positions is None else self.positions[:, begin:end],
            self.prefix,
        )


def read_text(
    model: Any,
    input_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    prefix_length: Any = None,
    *,
    longest: int | None = None,
) -> Text:
    """Check token ids and what belongs to them.

    Args:
        model: the causal model.
        input_ids: token ids, ``(B, T)`` or ``(T,)``, a tensor, an array or a list of whole numbers.
        attention_mask: 0 on padding, as input_ids.
        position_ids: positions, as input_ids.
        prefix_length: number of first tokens that see each other, one for all sequences or one for each.
        longest: number of tokens that the model is given at a time; None: all.

    Raises:
        InputError: anything else, ids that the model does not have, more tokens than it takes.
    """
    device = next(model.parameters()).device
    ids = _whole_numbers("input_ids", input_ids)
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if ids.dim() != 2 or not ids.numel():
        raise InputError(f"input_ids has shape {tuple(ids.shape)}; it must be (sequences, T) with at least one token.")
    words = model.get_input_embeddings().weight.shape[0]
    if not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise InputError(
            f"input_ids go from {int(ids.min())} to {int(ids.max())}; the model has {words} tokens. "
            "Use its own tokeniser."
        )
    takes = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    length = ids.shape[1] if longest is None else min(longest, ids.shape[1])
    if takes is not None and length > takes:
        raise InputError(
            f"input_ids has {length} tokens; the model takes {takes}. Cut the text into windows: window={takes}."
        )
    mask = None if attention_mask is None else _like_ids("attention_mask", attention_mask, ids)
    if mask is not None:
        if not bool((mask != 0).any(1).all()):
            raise InputError("attention_mask hides a whole sequence; it must leave a token in each sequence.")
        mask = None if bool((mask != 0).all()) else (mask != 0).long().to(device)
    positions = None if position_ids is None else _like_ids("position_ids", position_ids, ids)
    if positions is not None and int(positions.min()) < 0:
        raise InputError(f"position_ids go down to {int(positions.min())}; positions count from 0.")
    prefix = None
    if prefix_length is not None:
        if mask is not None:
            raise InputError("prefix_length does not go together with padding; give sequences of one length.")
        prefix = _whole_numbers("prefix_length", prefix_length).expand(len(ids))
        if int(prefix.min()) < 0 or int(prefix.max()) > ids.shape[1]:
            raise InputError(f"prefix_length is {prefix.tolist()}; it must lie between 0 and T = {ids.shape[1]}.")
        prefix = prefix.to(device)
    return Text(ids.to(device), mask, None if positions is None else positions.to(device), prefix)


def unpacked(text: Text, sequence_ids: Any) -> tuple[Text, Tensor, Tensor]:
    """Take packed sequences apart, as they do not see each other.

    Args:
        text: several sequences in each row, without a mask of its own.
        sequence_ids: number of the sequence that each token belongs to, ``(B, T)``; equal numbers stand side by side,
            and a negative one is padding.

    Returns:
        The sequences in rows of their own, padded on the right; and for each token of the packed text its row and its
        column there, ``(B, T)``, -1 on padding.
    """
    numbers = _like_ids("sequence_ids", sequence_ids, text.ids)
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    for row in numbers:
        runs = row[torch.cat([row.new_ones(1).bool(), row[1:] != row[:-1]])].tolist()
        numbered = [run for run in runs if run >= 0]
        if len(set(numbered)) != len(numbered):
            raise InputError(
                "sequence_ids come back after another sequence; tokens of one sequence stand side by side."
            )
    hidden = numbers < 0
    if bool(hidden.all()):
        raise InputError("sequence_ids are negative everywhere, which stands for padding; there is no token.")
    index = torch.arange(numbers.shape[1]).expand_as(numbers)
    start = index.where(begins, 0).cummax(1)[0]
    column = (index - start).masked_fill(hidden, -1)
    row = (begins & ~hidden).flatten().long().cumsum(0).view(numbers.shape) - 1
    row = row.masked_fill(hidden, -1)
    count, length = int(row.max()) + 1, int(column.max()) + 1
    device = text.ids.device
    at = (row[~hidden].to(device), column[~hidden].to(device))
    shown = (~hidden).to(device)
    ids, mask = text.ids.new_zeros(count, length), text.ids.new_zeros(count, length)
    ids[at], mask[at] = text.ids[shown], 1
    positions = None
    if text.positions is not None:
        positions = text.ids.new_zeros(count, length)
        positions[at] = text.positions[shown]
    return Text(ids, None if bool((mask != 0).all()) else mask, positions), row, column


@torch.no_grad()
def text_streams(model: Any, text: Text) -> tuple[list[Tensor], Tensor]:
    """Run a model on a text and keep the residual stream in front of each layer.

    Returns:
        The streams, ``(B, T, p)`` each, and the logits, ``(B, T, vocabulary)``.
    """
    arguments: dict[str, Any] = {}
    if text.mask is not None:
        arguments["attention_mask"] = text.mask
    if text.mask is not None or text.positions is not None:
        arguments["position_ids"] = text.counted
    if text.prefix is not None:
        arguments["attention_mask"] = _four_axes(model, text)
        arguments["position_ids"] = text.counted
    training = model.training
    model.eval()
    try:
        output = model(input_ids=text.ids, output_hidden_states=True, use_cache=False, **arguments)
    finally:
        model.train(training)
    return list(output.hidden_states[:-1]), output.logits


def residual_streams(model: Any, ids: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """Run a model and keep the residual stream in front of each layer.

    Args:
        model: a causal model.
        ids: token ids, ``(sequences, T)``.
        mask: 0 on padding, ``(sequences, T)``.

    Returns:
        The streams, ``(sequences, T, p)`` each, and the logits, ``(sequences, T, vocabulary)``.
    """
    streams, logits = text_streams(model, Text(ids, mask))
    return streams, logits.float()


def seen_by(layer: AttentionLayer, text: Text) -> AttentionLayer:
    """The layer as it sees a text: with its positions, and with its mask where it has padding or a prefix."""
    if text.positions is not None:
        layer = layer.at(text.positions)
    if text.mask is None and text.prefix is None:
        return layer
    return layer.at(text.counted).seeing(_visible(text, layer.sublayer.window))


@torch.no_grad()
def require_prefix(model: Any, layer: AttentionLayer, text: Text, u: Tensor) -> None:
    """Refuse a model whose own code does not let the tokens of a prefix see each other when it is told to.

    Args:
        model: the causal model.
        layer: one of its layers.
        text: with a prefix.
        u: the stream in front of the layer, ``(B, T, p)``.

    Raises:
        InputError: the model adds something else to the stream.
    """
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hook = find_site(model, family_of(model), layer.number).last.register_forward_hook(keep)
    try:
        text_streams(model, text)
    finally:
        hook.remove()
    mean = seen_by(layer, text).mean(u)
    error = float((mean - seen[0].to(mean)).abs().max() / mean.abs().max().clamp(min=1e-30))
    if not error < _AGREEMENT:
        raise InputError(
            f"prefix_length is given, but {type(model).__name__} does not take a mask that looks ahead: its layer "
            f"{layer.number} differs by {error:.2g}. Leave prefix_length out."
        )


def predictions(logits: Tensor, text: Text, rows: Tensor) -> dict[str, Tensor]:
    """Surprisal of tokens given those before them, and entropy of the prediction behind them.

    Args:
        logits: ``(B, T, vocabulary)``.
        text: the tokens.
        rows: positions, ``(P,)``.

    Returns:
        "surprisal", NaN for a first token, and "entropy", in nats, ``(B, P)`` each; NaN on padding.
    """
    surprisal, entropy = [], []
    for part in rows.split(_ROWS):
        log_p = logits[:, part].float().log_softmax(-1)
        entropy.append(-(log_p.exp() * log_p).sum(-1))
        before = (part - 1).clamp(min=0)
        log_p = logits[:, before].float().log_softmax(-1)
        found = -log_p.gather(-1, text.ids[:, part].unsqueeze(-1)).squeeze(-1)
        surprisal.append(found.masked_fill(part == 0, torch.nan))
    values = {"surprisal": torch.cat(surprisal, 1), "entropy": torch.cat(entropy, 1)}
    if text.mask is not None:
        hidden = text.mask == 0
        after = torch.cat([hidden[:, :1], hidden[:, :-1]], 1)  # what follows padding has no past
        values["surprisal"] = values["surprisal"].masked_fill((hidden | after)[:, rows], torch.nan)
        values["entropy"] = values["entropy"].masked_fill(hidden[:, rows], torch.nan)
    return values


def _visible(text: Text, window: int | None) -> Tensor:
    """Tokens that each token sees, ``(B, T, T)``."""
    length, device = text.ids.shape[1], text.ids.device
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    shown = visible.expand(len(text.ids), -1, -1)
    if text.mask is not None:
        itself = torch.eye(length, dtype=torch.bool, device=device)  # so that padding sees something
        shown = (shown & (text.mask != 0).unsqueeze(1)) | itself
    if text.prefix is not None:
        first = torch.arange(length, device=device) < text.prefix.unsqueeze(1)  # (B, T)
        shown = shown | (first.unsqueeze(1) & first.unsqueeze(2))
    return shown


def _four_axes(model: Any, text: Text) -> Any:
    """A mask added to the logits, ``(B, 1, T, T)``, as the model takes it; one for each kind of layer that it has."""
    weight = next(model.parameters())

    def added(window: int | None) -> Tensor:
        hidden = ~_visible(text, window).unsqueeze(1)
        return torch.zeros(hidden.shape, dtype=weight.dtype, device=weight.device).masked_fill(
            hidden, torch.finfo(weight.dtype).min
        )

    kinds = set(getattr(model.config, "layer_types", None) or ())
    if kinds <= {"full_attention"}:
        return added(getattr(model.config, "sliding_window", None))
    return {kind: added(None if kind == "full_attention" else model.config.sliding_window) for kind in kinds}


def _whole_numbers(name: str, given: Any) -> Tensor:
    found = given
    if isinstance(given, np.ndarray | list | tuple | int | np.integer):
        try:
            found = torch.as_tensor(np.asarray(given))
        except (ValueError, TypeError):
            raise InputError(f"{name} is a ragged {type(given).__name__}; pad its sequences to one length.") from None
    if not isinstance(found, Tensor) or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        kind = found.dtype if isinstance(found, Tensor) else type(given).__name__
        raise InputError(f"{name} is {kind}; it must hold whole numbers, as a tokeniser returns them.")
    return found.long()


def _like_ids(name: str, given: Any, ids: Tensor) -> Tensor:
    """Numbers for each token, ``(B, T)``, on the CPU."""
    found = torch.as_tensor(given) if isinstance(given, np.ndarray | Sequence) else given
    if isinstance(found, Tensor) and name == "attention_mask":
        found = found != 0
    found = _whole_numbers(name, found.long() if isinstance(found, Tensor) and found.dtype == torch.bool else found)
    found = found.cpu()
    found = found.unsqueeze(0) if found.dim() == 1 and len(ids) == 1 else found
    if found.shape != ids.shape:
        raise InputError(f"{name} has shape {tuple(found.shape)}; it must be {tuple(ids.shape)}, as input_ids.")
    return found
