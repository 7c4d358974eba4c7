r"""The log-barrier as a penalty on any attention, from its queries, keys and values alone.

The variable is the query; keys and values, the token's own among them, are held fixed. *Per head*, in the head's own
space,

.. math::
    q_i \mapsto q_i - \sum_s \alpha_{is} v_s, \qquad J_i = I - c\,\mathrm{Cov}_i(v, k),

and *jointly* over heads, through W_O and W_Q, in the space of the tokens,

.. math::
    u_i \mapsto u_i - \sum_h W_O^h \sum_s \alpha^h_{is} v^h_s, \qquad
    J_i = I - \sum_h W_O^h\, \mathrm{Cov}^h_i(v, k)\, c W_Q^h .

Under a strict mask the second is the J_i of :class:`~probattn.attention.CausalAttention` to the last digit. Under the
usual inclusive mask it is not the Jacobian of a density of u, whose own key and value move with u_i; it is the exact
Jacobian of the map above. Derived here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn import blocks
from probattn.attention import Mask, require_mask
from probattn.barrier import BarrierKind, penalty_and_margin, require_penalty
from probattn.errors import InputError, require_share
from probattn.moments.operators import past_moments

__all__ = ["Penalty", "attention_penalty", "choose_positions"]


class Penalty(NamedTuple):
    """The barrier at some positions of a batch.

    Attributes:
        values: b, (batch, H, P); H is 1 where the heads are taken jointly.
        margins: the margin that the kind guards, (batch, H, P).
        positions: which, rising, (P,).
        valid: False on padding, (batch, P).
        length: T, of which the positions are a part.
        tokens: how many of the batch's tokens are no padding, a 0-dimensional tensor.
    """

    values: Tensor
    margins: Tensor
    positions: Tensor
    valid: Tensor
    length: int
    tokens: Tensor

    def total(self) -> Tensor:
        """Sum over tokens of the mean over heads; from a random subset, an unbiased estimate of it."""
        kept = torch.where(self.valid.unsqueeze(1), self.values, torch.zeros_like(self.values))
        return kept.sum() / self.values.shape[1] * (self.length / len(self.positions))

    def mean(self) -> Tensor:
        """The same for each token of the batch."""
        return self.total() / self.tokens


def choose_positions(length: int, share: float, device: torch.device | None = None) -> Tensor:
    """A random subset of the positions 0..length-1 in rising order; each position has the same chance.

    Args:
        length: T.
        share: part of the positions, in (0, 1]; at least one position is taken. 1 takes all and draws nothing.
        device: of the result.

    Returns:
        (P,), from torch's global random state, which checkpointing replays and trainers save.

    Raises:
        InputError: share outside (0, 1].

    Example:
        >>> choose_positions(4, 1.0)
        tensor([0, 1, 2, 3])
    """
    require_share("positions", share)
    if share == 1:
        return torch.arange(length, device=device)
    return torch.randperm(length, device=device)[: max(1, round(share * length))].sort().values


def attention_penalty(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kind: BarrierKind = "one_sided",
    scale: float | None = None,
    causal: Mask | None = "inclusive",
    window: int | None = None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    softcap: float | None = None,
    positions: float | Tensor = 1.0,
    output: Tensor | None = None,
    query_map: Tensor | None = None,
    sharpness: float = 10.0,
) -> Penalty:
    r"""The penalty of an attention at all of its positions or at a random part of them.

    Args:
        query: q as it enters the logits (after rotation and normalisation), (batch, H, T, r).
        key: k, (batch, K, S, r), K dividing H: heads may share keys, which need not be repeated. S > T where keys of
            earlier tokens come from a cache; the last T of the S are those of the queries.
        value: v, (batch, K, S, dv).
        kind: see :func:`~probattn.barrier.log_barrier`.
        scale: c; None: 1 / sqrt(r).
        causal: a position sees itself and what is before it ("inclusive"), or only what is before it ("strict"); None:
            ``mask`` alone decides.
        window: a position sees the last so many tokens, itself included; None: all.
        mask: which tokens a position may see, (batch or 1, H or 1, T, S): boolean, or added to the logits.
        padding: False on padding, (batch, T); such positions have no penalty and do not count as tokens. It does not
            hide their keys: the mask does that.
        softcap: tau where the logits are capped at tau tanh(l / tau).
        positions: share of the positions to evaluate, drawn anew in each call, or their indices in rising order (of a
            random subset, if the sums are to be unbiased).
        output: W_O, (p, H dv), as in the weight of a linear layer, to take the heads jointly; needs ``query_map``.
        query_map: W_Q, (H r, p).
        sharpness: of the ``smooth`` kind.

    Returns:
        A :class:`Penalty`, as often differentiable as its kind. Float32 where the inputs have less precision. Time
        O(P S r dv) for each head and, for each position and head, a determinant of size r (jointly, of the smaller of
        p, H r and H dv). Memory linear in T; derivatives beyond the first take O(P S).

    Raises:
        InputError: axes that do not fit, named; an unknown kind or mask; a batch of padding only; no square block,
            where dv differs from r and the heads are not taken jointly.

    Example:
        >>> k = torch.tensor([-1.0, 1.0, 0.0]).view(1, 1, 3, 1)
        >>> penalty = attention_penalty(torch.zeros(1, 1, 3, 1), k, 0.5 * k, causal="strict", scale=1.0)
        >>> round(float(penalty.values[0, 0, 2]), 6)  # -log(1 - 0.5 Var), the variance of -1 and 1
        0.693147
    """
    require_penalty(kind, sharpness)
    _require_shapes(query, key, value, mask, padding, causal)
    joint = output is not None or query_map is not None
    heads, length, rank = query.shape[-3:]
    groups, seen, dim = key.shape[1], key.shape[2], value.shape[-1]
    scale = rank**-0.5 if scale is None else scale
    chosen = positions if isinstance(positions, Tensor) else choose_positions(length, positions, query.device)
    whole = len(chosen) == length

    def shown(part: Tensor, axis: int) -> Tensor:
        return part if whole else part.index_select(axis, chosen)

    wide = torch.promote_types(query.dtype, torch.float32)
    rows = shown(query, 2).unflatten(1, (groups, heads // groups)).movedim(2, 3)  # (batch, K, P, g, r)
    place = chosen + (seen - length)
    limit = torch.full_like(place, seen) if causal is None else place + (causal == "inclusive")
    first = torch.zeros_like(place) if window is None else (place - (window - 1)).clamp(min=0)
    if mask is not None:
        if mask.dtype != torch.bool:  # libraries write "never" as the lowest number, which is another one when widened
            mask = mask.to(wide).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
        mask = shown(mask, 2)
    # A head's own block is c Cov, which is linear in the values: there are fewer of these to multiply.
    value = value.to(wide) if joint else scale * value.to(wide)
    moments = past_moments(rows.to(wide), key.to(wide), value, first, limit, mask=mask, scale=scale, softcap=softcap)
    cov = moments.covariance.movedim(3, 2).flatten(1, 2)  # (batch, H, P, dv, r)
    with torch.autocast(query.device.type, enabled=False):
        if joint:
            factors = _through_output(cov, output, query_map, scale)
            matrix = blocks.mean_jacobian(factors) if kind == "singular_value" else blocks.sylvester_core(factors)
            matrix, size = matrix.unsqueeze(1), factors.output.shape[-2]  # (batch, 1, P, m, m)
        elif dim != rank:
            raise InputError(
                f"value has {dim} features and query {rank}: a head's own block is not square; pass output and "
                "query_map to take the heads jointly."
            )
        else:
            matrix, size = cov, rank
        values, margins = penalty_and_margin(matrix, size, kind, sharpness)
    if padding is None:
        valid = torch.ones(len(query), len(chosen), dtype=torch.bool, device=query.device)
        tokens = torch.tensor(len(query) * length, device=query.device)
    else:
        valid, tokens = shown(padding.bool(), 1), padding.bool().sum()
    return Penalty(values, margins.detach(), chosen, valid, length, tokens)


def _through_output(
    cov: Tensor, output: Tensor | None, query_map: Tensor | None, scale: float
) -> blocks.JacobianFactors:
    heads, dim, rank = cov.shape[1], cov.shape[-2], cov.shape[-1]
    if output is None or query_map is None:
        raise InputError("the heads are taken jointly through both output and query_map; pass the two.")
    if output.shape != (query_map.shape[-1], heads * dim) or query_map.shape[0] != heads * rank:
        raise InputError(
            f"output has shape {tuple(output.shape)} and query_map {tuple(query_map.shape)}; they must be (p, "
            f"{heads * dim}) and ({heads * rank}, p)."
        )
    return blocks.JacobianFactors(
        cov,
        scale * query_map.to(cov.dtype).unflatten(0, (heads, rank)),  # (H, r, p)
        output.to(cov.dtype).unflatten(1, (heads, dim)).movedim(1, 0),  # (H, p, dv)
        None,
    )


def _require_shapes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, causal: Mask | None
) -> None:
    if causal is not None:
        require_mask(causal)
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
        raise InputError(f"{shapes}: they must be (batch, H, T, r), (batch, K, S, r) and (batch, K, S, dv).")
    if query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1] or query.shape[2] > key.shape[2]:
        raise InputError(f"{shapes}: batch and rank must agree, and S be at least T.")
    if 0 in query.shape or 0 in value.shape or query.shape[1] % key.shape[1]:
        raise InputError(f"{shapes}: no axis may be empty, and the heads of the keys must divide those of the queries.")
    batch, heads, length, _ = query.shape
    if mask is not None:
        wanted = (batch, heads, length, key.shape[2])
        fits = mask.dim() == 4 and mask.shape[2:] == wanted[2:]
        if not fits or any(size not in (1, full) for size, full in zip(mask.shape, wanted, strict=True)):
            raise InputError(f"mask has shape {tuple(mask.shape)}; it must be {wanted}, with 1 for batch or heads.")
    if padding is not None:
        if padding.shape != (batch, length):
            raise InputError(f"padding has shape {tuple(padding.shape)}; it must be {(batch, length)}.")
        if not torch.compiler.is_compiling() and not bool(padding.any()):
            raise InputError(
                f"padding of shape {tuple(padding.shape)} has no token in it; drop batches of padding only."
            )
