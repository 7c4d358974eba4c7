r"""A small ordinary transformer on characters that returns its attention heads.

.. math::
    u = E[y] + P, \qquad x \leftarrow x + W_O\,\mathrm{Attn}(\mathrm{LN}\,x), \quad
    x \leftarrow x + W_2\,\mathrm{GELU}(W_1\,\mathrm{LN}\,x), \qquad \mathrm{logits} = R\,\mathrm{LN}\,x

Unlike :class:`~probattn.models.language.LanguageModel` it has no prior and no sample sites. The study of robustness
trains it with and without penalties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probattn.errors import InputError, require_at_least
from probattn.numerics.random import isolated_seed

__all__ = ["CharacterGPT", "GPTConfig", "Heads"]

# Standard deviations of the initial embeddings, as in LanguageModel.initial_values.
_TABLE, _POSITIONS = 0.5, 0.1


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a :class:`CharacterGPT`.

    Attributes:
        vocabulary: number V of characters.
        context: number T of characters in a window.
        dim: size p of the embeddings and of every layer.
        layers: number of layers.
        heads: number H of heads in each layer, a divisor of dim.
    """

    vocabulary: int
    context: int = 64
    dim: int = 64
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require_at_least(name, value)
        if self.dim % self.heads:
            raise InputError(f"dim is {self.dim}, which heads = {self.heads} does not divide; choose a multiple.")


class Heads(NamedTuple):
    """Queries, keys and values of one layer, as they enter its logits and its mean.

    Attributes:
        query: queries, ``(N, H, T, p / H)``; the logit scale is ``(p / H)**-0.5``.
        key: keys, ``(N, H, T, p / H)``.
        value: values, ``(N, H, T, p / H)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor


class _Block(nn.Module):
    """One pre-norm layer: attention, then a perceptron, each added to its input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.projections, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.perceptron = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Heads]:
        parts = self.projections(self.attention_norm(x)).chunk(3, dim=-1)
        own = Heads(*(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts))
        mean = F.scaled_dot_product_attention(own.query, own.key, own.value, is_causal=True)
        x = x + self.output(mean.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.perceptron_norm(x)), own


class CharacterGPT(nn.Module):
    """Character transformer with accessible embeddings and heads.

    Args:
        config: sizes.
        seed: random seed for the initial values; the global random state is not touched.

    Example:
        >>> model = CharacterGPT(GPTConfig(5, context=4, dim=8, layers=1, heads=2))
        >>> model(torch.tensor([[0, 1, 2]])).shape
        torch.Size([1, 3, 5])
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with isolated_seed(seed):
            self.table = nn.Parameter(_TABLE * torch.randn(config.vocabulary, config.dim))
            self.positions = nn.Parameter(_POSITIONS * torch.randn(config.context, config.dim))
            self.blocks = nn.ModuleList(_Block(config.dim, config.heads) for _ in range(config.layers))
            self.norm = nn.LayerNorm(config.dim)
            self.readout = nn.Linear(config.dim, config.vocabulary)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed characters: u = E[y] + P, the input of the first layer.

        Args:
            tokens: characters, ``(N, T)`` with T at most the context.

        Returns:
            Embeddings, ``(N, T, p)``.

        Raises:
            InputError: the tokens have another number of axes, or the window is longer than the context.
        """
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.config.context:
            raise InputError(
                f"tokens have shape {tuple(tokens.shape)}; they must be (N, T) with T <= {self.config.context}."
            )
        return F.embedding(tokens, self.table) + self.positions[: tokens.shape[1]]

    def forward(self, tokens: Tensor | None = None, *, u: Tensor | None = None) -> Tensor:
        """Compute the logits of the next character.

        Args:
            tokens: characters, ``(N, T)``.
            u: embeddings instead of characters, ``(N, T, p)``, as :meth:`embed` returns them.

        Returns:
            Logits, ``(N, T, V)``.

        Raises:
            InputError: both or neither are given.
        """
        if (tokens is None) == (u is None):
            given = "neither tokens nor u was" if u is None else "both tokens and u were"
            raise InputError(f"{given} given; pass either tokens or their embeddings u.")
        return self.forward_with_heads(self.embed(tokens) if tokens is not None else u)[0]  # type: ignore[arg-type]

    def forward_with_heads(self, u: Tensor) -> tuple[Tensor, list[Heads]]:
        """Compute the logits and the heads of every layer in one pass.

        Args:
            u: embeddings, ``(N, T, p)``.

        Returns:
            Logits, ``(N, T, V)``, and one :class:`Heads` per layer.
        """
        heads = []
        for block in self.blocks:
            u, own = block(u)
            heads.append(own)
        logits: Tensor = self.readout(self.norm(u))
        return logits, heads
