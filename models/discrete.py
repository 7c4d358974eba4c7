"""Causal language models over discrete tokens under one interface: all positions at once, or one token at a time."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from probattn.errors import InputError
from probattn.models.language import LanguageModel

__all__ = ["HuggingFaceModel", "NextTokenModel", "OwnModel", "Side"]

Side = Literal["left", "right"]


class NextTokenModel(Protocol):
    r"""P(y_2..n | y_1) as a product of next-token laws, computed in two ways that must agree.

    .. math::
        \log P(y_{2..n} | y_1) = \sum_{i < n} \log \mathrm{softmax}(\mathrm{logits}_i)_{y_{i+1}}
    """

    @property
    def vocabulary(self) -> int:
        """V: tokens are 0..V-1."""

    @property
    def context(self) -> int:
        """Longest sequence."""

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""

    @property
    def padding(self) -> tuple[Side, ...]:
        """Sides on which a row may be padded."""

    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of the next token after every position, (N, T, V), in one pass over tokens (N, T).

        Where ``mask`` (N, T) is False the token is padding, and the logits there mean nothing.
        """

    def steps(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same logits by decoding: each position is computed before any later token is shown."""


class OwnModel:
    """The language model of this package with its sites at one value, such as the mode.

    It has no cache: each step runs the whole prefix again. Its positions are learnt and counted from the first column,
    so that only right padding can leave a row unchanged.

    Args:
        model: the model.
        values: its sites, as a fit returns them.
        dtype: in which to compute; None: that of the values.

    Raises:
        InputError: a site is missing.

    Example:
        >>> from probattn.models.language import LanguageConfig
        >>> model = LanguageModel(LanguageConfig(5, context=4, dim=4, layers=1, decoder_heads=2))
        >>> own = OwnModel(model, model.initial_values(0))
        >>> tokens = torch.tensor([[0, 3, 1]])
        >>> torch.allclose(own.logits(tokens), own.steps(tokens))
        True
    """

    padding: tuple[Side, ...] = ("right",)

    def __init__(self, model: LanguageModel, values: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
        missing = sorted(set(model.parameter_priors()) - set(values))
        if missing:
            raise InputError(f"values lack the sites {', '.join(missing)}; give every site that the fit returns.")
        self._model = model
        self._values = {name: value.detach().to(dtype=dtype or value.dtype) for name, value in values.items()}

    @property
    def vocabulary(self) -> int:
        """V."""
        return self._model.config.vocabulary

    @property
    def context(self) -> int:
        """T of the longest window."""
        return self._model.config.context

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings, and so of everything after them."""
        return self._values["embedding"].dtype

    @torch.no_grad()
    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits after every position, (N, T, V), in one pass.

        Args:
            tokens: (N, T).
            mask: (N, T), False on padding, which may follow a row only; a causal model needs no more than that.

        Raises:
            InputError: tokens of a wrong shape, kind, length or range; a mask that is not right padding.
        """
        _require_tokens(self, tokens, mask)
        return self._model.decode(self._values, self._model.embed(self._values, tokens))

    def steps(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same logits, each from its prefix alone.

        Args:
            tokens: (N, T).
            mask: as in :meth:`logits`.

        Raises:
            InputError: as :meth:`logits` does.
        """
        _require_tokens(self, tokens, mask)
        return torch.stack([self.logits(tokens[:, : t + 1])[:, -1] for t in range(tokens.shape[1])], dim=1)


class HuggingFaceModel:
    """A causal language model of the ``transformers`` library; the steps use its key-value cache.

    Args:
        model: such as ``GPT2LMHeadModel`` or ``LlamaForCausalLM``, in evaluation mode.
        dtype: compute in a converted copy; None: in the model as it is.

    Raises:
        InputError: the model is in training mode, or it has no vocabulary size in its configuration.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel  # doctest: +SKIP
        >>> HuggingFaceModel(GPT2LMHeadModel(GPT2Config()).eval()).vocabulary  # doctest: +SKIP
        50257
    """

    padding: tuple[Side, ...] = get_args(Side)

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        if model.training:
            raise InputError("model is in training mode, where dropout makes any two passes differ; call model.eval().")
        config: Any = getattr(model, "config", None)
        if not isinstance(getattr(config, "vocab_size", None), int):
            raise InputError(
                f"model is a {type(model).__name__} without config.vocab_size; give a causal language model of the "
                "transformers library."
            )
        self._model = model if dtype is None else copy.deepcopy(model).to(dtype)
        self._config = config
        # Releases of transformers differ in what they call the cache, as an argument and in the output.
        named = inspect.signature(self._model.forward).parameters
        self._cache = "cache" if "cache" in named else "past_key_values"

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self._config.vocab_size)

    @property
    def context(self) -> int:
        """Positions that the model has, without limit where its configuration names none."""
        return int(getattr(self._config, "max_position_embeddings", None) or sys.maxsize)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter."""
        return next(self._model.parameters()).dtype

    @torch.no_grad()
    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits after every position, (N, T, V), in one pass.

        Args:
            tokens: (N, T).
            mask: (N, T), False on padding, before or after a row; positions count from its first token.

        Raises:
            InputError: tokens of a wrong shape, kind, length or range; a mask with gaps.
        """
        shown = _require_tokens(self, tokens, mask)
        output: Any = self._model(
            input_ids=tokens, attention_mask=shown.long(), position_ids=self.positions(shown), use_cache=False
        )
        return output.logits  # type: ignore[no-any-return]

    @torch.no_grad()
    def steps(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same logits one token at a time, the keys and values of the past taken from the cache.

        Args:
            tokens: (N, T).
            mask: as in :meth:`logits`.

        Raises:
            InputError: as :meth:`logits` does.
        """
        shown = _require_tokens(self, tokens, mask)
        positions = self.cached_positions(shown)
        cache: Any = None
        found = []
        for t in range(tokens.shape[1]):
            output: Any = self._model(
                input_ids=tokens[:, t : t + 1],
                attention_mask=shown[:, : t + 1].long(),
                position_ids=positions[:, t : t + 1],
                use_cache=True,
                **{self._cache: cache},
            )
            cache = getattr(output, self._cache)
            found.append(output.logits[:, -1])
        return torch.stack(found, dim=1)

    @staticmethod
    def positions(mask: Tensor) -> Tensor:
        """Place of each token in its own row, (N, T); 0 on padding to the left."""
        return (mask.long().cumsum(-1) - 1).clamp(min=0)

    def cached_positions(self, mask: Tensor) -> Tensor:
        """Positions that decoding step by step passes to the model; the same, unless a subclass is to be wrong."""
        return self.positions(mask)


def _require_tokens(model: NextTokenModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Refuse what the model cannot take; the mask, all True where there is none."""
    if tokens.dim() != 2 or 0 in tokens.shape or tokens.shape[1] > model.context:
        raise InputError(
            f"tokens have shape {tuple(tokens.shape)}; they must be (N, T), not empty, with T <= {model.context}, the "
            "model's context: cut them."
        )
    if tokens.dtype != torch.long:
        raise InputError(f"tokens are {tokens.dtype}; they are indices: convert them with .long().")
    outside = ((tokens < 0) | (tokens >= model.vocabulary)).nonzero()
    if len(outside):
        row, column = map(int, outside[0])
        raise InputError(
            f"tokens[{row}, {column}] is {int(tokens[row, column])}; the vocabulary is 0..{model.vocabulary - 1}: use "
            "the model's own tokeniser."
        )
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise InputError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be boolean with the shape of tokens, "
            f"{tuple(tokens.shape)}."
        )
    changes = mask[:, 1:].long() - mask[:, :-1].long()
    for row in range(len(mask)):
        entered, left = bool((changes[row] > 0).any()), bool((changes[row] < 0).any())
        if not mask[row].any() or (entered and left):
            raise InputError(
                f"mask[{row}] keeps {int(mask[row].sum())} of {mask.shape[1]} tokens, with padding in the middle, on "
                "both sides or everywhere; a row is a stretch of tokens with padding on one side."
            )
        if (entered and "left" not in model.padding) or (left and "right" not in model.padding):
            side = "left" if entered else "right"
            raise InputError(
                f"mask[{row}] pads on the {side}; this model can be padded on the {' or '.join(model.padding)} only: "
                "move the padding there."
            )
    return mask
