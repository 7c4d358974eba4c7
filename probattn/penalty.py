r"""The log-barrier as a penalty on any attention, from its queries, keys, values and the two maps around them.

The variable is the token u that makes the query; keys and values, the token's own among them, are held fixed:

.. math::
    u_i \mapsto u_i - \sum_h W_O^h \sum_s \alpha^h_{is} v^h_s, \qquad
    J_i = I - \sum_h W_O^h\, \mathrm{Cov}^h_i(v, k)\, c W_Q^h .

Under a strict mask this is the J_i of :class:`~probattn.attention.CausalAttention` to the last digit. Under the usual
inclusive mask it is not the Jacobian of a density of u, whose own key and value move with u_i; it is the exact Jacobian
of the map above. For the layers of language models, with everything that they do to a token, see
:func:`~probattn.hf.barrier.attach_barrier`. The heads are always taken together, through W_O and W_Q: I - c Cov of a
head alone would depend on the basis in which the head keeps its values, which the attention does not. Derived here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn import blocks
from probattn.barrier import BarrierKind, penalty_and_margin, require_penalty
from probattn.errors import InputError, require_axes, require_share, require_tensor
from probattn.interface import Mask, require_mask
from probattn.moments.operators import past_moments
from probattn.moments.refine import norm_bound

__all__ = ["Penalty", "attention_penalty", "choose_positions"]


class Penalty(NamedTuple):
    """The barrier at some positions of a batch.

    Attributes:
        values: b, (batch, P).
        margins: margin that the kind guards, (batch, P).
        positions: indices of the positions, rising, (P,).
        valid: False on padding, (batch, P).
        length: T, the number of positions of which these are a part.
        tokens: number of tokens of the batch that are not padding, a 0-dimensional tensor.
    """

    values: Tensor
    margins: Tensor
    positions: Tensor
    valid: Tensor
    length: int
    tokens: Tensor

    def total(self) -> Tensor:
        """Sum over tokens; from a random subset of positions, an unbiased estimate of it."""
        kept = torch.where(self.valid, self.values, torch.zeros_like(self.values))
        return kept.sum() * (self.length / len(self.positions))

    def mean(self) -> Tensor:
        """The total per token of the batch."""
        return self.total() / self.tokens


def choose_positions(length: int, share: float, device: torch.device | None = None) -> Tensor:
    """Random subset of the positions 0..length-1 in rising order, in which each position has the same chance.

    Args:
        length: T.
        share: part of the positions, in (0, 1]; at least one position is taken. 1 takes all and draws nothing.
        device: device of the result.

    Returns:
        (P,), from torch's global random state, which checkpointing replays and trainers save.

    Raises:
        InputError: share outside (0, 1].

    Example:
        >>> choose_positions(4, 1.0)
        tensor([0, 1, 2, 3])
    """
    require_share("share", share)
    if share == 1:
        return torch.arange(length, device=device)
    return torch.randperm(length, device=device)[: max(1, round(share * length))].sort().values


def attention_penalty(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_map: Tensor,
    *,
    kind: BarrierKind = "one_sided",
    scale: float | None = None,
    causal: Mask | None = "inclusive",
    window: int | None = None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    softcap: float | None = None,
    positions: Tensor | None = None,
    share: float = 1.0,
    sharpness: float = 10.0,
) -> Penalty:
    r"""Penalty of an attention at all of its positions or at a random part of them.

    Args:
        query: q as it enters the logits (after rotation and normalisation), (batch, H, T, r).
        key: k, (batch, K, S, r), K dividing H: heads may share keys, which need not be repeated. S > T where keys of
            earlier tokens come from a cache; the last T of the S are those of the queries.
        value: v, (batch, K, S, dv).
        output: W_O, (p, H dv), as in the weight of a linear layer.
        query_map: W_Q, (H r, p).
        kind: see :func:`~probattn.barrier.log_barrier`.
        scale: c; None: 1 / sqrt(r).
        causal: "inclusive" (a position sees itself and the tokens before it) or "strict" (only those before it); None:
            ``mask`` alone decides.
        window: number of the last tokens, itself included, that a position sees; None: all.
        mask: tokens that a position may see, (batch or 1, H or 1, T, S): boolean, or added to the logits.
        padding: False on padding, (batch, T); such positions have no penalty and do not count as tokens. It does not
            hide their keys: the mask does that.
        softcap: tau where the logits are capped at tau tanh(l / tau).
        positions: indices of the positions to evaluate, rising, (P,): a random subset, if the sums are to be unbiased;
            None: a random share of them.
        share: part of the positions, in (0, 1], drawn anew in each call by :func:`choose_positions`.
        sharpness: beta of the ``smooth`` kind.

    Returns:
        A :class:`Penalty`, differentiable to the same order as its kind; in float32 where the inputs have less
        precision. Time O(P S r dv) per head, and a determinant of size r per position and head (jointly, one of the
        smallest of p, H r and H dv per position). Memory linear in T; derivatives beyond the first take O(P S).

    Raises:
        InputError: axes that do not fit, named; an unknown kind or mask; positions that are not rising indices; a
            batch of padding only.

    Example:
        >>> k, one = torch.tensor([-1.0, 1.0, 0.0]).view(1, 1, 3, 1), torch.ones(1, 1)
        >>> penalty = attention_penalty(torch.zeros(1, 1, 3, 1), k, 0.5 * k, one, one, causal="strict", scale=1.0)
        >>> round(float(penalty.values[0, 2]), 6)  # -log(1 - 0.5 Var), the variance of -1 and 1
        0.693147
    """
    require_penalty(kind, sharpness)
    _require_shapes(query, key, value, mask, padding, causal)
    _require_positions(positions, share, query.shape[2])
    heads, length, rank = query.shape[-3:]
    groups, seen, dim = key.shape[1], key.shape[2], value.shape[-1]
    _require_maps(output, query_map, heads * dim, heads * rank)
    scale = rank**-0.5 if scale is None else scale
    chosen = choose_positions(length, share, query.device) if positions is None else positions
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
    gain = scale * norm_bound(output.detach().to(wide)) * norm_bound(query_map.detach().to(wide))
    moments = past_moments(
        rows.to(wide),
        key.to(wide),
        value.to(wide),
        first,
        limit,
        mask=mask,
        scale=scale,
        softcap=softcap,
        gain=gain.expand(1, 1),
    )
    cov = moments.covariance.movedim(3, 2).flatten(1, 2)  # (batch, H, P, dv, r)
    with torch.autocast(query.device.type, enabled=False):
        factors = blocks.JacobianFactors(
            cov,
            scale * query_map.to(wide).unflatten(0, (heads, rank)),  # (H, r, p)
            output.to(wide).unflatten(1, (heads, dim)).movedim(1, 0),  # (H, p, dv)
            None,
        )
        matrix = blocks.mean_jacobian(factors) if kind == "singular_value" else blocks.sylvester_core(factors)
        values, margins = penalty_and_margin(matrix, len(output), kind, sharpness)  # (batch, P)
    if padding is None:
        valid = torch.ones(len(query), len(chosen), dtype=torch.bool, device=query.device)
        tokens = torch.tensor(len(query) * length, device=query.device)
    else:
        valid, tokens = shown(padding.bool(), 1), padding.bool().sum()
    return Penalty(values, margins.detach(), chosen, valid, length, tokens)


def _require_maps(output: Tensor, query_map: Tensor, values: int, keys: int) -> None:
    for name, part in (("output", output), ("query_map", query_map)):
        require_tensor(name, part)
    if output.shape != (query_map.shape[-1], values) or query_map.shape[0] != keys:
        raise InputError(
            f"output has shape {tuple(output.shape)} and query_map {tuple(query_map.shape)}; they must be (p, "
            f"{values}) and ({keys}, p)."
        )


def _require_positions(positions: Tensor | None, share: float, length: int) -> None:
    if positions is None:
        return
    require_tensor("positions", positions)
    if share != 1:
        raise InputError(f"positions are given and share is {share}; pass one of the two.")
    if positions.dim() != 1 or not len(positions) or positions.is_floating_point() or positions.dtype == torch.bool:
        raise InputError(
            f"positions has shape {tuple(positions.shape)} and is {positions.dtype}; it must hold indices, (P,); a "
            "part of the positions at random is share."
        )
    if torch.compiler.is_compiling():
        return
    if not bool((positions.diff() > 0).all()) or int(positions[0]) < 0 or int(positions[-1]) >= length:
        shown = ", ".join(map(str, positions[:8].tolist())) + (", ..." if len(positions) > 8 else "")
        raise InputError(f"positions are {shown}; they must rise within 0..{length - 1}.")


def _require_shapes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, causal: Mask | None
) -> None:
    if causal is not None:
        require_mask(causal)
    for name, part in (("query", query), ("key", key), ("value", value)):
        require_tensor(name, part)
        if part.dim() != 4 or 0 in part.shape:
            raise InputError(f"{name} has shape {tuple(part.shape)}; it must have four axes, none of them empty.")
    batch, heads, length, rank = query.shape
    groups, seen = key.shape[1:3]
    require_axes("key", key, {"batch": batch, "heads": groups, "tokens": seen, "rank": rank})
    require_axes("value", value, {"batch": batch, "heads": groups, "tokens": seen, "features": value.shape[3]})
    if seen < length or heads % groups:
        raise InputError(
            f"query has {heads} heads of {length} tokens and key {groups} of {seen}; the heads of the keys must divide "
            "those of the queries, and no query may be without its key."
        )
    if mask is not None:
        require_tensor("mask", mask)
        allowed = ((1, batch), (1, heads), (length,), (seen,))
        if mask.dim() != 4 or any(size not in sizes for size, sizes in zip(mask.shape, allowed, strict=True)):
            wanted = (batch, heads, length, seen)
            raise InputError(f"mask has shape {tuple(mask.shape)}; it must be {wanted}, with 1 for batch or heads.")
    if padding is not None:
        require_tensor("padding", padding)
        if padding.shape != (batch, length):
            raise InputError(f"padding has shape {tuple(padding.shape)}; it must be {(batch, length)}.")
        if not torch.compiler.is_compiling() and not bool(padding.any()):
            raise InputError(
                f"padding of shape {tuple(padding.shape)} has no token in it; drop batches of padding only."
            )
