"""One interface for causal language models over discrete tokens: all positions at once, or one token at a time."""

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
    r"""Product of next-token distributions, computed in two ways that must agree.

    .. math::
        \log P(y_{2..n} | y_1) = \sum_{i < n} \log \mathrm{softmax}(\mathrm{logits}_i)_{y_{i+1}}
    """

    @property
    def vocabulary(self) -> int:
        """Number V of tokens, which are 0 to V - 1."""

    @property
    def context(self) -> int:
        """Largest number of tokens in a sequence."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the computation."""

    @property
    def padding(self) -> tuple[Side, ...]:
        """Sides on which a sequence may be padded."""

    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the logits of the next token after every position in one pass.

        Args:
            tokens: tokens, ``(N, T)``.
            mask: False on padding, ``(N, T)``; the logits there are meaningless.

        Returns:
            Logits, ``(N, T, V)``.
        """

    def steps(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the same logits by decoding, each position before any later token is known."""


class OwnModel:
    """Language model of this package with its sites fixed at one value, such as the mode.

    It has no cache; each step runs the complete prefix again. Its positions are learnt and counted from the first
    column, so that only right padding leaves the logits of a sequence unchanged.

    Args:
        model: language model.
        values: values of its sites, as a fit returns them.
        dtype: floating-point type of the computation; that of the values where None.

    Raises:
        InputError: a site has no value.

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
        """Number V of tokens."""
        return self._model.config.vocabulary

    @property
    def context(self) -> int:
        """Largest number of tokens in a window."""
        return self._model.config.context

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the embeddings, and so of everything after them."""
        return self._values["embedding"].dtype

    @torch.no_grad()
    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the logits after every position in one pass.

        Args:
            tokens: tokens, ``(N, T)``.
            mask: False on padding, ``(N, T)``, which may only follow the tokens of a sequence, where a causal model
                does not see it.

        Returns:
            Logits, ``(N, T, V)``.

        Raises:
            InputError: the tokens have a wrong shape, type, length or range, or the mask is not right padding.
        """
        _require_tokens(self, tokens, mask)
        return self._model.decode(self._values, self._model.embed(self._values, tokens))

    def steps(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the same logits, each from its prefix alone.

        Args:
            tokens: tokens, ``(N, T)``.
            mask: as in :meth:`logits`.

        Returns:
            Logits, ``(N, T, V)``.

        Raises:
            InputError: as :meth:`logits` does.
        """
        _require_tokens(self, tokens, mask)
        return torch.stack([self.logits(tokens[:, : t + 1])[:, -1] for t in range(tokens.shape[1])], dim=1)


class HuggingFaceModel:
    """Causal language model of the ``transformers`` library, decoded with its key-value cache.

    Args:
        model: model in evaluation mode, such as ``GPT2LMHeadModel`` or ``LlamaForCausalLM``.
        dtype: floating-point type of a converted copy; None uses the model as it is.

    Raises:
        InputError: the model is in training mode, or its configuration has no vocabulary size.

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
        # Releases of transformers differ in the name of the cache, as an argument and in the output.
        named = inspect.signature(self._model.forward).parameters
        self._cache = "cache" if "cache" in named else "past_key_values"

    @property
    def vocabulary(self) -> int:
        """Number V of tokens."""
        return int(self._config.vocab_size)

    @property
    def context(self) -> int:
        """Number of positions of the model; unlimited where its configuration names none."""
        return int(getattr(self._config, "max_position_embeddings", None) or sys.maxsize)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the first parameter."""
        return next(self._model.parameters()).dtype

    @torch.no_grad()
    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the logits after every position in one pass.

        Args:
            tokens: tokens, ``(N, T)``.
            mask: False on padding, ``(N, T)``, before or after the tokens of a sequence; positions count from its first
                token.

        Returns:
            Logits, ``(N, T, V)``.

        Raises:
            InputError: the tokens have a wrong shape, type, length or range, or the mask has gaps.
        """
        shown = _require_tokens(self, tokens, mask)
        output: Any = self._model(
            input_ids=tokens, attention_mask=shown.long(), position_ids=self.positions(shown), use_cache=False
        )
        return output.logits  # type: ignore[no-any-return]

    @torch.no_grad()
    def steps(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the same logits one token at a time, with the keys and values of the past from the cache.

        Args:
            tokens: tokens, ``(N, T)``.
            mask: as in :meth:`logits`.

        Returns:
            Logits, ``(N, T, V)``.

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
        """Position of each token in its sequence, ``(N, T)``; 0 on padding to the left."""
        return (mask.long().cumsum(-1) - 1).clamp(min=0)

    def cached_positions(self, mask: Tensor) -> Tensor:
        """Positions that decoding passes to the model; a subclass overrides them to be wrong on purpose."""
        return self.positions(mask)


def _require_tokens(model: NextTokenModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Check tokens and mask against the model and return the mask, all True where None is given."""
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
                "both sides or everywhere; a row must hold consecutive tokens with padding on one side."
            )
        if (entered and "left" not in model.padding) or (left and "right" not in model.padding):
            side = "left" if entered else "right"
            raise InputError(
                f"mask[{row}] pads on the {side}; this model can be padded on the {' or '.join(model.padding)} only: "
                "move the padding there."
            )
    return mask
