r"""A small ordinary transformer on characters that returns its attention heads.

.. math::
    u = E[y] + P, \qquad x \leftarrow x + W_O\,\mathrm{Attn}(\mathrm{LN}\,x), \quad
    x \leftarrow x + W_2\,\mathrm{GELU}(W_1\,\mathrm{LN}\,x), \qquad \mathrm{logits} = R\,\mathrm{LN}\,x

Unlike :class:`~probattn.models.language.LanguageModel` it has no prior and no sample sites. The study of robustness
trains it with and without penalties. With a memory radius the attention is the one of theory section 11, on
:math:`\varphi(x)` in place of the first layer norm, and can be a contraction in its own token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probattn.attention import CausalAttention
from probattn.errors import InputError, require_at_least, require_positive
from probattn.numerics.ball import onto_ball
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
        memory_radius: radius rho of the ball onto which every attention maps the stream, in place of its layer norm and
            without biases of queries, keys and values; None keeps the norm.
        contraction: limit, below 1, of the contraction of every attention in its own token, for every past; needs a
            memory radius. None sets no limit.
    """

    vocabulary: int
    context: int = 64
    dim: int = 64
    layers: int = 2
    heads: int = 4
    memory_radius: float | None = None
    contraction: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "dim", "layers", "heads"):
            require_at_least(name, getattr(self, name))
        if self.memory_radius is not None:
            require_positive("memory_radius", self.memory_radius)
        if self.contraction is not None:
            if not 0 < self.contraction < 1:
                raise InputError(f"contraction is {self.contraction}; it must lie strictly between 0 and 1.")
            if self.memory_radius is None:
                raise InputError(f"contraction is {self.contraction}, which needs memory_radius; give one.")
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

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.radius, self.limit = config.memory_radius, config.contraction
        self.attention_norm = nn.LayerNorm(dim) if self.radius is None else nn.Identity()
        self.perceptron_norm = nn.LayerNorm(dim)
        # Biases would add to queries what the contraction does not know of.
        self.projections = nn.Linear(dim, 3 * dim, bias=self.radius is None)
        self.output = nn.Linear(dim, dim)
        self.perceptron = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def attention(self) -> CausalAttention:
        """The attention of a layer with a memory radius; its mean and the output bias are added to the stream."""
        query, key, value = self.projections.weight.unflatten(0, (3, self.heads, -1)).unbind()
        output = self.output.weight.unflatten(1, (self.heads, -1)).movedim(1, 0)  # (H, p, p / H)
        free = CausalAttention(
            query, key, value, output, mask="inclusive", memory_radius=self.radius, validate_args=False
        )
        return free if self.limit is None else free.scaled_to(self.limit, shrink=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Heads]:
        seen = self.attention_norm(x) if self.radius is None else onto_ball(x, x.new_tensor(self.radius))
        parts = self.projections(seen).chunk(3, dim=-1)
        own = Heads(*(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts))
        mean = F.scaled_dot_product_attention(own.query, own.key, own.value, is_causal=True)
        mean = mean.transpose(1, 2).flatten(2)
        if self.limit is None:
            x = x + self.output(mean)
        else:  # the contraction scales the output map
            x = x + F.linear(mean, self.attention().output.movedim(0, 1).flatten(1), self.output.bias)
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
        >>> bounded = GPTConfig(5, context=4, dim=8, layers=1, heads=2, memory_radius=3.0, contraction=0.5)
        >>> bool(CharacterGPT(bounded).attentions()[0].contraction < 0.5)
        True
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with isolated_seed(seed):
            self.table = nn.Parameter(_TABLE * torch.randn(config.vocabulary, config.dim))
            self.positions = nn.Parameter(_POSITIONS * torch.randn(config.context, config.dim))
            self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
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

    def attentions(self) -> list[CausalAttention]:
        """Return the attention of every layer as a value, for a model with a memory radius.

        Returns:
            One attention per layer, under the inclusive mask; its mean, without the output bias, is what the layer's
            attention adds to the residual stream.

        Raises:
            InputError: a model without a memory radius.
        """
        if self.config.memory_radius is None:
            raise InputError("the layers of this model have a norm instead of a memory_radius; give it a radius.")
        return [block.attention() for block in self.blocks if isinstance(block, _Block)]
