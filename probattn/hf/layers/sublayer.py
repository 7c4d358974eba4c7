r"""The parameters of one attention sublayer, as a family of models describes them, and the token-wise maps they define.

.. math::
    x_i = N(u_i), \quad q_i = R_i N_q(W_Q x_i + b_Q), \quad k_i = R_i N_k(W_K x_i + b_K), \quad v_i = W_V x_i + b_V,
    \qquad \mu_i = N_o\bigl(W_O [\bar v^1_i; \dots; \bar v^H_i] + b_O\bigr)

with the norms that an architecture has, and the identity for those that it has not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from probattn.hf.layers.scaling import HeadScaling
from probattn.hf.layers.tokenwise import Norm, Projection, Rotation

__all__ = ["Projected", "Sublayer", "averages_to_mean", "mapped", "project", "same_parts"]

_Tuple = TypeVar("_Tuple", bound=tuple[Any, ...])


class Sublayer(NamedTuple):
    """Parameters of an attention sublayer. Heads that share a key stand side by side: head h has the key h // g.

    Attributes:
        norm: in front of the projections; None: there is none.
        query: W_Q with its bias, H heads.
        key: W_K, K heads with H = K g.
        value: W_V, K heads.
        query_norm: on each query, before the rotation.
        key_norm: on each key.
        rotary: the model's rotary embedding: positions ``(1 or B, T)`` and a tensor for dtype and device -> cosine and
            sine, ``(1 or B, T, d)`` each; None: queries and keys are not rotated.
        scale: c.
        softcap: tau of logits tau tanh(l / tau); None: they are not capped.
        window: number of tokens that one sees, itself included; None: all up to itself.
        output: W_O, ``(p, H, dv)``.
        output_bias: ``(p,)``.
        output_norm: behind the output map.
        scaling: factors on the heads, one batch axis each; None: all one, the layer as it was trained.
    """

    norm: Norm | None
    query: Projection
    key: Projection
    value: Projection
    output: Tensor
    scale: float
    output_bias: Tensor | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    output_norm: Norm | None = None
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    softcap: float | None = None
    window: int | None = None
    scaling: HeadScaling | None = None

    @property
    def heads(self) -> int:
        """H."""
        return self.output.shape[1]

    @property
    def groups(self) -> int:
        """K, the number of heads that keys and values have."""
        return self.key.weight.shape[0]

    @property
    def dim(self) -> int:
        """Number of features of the stream."""
        return self.output.shape[0]


def mapped(function: Callable[[Tensor], Tensor], parts: _Tuple) -> _Tuple:
    """Apply a function to every tensor in nested named tuples.

    Args:
        function: of a tensor.
        parts: a named tuple of tensors, named tuples, and whatever else, which stays as it is.
    """
    found = [
        function(part) if isinstance(part, Tensor) else mapped(function, part) if isinstance(part, tuple) else part
        for part in parts
    ]
    return type(parts)(*found)


def same_parts(one: Any, other: Any) -> bool:
    """True if nested tuples hold equal tensors, rotary embeddings of the same module, and otherwise equal values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.shape, one.device) == (other.shape, other.device) and bool((one == other).all())
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same_parts, one, other))
    return bool(one == other)


class Projected(NamedTuple):
    """Queries, keys and values of a sequence.

    Attributes:
        query: q, rotated, ``(B, K, T, g, r)``.
        key: k, rotated, ``(B, K, T, r)``.
        value: v, ``(B, K, T, dv)``.
        raw_query: W_Q x + b_Q, before norm and rotation, ``(B, K, T, g, r)``.
        raw_key: W_K x + b_K, ``(B, K, T, r)``.
        rotation: cosine and sine, ``(1 or B, T, d)``; None: there is none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    raw_query: Tensor
    raw_key: Tensor
    rotation: Rotation | None


def project(sublayer: Sublayer, u: Tensor, positions: Tensor, rows: Tensor | None = None) -> Projected:
    """Queries, keys and values of tokens.

    Args:
        sublayer: the parameters.
        u: tokens, ``(B, T, p)``.
        positions: for the rotation, ``(1 or B, T)``, whole numbers.
        rows: numbers of the tokens whose queries are needed, ``(P,)``; None: all.

    Returns:
        :class:`Projected`, with P queries in the place of T where rows are given.
    """
    x = u if sublayer.norm is None else sublayer.norm(u)
    asking = x if rows is None else x[:, rows]
    raw_query = sublayer.query(asking).unflatten(1, (sublayer.groups, -1)).movedim(2, 3)  # (B, K, T or P, g, r)
    raw_key, value = sublayer.key(x), sublayer.value(x)  # (B, K, T, r), (B, K, T, dv)
    query = raw_query if sublayer.query_norm is None else sublayer.query_norm(raw_query)
    key = raw_key if sublayer.key_norm is None else sublayer.key_norm(raw_key)
    rotation = None
    if sublayer.rotary is not None:
        rotation = Rotation(*sublayer.rotary(positions, u))
        own = rotation if rows is None else rotation.at(rows)
        query, key = own.unsqueeze(1, 3)(query), rotation.unsqueeze(1)(key)
    if sublayer.scaling is not None:
        factor = sublayer.scaling.repeat(len(u)).inverse_temperature.unflatten(-1, (sublayer.groups, -1))  # (B, K, g)
        query = factor[:, :, None, :, None] * query
    return Projected(query, key, value, raw_query, raw_key, rotation)


def averages_to_mean(sublayer: Sublayer, average: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the heads' averages back into the stream.

    Args:
        sublayer: the parameters.
        average: vbar, ``(..., H, dv)``.

    Returns:
        mu and what the norm behind it was given, W_O vbar + b_O, ``(..., p)`` each; the same twice without such a norm
        and without factors on the heads.
    """
    scaling = None if sublayer.scaling is None else sublayer.scaling.repeat(len(average))
    if scaling is not None:
        average = average * scaling.gain[:, None, :, None]  # (B, P, H, dv)
    before = average.flatten(-2) @ sublayer.output.flatten(1).mT  # (..., p)
    before = before if sublayer.output_bias is None else before + sublayer.output_bias
    mean = before if sublayer.output_norm is None else sublayer.output_norm(before)
    return (mean if scaling is None else mean * scaling.share[:, None, None]), before
