r"""Shares of each head and of each token of the past in what brings a token to the boundary.

The block of a layer is a sum over heads h and over the tokens s that a token i sees,

.. math::
    M_i = \sum_h \Bigl( \sum_{s \le i} M_i^{hs} + A_i^h \Bigr), \qquad
    M_i^{hs} = O_i'^h\, c\, \alpha_{is} (v_s - \bar v_i)(\sigma_{is} k_s - \bar k_i)^T Q_i'^h,
    \qquad \bar k_i = \sum_s \alpha_{is} \sigma_{is} k_s,

with A_i^h for the token's own value and key, and so is the derivative of a margin by the gains of these parts,
:math:`\langle G, M_i^{hs} \rangle` with :math:`G = \partial(\text{margin}) / \partial M_i`. A positive share moves
the margin up as that part is turned up, a negative one moves it down. Keys and values are measured from their means, so
that no share depends on the basis of a head, nor on a bias of keys or values that the network does not see. Derived
here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn import blocks
from probattn.errors import InputError
from probattn.hf.layers import AttentionLayer
from probattn.hf.layers.sublayer import Projected, Sublayer, project
from probattn.hf.margins import Kind
from probattn.numerics import linalg

__all__ = ["MarginGradient", "Shares", "margin_gradient", "past_shares"]

_STEPS = 3  # of inverse iteration beside an eigenvalue that is known: each gains many digits
_ALIKE = 1e-4  # how near a known eigenvalue is taken to be, relative to its size or one


class Shares(NamedTuple):
    """Shares of the parts of a block in a derivative by the block.

    Attributes:
        past: of the covariance of values and keys, by head and by the token of the past that carries it, ``(H, T)``;
            the token itself is among them, and those that it does not see have zero.
        own: of what the token's own value and key do, by head, ``(H,)``.
    """

    past: Tensor
    own: Tensor

    def heads(self) -> Tensor:
        """Total share of each head, ``(H,)``."""
        return self.past.sum(-1) + self.own


class MarginGradient(NamedTuple):
    """A margin of one block and its derivative by the block.

    Attributes:
        margin: the margin, 0-dimensional.
        gradient: G = d margin / dM, ``(p, p)``; NaN where the margin has no derivative.
    """

    margin: Tensor
    gradient: Tensor


def margin_gradient(
    block: Tensor, kind: Kind, *, update: bool = False, eigenvalue: float | None = None
) -> MarginGradient:
    r"""Margin of a block J = I - s M, s = 1 for the generator and -1 for the update, and its derivative by M.

    .. math::
        G = -s\, J^{-T} \;(\log|\det J|), \qquad G = -s\, y x^T \;(\sigma_{\min}), \qquad
        G = -s\, \mathrm{Re}\, \frac{\bar w\, r^T}{w^* r} \;(\text{eigenvalues})

    with the singular vectors J x = sigma y of the smallest singular value, and the left and right eigenvectors w, r of
    s M at the eigenvalue of the margin.

    Args:
        block: M, ``(p, p)``; float64 is worth its price for eigenvectors.
        kind: as in :func:`probattn.hf.margins`.
        update: whether the map is u + mu, with J = I + M.
        eigenvalue: a real eigenvalue of s M that is known already, to single precision; for the margins of eigenvalues.

    Returns:
        :class:`MarginGradient`. Time O(p^3), a tenth of it with a known eigenvalue.

    Raises:
        InputError: an unknown kind, or a block without a real eigenvalue for the spectral margin.

    Example:
        >>> margin, gradient = margin_gradient(torch.diag(torch.tensor([0.5, 0.25])).double(), "sigma_min")
        >>> margin, gradient.diagonal()
        (tensor(0.5000, dtype=torch.float64), tensor([-1., -0.], dtype=torch.float64))
    """
    sign = -1.0 if update else 1.0
    change = sign * block
    whole = torch.eye(len(block), dtype=block.dtype, device=block.device) - change
    if kind == "logabsdet":
        _, value = linalg.slogdet(whole)
        return MarginGradient(value, -sign * linalg.inverse(whole, check=False).mT)
    if kind == "sigma_min":
        left, values, right = torch.linalg.svd(whole)
        return MarginGradient(values[-1], -sign * torch.outer(left[:, -1], right[-1]))
    if kind not in ("spectral", "complex"):
        raise InputError(f"kind is {kind!r}; use one of 'logabsdet', 'sigma_min', 'spectral', 'complex'.")
    if eigenvalue is None:
        found = _eigenvalue(change, kind)
    else:
        found = torch.tensor(eigenvalue, dtype=block.dtype, device=block.device)
    found, right, left = _eigenvectors(change, found)
    share = (torch.outer(left.conj(), right) / (left.conj() @ right)).real
    return MarginGradient(1 - found.real, -sign * share)


def past_shares(layer: AttentionLayer, u: Tensor, row: int, gradient: Tensor) -> Shares:
    r"""Shares of heads and of past tokens in a derivative by the block, :math:`\langle G, M_i^{hs} \rangle`.

    Args:
        layer: the attention sublayer, on one sequence (without batch axes).
        u: tokens, ``(T, p)``, in the layer's precision.
        row: position i of the block.
        gradient: G, ``(p, p)``, such as from :func:`margin_gradient`.

    Returns:
        :class:`Shares`; together they are the inner product of G and M_i. Time O(p^2 H dv + H T r dv).

    Raises:
        InputError: a row that is not there, or tokens with a batch axis.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from probattn.hf import attention_layer
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> layer, u = attention_layer(LlamaForCausalLM(config), 0), torch.randn(4, 8)
        >>> past_shares(layer, u, 2, torch.eye(8)).past.shape
        torch.Size([2, 4])
    """
    if u.dim() != 2 or not 0 <= row < len(u):
        raise InputError(f"u has shape {tuple(u.shape)} and row is {row}; give tokens (T, p) and a position from 0.")
    rows = torch.tensor([row], device=u.device)
    factors = layer.mean_and_factors(u, rows).factors
    sublayer, heads = layer.sublayer, layer.heads
    group = heads // sublayer.groups
    # <G, O' B N'> = <O'^T G N'^T, B>: the derivative by the heads' own maps.
    inner = gradient if factors.output_norm is None else factors.output_norm.pullback(gradient.mT.unsqueeze(0))[0].mT
    inner = factors.output.flatten(1).mT @ inner  # (H dv, p)
    inner = inner if factors.norm is None else factors.norm.pushforward(inner.mT.unsqueeze(0))[0].mT
    inner = inner.unflatten(0, (heads, -1))  # (H, dv, p)

    own_value = factors.own_weight[0] * (inner * factors.value.repeat_interleave(group, 0)).sum((1, 2))
    own_key = factors.own_key[0].unsqueeze(1) @ factors.key.repeat_interleave(group, 0)  # b W_K, (H, 1, p)
    own = own_value + (factors.own_value[0] * (inner * own_key).sum(-1)).sum(-1)

    positions = torch.arange(len(u), device=u.device) if layer.positions is None else layer.positions
    tokens = project(sublayer, u.unsqueeze(0), positions.unsqueeze(0))
    query_side = (inner @ factors.query.mT).mT  # (H, r, dv): columns are directions of the query before norm and turn
    if sublayer.query_norm is not None:
        raw = tokens.raw_query[0, :, row].flatten(0, 1)  # (H, r)
        query_side = sublayer.query_norm.jacobian(raw).pushforward(query_side)
    by_query = query_side.mT  # (H, dv, r)
    if tokens.rotation is not None:
        by_query = tokens.rotation.at(rows)(by_query)

    weight, slope = _weights(layer, sublayer, tokens, row)  # (H, T) each
    key = slope.unsqueeze(-1) * tokens.key[0].repeat_interleave(group, 0)  # (H, T, r)
    value = tokens.value[0].repeat_interleave(group, 0)  # (H, T, dv)
    key, value = (part - weight.unsqueeze(1) @ part for part in (key, value))
    return Shares(sublayer.scale * weight * ((value @ by_query) * key).sum(-1), own)


def _weights(layer: AttentionLayer, sublayer: Sublayer, tokens: Projected, row: int) -> tuple[Tensor, Tensor]:
    """Weights of one position and slopes of the cap, ``(H, T)`` each."""
    query, key = tokens.query[0, :, row], tokens.key[0]  # (K, g, r), (K, T, r)
    length = key.shape[1]
    # A constant changes no weight; keys of language models share a large one.
    centre = key.mean(1, keepdim=True) if sublayer.softcap is None else torch.zeros_like(key[:, :1])
    logits = (sublayer.scale * query @ (key - centre).mT).flatten(0, 1)  # (H, T)
    slope = torch.ones_like(logits)
    if sublayer.softcap is not None:
        bent = torch.tanh(logits / sublayer.softcap)
        logits, slope = sublayer.softcap * bent, 1 - bent.square()
    if layer.visible is None:
        seen = torch.arange(length, device=key.device)
        shown = (seen <= row) & (seen > row - (sublayer.window or length))
    else:
        shown = layer.visible[row].to(key.device)
    weight: Tensor = logits.masked_fill(~shown, -torch.inf).softmax(-1)
    return weight, slope


def _eigenvalue(change: Tensor, kind: Kind) -> Tensor:
    """The eigenvalue of the margin: the largest real one, or the one of largest real part."""
    if kind == "complex":
        values = torch.linalg.eigvals(change)
        first: Tensor = values[values.real.argmax()]
        return first
    largest = blocks.largest_real_eigenvalue(change, len(change))
    if not bool(largest.isfinite()):
        raise InputError("the block has no real eigenvalue, and its spectral margin no derivative.")
    return largest


def _eigenvectors(change: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An eigenvalue beside a known one, its right and its left eigenvector, by inverse iteration from both sides."""
    kind = torch.complex128 if near.is_complex() and float(near.imag) != 0 else change.dtype
    near = near.to(kind) if kind.is_complex else near.real
    size = len(change)
    # Off the eigenvalue itself, where the system is singular, and nearer to it than to others.
    shifted = change.to(kind) - (near + 1e-7 * (1 + near.abs())) * torch.eye(size, dtype=kind, device=change.device)
    start = torch.randn(size, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(shifted)
    inverse = linalg.inverse(shifted, check=False)
    right, left = start, start
    for _ in range(_STEPS):
        right, left = inverse @ right, inverse.mH @ left
        right, left = right / right.norm(), left / left.norm()
    right, left = right.squeeze(-1), left.squeeze(-1)
    value = (left.conj() @ (change.to(kind) @ right)) / (left.conj() @ right)
    if not bool((value - near).abs() <= _ALIKE * (1 + near.abs())):  # two that coincide, or none there
        return near, torch.full_like(right, torch.nan), left
    return value, right, left
