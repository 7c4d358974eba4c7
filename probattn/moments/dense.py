"""Attention weights and moments of the past under them, written out: pure functions, stable in the corners."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SUPPORTED", "attention_weights", "dense_moments", "median", "past_weights", "scaled_dot", "scaled_product"]

SUPPORTED = (torch.float32, torch.float64)
"""The precisions in which log-determinants are offered."""


def attention_weights(query: Tensor, key: Tensor, visible: Tensor | None = None) -> Tensor:
    r"""Softmax weights :math:`\alpha_{is} \propto \exp(q_i \cdot k_s)`; zero for a row that sees no token.

    Args:
        query: c q, already scaled, ``(*batch, Q, r)``.
        key: k, ``(*batch, S, r)``.
        visible: which s the row i may see, boolean (Q, S); None: all of them.

    Returns:
        ``(*batch, Q, S)``. Stable for logits of any finite size: the row's maximum is subtracted before the
        exponential. Where all logits of a row are -inf, the weights are NaN.

    Example:
        >>> attention_weights(torch.zeros(1, 1), torch.zeros(2, 1))
        tensor([[0.5000, 0.5000]])
    """
    logits = query @ key.mT  # (*batch, Q, S)
    if visible is None:
        return torch.softmax(logits, dim=-1)
    some = visible.any(-1, keepdim=True)
    # A row that sees nothing stays free of NaN, in its derivatives too.
    logits = logits.masked_fill(~visible, -torch.inf).masked_fill(~some, 0.0)
    return torch.softmax(logits, dim=-1).masked_fill(~some, 0.0)


def scaled_product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product whose sums do not overflow: entries beyond the range of the numbers become large finite ones.

    Args:
        left: ``(*batch, m, r)``.
        right: ``(*batch, r, n)``.

    Returns:
        ``(*batch, m, n)``, differentiable in both. NaN and infinity in a row or column make its entries NaN.

    Example:
        >>> scaled_product(torch.tensor([[1e30, 1.0]]), torch.tensor([[2e30, 3.0], [1.0, 4.0]]))
        tensor([[4.2535e+37, 3.0000e+30]])
    """
    row, column = _size(left, -1), _size(right, -2)
    return (left / row) @ (right / column) * _within_range(row * column, left.shape[-1])


def scaled_dot(left: Tensor, right: Tensor) -> Tensor:
    """Scalar products of vectors, ``(*batch, r)`` each, as :func:`scaled_product` forms them, ``(*batch, 1)``."""
    sizes = _size(left, -1), _size(right, -1)
    dots = (left / sizes[0] * (right / sizes[1])).sum(-1, keepdim=True)
    return dots * _within_range(sizes[0] * sizes[1], left.shape[-1])


def _size(vectors: Tensor, axis: int) -> Tensor:
    size = vectors.detach().abs().amax(axis, keepdim=True)
    return size.where(size > 0, 1.0)


def _within_range(size: Tensor, terms: int) -> Tensor:
    return size.clamp(max=torch.finfo(size.dtype).max / (4 * terms))


def past_weights(logits: Tensor, first: Tensor, limit: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax weights of rows that see the tokens first_i <= s < limit_i which the mask allows.

    Args:
        logits: (b, K, P g, S), rows of a position together.
        first: (P,), as in :func:`probattn.moments.operators.past_moments`.
        limit: (P,).
        mask: (b or 1, K g or 1, P, S).

    Returns:
        alpha, (b, K, P g, S), and the logarithm of the sum of a row's exponentials, (b, K, P g); 0 and -inf where a row
        sees nothing.
    """
    group = logits.shape[-2] // max(1, len(first))
    token = torch.arange(logits.shape[-1], device=logits.device)
    visible = (token < limit[:, None]) & (token >= first[:, None])  # (P, S)
    visible = visible.repeat_interleave(group, dim=0)  # (P g, S)
    if mask is not None:
        if mask.shape[1] > 1:
            mask = mask.unflatten(1, (logits.shape[1], group)).movedim(2, 3).flatten(2, 3)  # (b, K, P g, S)
        else:
            mask = mask.repeat_interleave(group, dim=2)  # (b, 1, P g, S)
        if mask.dtype == torch.bool:
            visible = visible & mask
        else:
            logits = logits + mask
            visible = visible & (mask > torch.finfo(mask.dtype).min / 2)  # libraries write "never" as the lowest
    some = visible.any(-1, keepdim=True)
    # A row that sees nothing stays free of NaN, in its derivatives too.
    logits = logits.masked_fill(~visible, -torch.inf).masked_fill(~some, 0.0)
    alpha = torch.softmax(logits, dim=-1)
    # Where all logits are -inf the weights are NaN, and so is this: it is not a row that sees nothing.
    log_sum = torch.logsumexp(logits, dim=-1)
    log_sum = log_sum.masked_fill(log_sum.isneginf(), torch.nan).masked_fill(~some.squeeze(-1), -torch.inf)
    return alpha.masked_fill(~some, 0.0), log_sum


def dense_moments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    origin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance, offset and log-sum of :func:`probattn.moments.operators.origin_moments`, written out.

    Time and memory O(B K g P S) and more: for derivatives beyond the first, and to compare with.

    Args:
        query: q, (B, K, P, g, r).
        key: k, (B, K, S, r).
        value: v, (B, K, S, dv).
        first: (P,).
        limit: (P,).
        mask: (B or 1, K g or 1, P, S); None: everything is allowed.
        scale: c.
        softcap: tau; 0: logits are not capped.
        origin: point that means and log-sums are measured from, (B, K, P, g, dv + r), a constant.
    """
    # Changes no covariance and keeps digits: the median is far from few of the tokens, whatever the first one is.
    centre_value, centre_key = median(value), median(key)
    value = value - centre_value
    rows = scale * query.flatten(2, 3)  # (B, K, P g, r)
    if softcap:  # bends the logits: the keys cannot be moved
        bent = torch.tanh(rows @ key.mT / softcap)
        alpha, log_sum = past_weights(softcap * bent, first, limit, mask)
        weights, centre_key = alpha * (1 - bent.square()), torch.zeros_like(centre_key)
    else:
        key = key - centre_key
        weights, log_sum = past_weights(rows @ key.mT, first, limit, mask)
        alpha = weights
    products = (value.unsqueeze(-1) * key.unsqueeze(-2)).flatten(-2)  # (B, K, S, dv r)
    second = (weights @ products).unflatten(-1, (value.shape[-1], key.shape[-1]))  # (B, K, P g, dv, r)
    mean_value, mean_key = alpha @ value, weights @ key
    seen = ~log_sum.detach().isneginf()
    covariance = second - mean_value.unsqueeze(-1) * mean_key.unsqueeze(-2)
    shift = torch.cat([centre_value, centre_key], -1) - origin.flatten(2, 3)  # (B, K, P g, dv + r)
    mean = torch.cat([mean_value, mean_key], -1) + shift
    covariance, mean = covariance.where(seen[..., None, None], 0.0), mean.where(seen.unsqueeze(-1), 0.0)
    log_sum = log_sum + (rows * shift[..., value.shape[-1] :]).sum(-1).where(seen, 0.0)
    covariance, mean, log_sum = (part.unflatten(2, query.shape[2:4]) for part in (covariance, mean, log_sum))
    return covariance, mean, log_sum


def median(tokens: Tensor) -> Tensor:
    """Median of each feature over the tokens, ``(*batch, 1, features)``, a constant; zero where there is no token."""
    tokens = tokens.detach()
    return torch.nanmedian(tokens, dim=-2, keepdim=True).values if tokens.shape[-2] else tokens.sum(-2, keepdim=True)
