r"""Growth of the Jacobian of a trained attention with the length of a text (Castin, Ablin and Peyre 2024, 2312.14820).

They find the local Lipschitz constant of an attention layer, which is the norm of its whole Jacobian
:math:`\partial\mu/\partial x` over all tokens x, to grow about as :math:`n^{1/4}` on text and at worst as
:math:`\sqrt n`. The tokens are what enters the projections, behind the norm. Measured here for them, for them with the
first token held fixed, which most tokens of a trained model attend to (an attention sink), and for the residual stream
in front of the norm; beside the *diagonal blocks* :math:`M_i = \partial\mu_i/\partial u_i`, which are what determinants
and margins are made of and of which nothing is published. Under a causal mask a block does not know how long the text
goes on: its growth is that with its own position.

The rule, fixed when two layers had been seen on two texts of 64 tokens: the published exponent is confirmed if that of
all normed tokens, averaged over layers, lies within 0.1 of 1/4, and no layer's interval lies above 1/2.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probattn.errors import InputError, require_at_least
from probattn.hf.directional import token_map
from probattn.hf.layers import AttentionLayer, attention_layer
from probattn.hf.layers.sublayer import project
from probattn.hf.streams import residual_streams
from probattn.inference.runtime.progress import log_step
from probattn.inference.studies.published.record import Array, Estimate, estimate, power_fit

__all__ = ["Growth", "block_norms", "jacobian_norm", "measure_growth", "without_norm"]

_LOG = logging.getLogger(__name__)
_TOLERANCE = 2e-3  # relative change per round at which a norm is taken as found
_ROUNDS = 60


class Growth(NamedTuple):
    """Norms of one layer over lengths.

    Attributes:
        layer: number of the layer, from 0.
        lengths: n, (K,).
        normed: norm of the whole Jacobian in the normed tokens, ``(texts, K)``.
        held: the same with the first token held fixed.
        stream: norm of the whole Jacobian in the residual stream, ``(texts, K)``.
        blocks: median norm of the blocks at positions from n / 2 to n, ``(texts, K)``.
    """

    layer: int
    lengths: Array
    normed: Array
    held: Array
    stream: Array
    blocks: Array

    def exponent(self, name: str) -> Estimate:
        """Exponent of "normed", "held", "stream" or "blocks" in n: its mean over texts with the interval."""
        return estimate(power_fit(self.lengths, getattr(self, name)))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in self._asdict().items()
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Growth:
        """Read what :meth:`as_dict` returned."""
        return cls(content["layer"], *(np.asarray(content[name], dtype=float) for name in cls._fields[1:]))


def jacobian_norm(mean: Callable[[Tensor], Tensor], u: Tensor, *, seed: int = 0) -> float:
    r"""Spectral norm of the whole Jacobian of a map at a point, by power iteration on :math:`D^\top D`.

    Args:
        mean: differentiable map of tensors of the shape of u to itself.
        u: the point.
        seed: random seed of the first direction.

    Returns:
        The norm, from below, to about 1 %. One forward-mode and one reverse-mode product per round.

    Raises:
        InputError: 60 rounds that do not settle.

    Example:
        >>> round(jacobian_norm(lambda x: torch.tensor([3.0, 1.0]) * x, torch.ones(2)), 3)
        3.0
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(u.shape, generator=generator, dtype=u.dtype)
    v = v / torch.linalg.vector_norm(v)
    pull = torch.func.vjp(mean, u)[1]
    before = after = 0.0
    for _ in range(_ROUNDS):
        moved = torch.func.jvp(mean, (u,), (v,))[1]
        (v,) = pull(moved)
        after = math.sqrt(float(torch.linalg.vector_norm(v)))  # |D^T D v| = norm^2 at the fixed point
        if after == 0:
            return 0.0
        v = v / torch.linalg.vector_norm(v)
        if abs(after - before) <= _TOLERANCE * after:
            return after
        before = after
    raise InputError(f"{_ROUNDS} rounds leave the norm of the Jacobian changing by {abs(after - before) / after:.1%}.")


def block_norms(layer: AttentionLayer, u: Tensor, *, rounds: int = 20, seed: int = 0) -> Tensor:
    r"""Spectral norms of the diagonal blocks M_i of a layer, by power iteration at all tokens at once.

    Args:
        layer: attention of a language model.
        u: tokens, ``(T, p)``.
        rounds: number of rounds.
        seed: random seed of the first directions.

    Returns:
        Norms from below, ``(T,)``. Time O(H T (T + p)) per round times the size of a head.
    """
    sublayer, rows = layer.sublayer, torch.arange(len(u))
    tokens = project(sublayer, u.unsqueeze(0), rows.unsqueeze(0))
    blocks = token_map(sublayer, u.unsqueeze(0), tokens, rows, None)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1, len(u), 1, u.shape[-1], generator=generator, dtype=u.dtype)  # (B, P, n, p)
    size = torch.zeros(len(u))
    for _ in range(rounds):
        z = z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp(min=1e-30)
        z = blocks.transposed_product(blocks.product(z))
        size = torch.linalg.vector_norm(z, dim=-1).flatten().sqrt()
    return size


def without_norm(layer: AttentionLayer) -> AttentionLayer:
    """The same layer on tokens behind its norm."""
    return replace(layer, read=lambda: layer.read()._replace(norm=None))


@torch.no_grad()
def measure_growth(
    model: Any, ids: Tensor, layers: Sequence[int], lengths: Sequence[int] = (16, 32, 64, 128, 256, 512)
) -> list[Growth]:
    """Measure the norms of some layers on the beginnings of some texts.

    Args:
        model: causal model of ``transformers``, on the CPU.
        ids: tokens of the texts, ``(N, T)``, at least two texts and T at least the longest length.
        layers: numbers of the layers.
        lengths: n, at least two, increasing.

    Returns:
        One :class:`Growth` per layer. Two minutes per layer for five texts of 512 tokens of SmolLM2-135M, on one core.

    Raises:
        InputError: too few texts, or texts that are too short.
    """
    require_at_least("texts", len(ids), 2)
    if ids.shape[1] < lengths[-1]:
        raise InputError(f"the texts have {ids.shape[1]} tokens, fewer than the {lengths[-1]} of the longest length.")
    streams, _ = residual_streams(model, ids)
    found: list[Growth] = []
    for number in layers:
        layer = attention_layer(model, number).detach()
        inner, norm = without_norm(layer), layer.sublayer.norm
        normed, held, stream, blocks = (np.empty((len(ids), len(lengths))) for _ in range(4))
        for text, u in enumerate(streams[number]):
            x = u if norm is None else norm(u)
            size = block_norms(layer, u[: lengths[-1]])
            for k, n in enumerate(lengths):
                normed[text, k] = jacobian_norm(inner.mean, x[:n])
                held[text, k] = jacobian_norm(_holding_first(inner, x[:1]), x[1:n])
                stream[text, k] = jacobian_norm(layer.mean, u[:n])
                blocks[text, k] = float(size[n // 2 : n].median())
            log_step(_LOG, f"layer {number}, text {text + 1} of {len(ids)}", len(found) + 1, len(layers))
        found.append(Growth(number, np.asarray(lengths, dtype=float), normed, held, stream, blocks))
    return found


def _holding_first(layer: AttentionLayer, first: Tensor) -> Callable[[Tensor], Tensor]:
    """The means at all tokens but the first, as a map of these tokens."""
    return lambda x: layer.mean(torch.cat([first, x]))[1:]
