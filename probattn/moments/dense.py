"""Attention weights and moments of the past under them, written out: pure functions, stable in the corners."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SUPPORTED", "attention_weights", "dense_moments", "norm_bound", "past_weights", "refined"]


def attention_weights(query: Tensor, key: Tensor, visible: Tensor | None = None) -> Tensor:
    r"""Softmax weights :math:`\alpha_{is} \propto \exp(q_i \cdot k_s)`; zero for a row that sees no token.

    Args:
        query: c q, already scaled, (*batch, Q, r).
        key: k, (*batch, S, r).
        visible: which s the row i may see, boolean (Q, S); None: all of them.

    Returns:
        (*batch, Q, S). Stable for logits of any finite size: the row's maximum is subtracted before the exponential.

    Example:
        >>> attention_weights(torch.zeros(1, 1), torch.zeros(2, 1))
        tensor([[0.5000, 0.5000]])
    """
    logits = query @ key.mT  # (*batch, Q, S)
    if visible is None:
        return torch.softmax(logits, dim=-1)
    # The lowest finite number instead of -inf: a row that sees nothing stays free of NaN and is zeroed below.
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1).masked_fill(~visible, 0.0)


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
    log_sum = torch.logsumexp(logits, dim=-1).masked_fill(~some.squeeze(-1), -torch.inf)
    return alpha.masked_fill(~some, 0.0), log_sum


def dense_moments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`probattn.moments.operators.past_moments` returns, written out: any derivative of it is one of torch's.

    Time and memory O(B K g P S) and more: for derivatives beyond the first, and to compare with.
    """
    value_0, key_0 = value[:, :, :1].detach(), key[:, :, :1].detach()
    value = value - value_0  # changes no covariance, and keeps digits
    rows = scale * query.flatten(2, 3)  # (B, K, P g, r)
    if softcap:  # bends the logits: the keys cannot be moved
        bent = torch.tanh(rows @ key.mT / softcap)
        alpha, log_sum = past_weights(softcap * bent, first, limit, mask)
        weights, key_0 = alpha * (1 - bent.square()), torch.zeros_like(key_0)
    else:
        key = key - key_0
        weights, log_sum = past_weights(rows @ key.mT, first, limit, mask)
        alpha = weights
    products = (value.unsqueeze(-1) * key.unsqueeze(-2)).flatten(-2)  # (B, K, S, dv r)
    second = (weights @ products).unflatten(-1, (value.shape[-1], key.shape[-1]))  # (B, K, P g, dv, r)
    mean_value, mean_key = alpha @ value, weights @ key
    seen = ~log_sum.detach().isneginf()
    covariance = second - mean_value.unsqueeze(-1) * mean_key.unsqueeze(-2)
    mean = torch.cat([mean_value, mean_key], -1) + torch.cat([value_0, key_0], -1)
    covariance, mean = covariance.where(seen[..., None, None], 0.0), mean.where(seen.unsqueeze(-1), 0.0)
    log_sum = log_sum + (rows @ key_0.mT).squeeze(-1).where(seen, 0.0)
    covariance, mean, log_sum = (part.unflatten(2, query.shape[2:4]) for part in (covariance, mean, log_sum))
    return covariance, mean, log_sum


# What |vbar| |kbar| ||W_O|| ||c W_Q|| may be, after the shift, before a block loses more digits than it can spare: with
# epsilons of 1e-7 and 2e-16 the error of J stays near 1e-4 and 2e-12.
_CANCELLATION = {torch.float32: 1e3, torch.float64: 1e4}
_ROWS = 4096

# The precisions that log-determinants are offered in.
SUPPORTED = tuple(_CANCELLATION)


def norm_bound(matrix: Tensor) -> Tensor:
    """Upper bound on the spectral norm, sqrt(norm_1 norm_inf); one for the identity, and cheap."""
    size = matrix.abs()
    return (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt()


def _anywhere(mask: Tensor) -> bool:
    try:
        return bool(mask.any())
    except RuntimeError:  # under torch.func.vmap a tensor has no truth value; the rows stay as they are
        return False


def refined(
    covariance: Tensor,
    mean: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    gain: Tensor,
) -> Tensor:
    """Covariances of the past, those that lost digits computed again about their own means.

    A covariance is the difference of two products about the first token, which is causal to the bit, as a mean is not.
    Where a row's mean lies far from that token, the difference cancels.

    Args:
        covariance: C, (B, K, P, g, dv, r), of :func:`probattn.moments.operators.past_moments` without mask and cap.
        mean: [vbar | kbar] of the same.
        query: c q, already scaled, (B, K, P, g, r).
        key: k, (B, K, S, r).
        value: v, (B, K, S, dv).
        first: (P,).
        limit: (P,).
        gain: what C will be multiplied by, (B, K); says how much rounding matters.

    Returns:
        C; under ``torch.func.vmap`` as it was. O(S (r + dv)) memory a row, for those rows only.
    """
    away = mean.detach() - torch.cat([value, key], -1)[:, :, :1, None].detach()  # (B, K, P, g, dv + r)
    sizes = [part.norm(dim=-1) for part in away.split([value.shape[-1], key.shape[-1]], -1)]
    seen = (limit > first)[:, None]  # a row that sees nothing has no mean
    lost = (sizes[0] * sizes[1] * gain[..., None, None] > _CANCELLATION[mean.dtype]) & seen  # (B, K, P, g)
    if not _anywhere(lost):
        return covariance
    token = torch.arange(key.shape[-2], device=key.device)
    index = lost.nonzero(as_tuple=True)
    fresh = []
    for chunk in zip(*(axis.split(_ROWS) for axis in index), strict=True):
        v, k = value[chunk[:2]], key[chunk[:2]]  # (R, S, dv), (R, S, r)
        logits = query[chunk].unsqueeze(-2) @ (k - k[:, :1]).mT  # (R, 1, S)
        visible = (token >= first[chunk[2], None]) & (token < limit[chunk[2], None])  # (R, S)
        alpha = logits.masked_fill(~visible.unsqueeze(-2), -torch.inf).softmax(-1)
        fresh.append((alpha.mT * (v - alpha @ v)).mT @ (k - alpha @ k))
    return covariance.index_put(index, torch.cat(fresh))
