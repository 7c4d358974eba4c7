"""Attention weights and the covariances of the past under them: pure functions of tensors, stable in the corners."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SUPPORTED", "attention_weights", "norm_bound", "weighted_covariance"]


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


def weighted_covariance(weights: Tensor, value: Tensor, key: Tensor, gain: float | Tensor = 1.0) -> Tensor:
    r"""Cov_i(v, k) = sum_s alpha_is v_s k_s^T - vbar_i kbar_i^T, for all i in one product with the v_s k_s^T.

    Args:
        weights: alpha, (*batch, Q, S).
        value: v, (*batch, S, dv).
        key: k, (*batch, S, r).
        gain: what the covariance will be multiplied by, (*batch, 1); says how much rounding matters.

    Returns:
        (*batch, Q, dv, r); zero for a row without a past. Time O(Q S r dv), memory O((Q + S) r dv). Rows whose mean
        lies so far from the first token that the difference of the two products would cancel are computed again about
        their own mean, except under ``torch.func.vmap``.
    """
    # A covariance does not change when a constant is subtracted, but the difference of two large products loses digits
    # when the tokens share a large offset. The first token is such a constant and, unlike the mean, keeps the result
    # causal to the bit.
    value = value - value[..., :1, :].detach()
    key = key - key[..., :1, :].detach()
    products = (value.unsqueeze(-1) * key.unsqueeze(-2)).flatten(-2)  # (*batch, S, dv r)
    second: Tensor = (weights @ products).unflatten(-1, (value.shape[-1], key.shape[-1]))  # (*batch, Q, dv, r)
    mean_value, mean_key = weights @ value, weights @ key
    result = second - mean_value.unsqueeze(-1) * mean_key.unsqueeze(-2)
    size = mean_value.detach().norm(dim=-1) * mean_key.detach().norm(dim=-1) * gain  # (*batch, Q)
    lost = size > _CANCELLATION[weights.dtype]
    return _recomputed(result, lost, weights, value, key) if _anywhere(lost) else result


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


def _recomputed(result: Tensor, rows: Tensor, weights: Tensor, value: Tensor, key: Tensor) -> Tensor:
    """The covariances of some rows again, about their own means: two passes, O(S (r + dv)) memory a row."""
    index = rows.nonzero(as_tuple=True)  # batch axes, then the row
    value, key = (part.expand(*rows.shape[:-1], *part.shape[-2:]) for part in (value, key))
    fresh = []
    for chunk in zip(*(axis.split(_ROWS) for axis in index), strict=True):
        alpha = weights[chunk].unsqueeze(-2)  # (R, 1, S)
        v, k = value[chunk[:-1]], key[chunk[:-1]]  # (R, S, dv), (R, S, r)
        fresh.append((alpha.mT * (v - alpha @ v)).mT @ (k - alpha @ k))
    return result.index_put(index, torch.cat(fresh))
