r"""The past of a token in a layer: averages of the values, their covariance with the keys, and its own weight.

A token sees itself (the inclusive mask), the tokens before it, the last w of them in a window, or whatever a mask of
the caller's says. With logits :math:`l_{is} = c\, q_i \cdot k_s`, capped to :math:`\tau \tanh(l / \tau)` where the
architecture does so, and the cap's slope :math:`\sigma_{is} = 1 - \tanh^2(l_{is} / \tau)`,

.. math::
    \bar v_i = \sum_s \alpha_{is} v_s, \qquad
    C_i = \sum_s \alpha_{is} \sigma_{is} (v_s - \bar v_i) k_s^T, \qquad
    \frac{\partial \bar v_i}{\partial q_i} = c\, C_i, \quad
    \frac{\partial \bar v_i}{\partial k_i} = c\, \alpha_{ii} \sigma_{ii} (v_i - \bar v_i) q_i^T, \quad
    \frac{\partial \bar v_i}{\partial v_i} = \alpha_{ii} I .
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.hf.layers.sublayer import Projected, Sublayer
from probattn.moments.dense import past_weights
from probattn.moments.operators import past_moments

__all__ = ["Attended", "attend", "average"]

_LOGITS = 1 << 24  # how many logits may exist at a time


class Attended(NamedTuple):
    """Derivatives of the averages at some positions of a sequence.

    Attributes:
        average: vbar, ``(B, P, H, dv)``.
        covariance: c C, ``(B, P, H, dv, r)``.
        own_weight: alpha_ii, ``(B, P, H)``.
        own_slope: c alpha_ii sigma_ii (v_i - vbar_i), ``(B, P, H, dv)``.
    """

    average: Tensor
    covariance: Tensor
    own_weight: Tensor
    own_slope: Tensor


def attend(sublayer: Sublayer, tokens: Projected, rows: Tensor, mask: Tensor | None = None) -> Attended:
    """Averages of the past and their derivatives.

    Args:
        sublayer: the parameters.
        tokens: queries, keys and values of the sequence.
        rows: positions to evaluate, ``(P,)``, increasing.
        mask: tokens that each position sees, ``(1 or B, 1, T, T)`` boolean, instead of the past and the window.

    Returns:
        :class:`Attended`. Time O(B H P T r dv), memory O(B H P r dv).
    """
    first, limit, mask = _visible(sublayer, tokens, rows, mask)
    query, key, value = tokens.query[:, :, rows], tokens.key, tokens.value
    if sublayer.softcap is None:
        # A constant changes neither weights nor covariances. Keys of language models share a large offset, and that of
        # the first token, the sink of the attention, is far from it; measured from their mean they keep their digits.
        key = key - _offset(key)
    # The moments measure from the first token that they are given: one that nobody sees, at the offset.
    shown_key = torch.cat([torch.zeros_like(key[:, :, :1]), key], 2)
    shown_value = torch.cat([_offset(value), value], 2)
    shown_mask = None if mask is None else torch.nn.functional.pad(mask, (1, 0))
    covariance, means, log_sum = past_moments(
        query, shown_key, shown_value, first + 1, limit + 1, mask=shown_mask, scale=sublayer.scale,
        softcap=sublayer.softcap,
    )  # fmt: skip  # (B, K, P, g, dv, r), (B, K, P, g, dv + r), (B, K, P, g)
    mean_value = means[..., : value.shape[-1]]

    logits = sublayer.scale * (query * key[:, :, rows].unsqueeze(3)).sum(-1)  # (B, K, P, g)
    slope: float | Tensor = sublayer.scale
    if sublayer.softcap is not None:
        bent = torch.tanh(logits / sublayer.softcap)
        logits, slope = sublayer.softcap * bent, sublayer.scale * (1 - bent.square()).unsqueeze(-1)
    weight = (logits - log_sum).exp()
    if mask is not None:  # a token may not see itself, and one of padding nothing at all
        own = torch.gather(mask, 3, rows.view(1, 1, -1, 1).expand(mask.shape[0], 1, -1, 1))  # (1 or B, 1, P, 1)
        weight = torch.where(own, logits - log_sum, -torch.inf).exp()
    own_slope = slope * weight.unsqueeze(-1) * (value[:, :, rows].unsqueeze(3) - mean_value)

    heads = [_heads_last(part) for part in (mean_value, sublayer.scale * covariance, weight, own_slope)]
    return Attended(*heads)


def average(sublayer: Sublayer, tokens: Projected, rows: Tensor, mask: Tensor | None = None) -> Tensor:
    """Averages of the past alone, for some rows at a time.

    Args:
        sublayer: the parameters.
        tokens: queries, keys and values of the sequence.
        rows: positions to evaluate, ``(P,)``, increasing.
        mask: as in :func:`attend`.

    Returns:
        vbar, ``(B, P, H, dv)``, differentiable any number of times.
    """
    first, limit, mask = _visible(sublayer, tokens, rows, mask)
    batch, groups, length, group, _ = tokens.query.shape
    step = max(1, _LOGITS // max(1, batch * groups * group * length))
    found = []
    for part in torch.arange(len(rows), device=rows.device).split(step):
        seen = int(limit[part[-1]])
        query = tokens.query[:, :, rows[part]].flatten(2, 3)  # (B, K, R g, r)
        logits = sublayer.scale * query @ tokens.key[:, :, :seen].mT
        if sublayer.softcap is not None:
            logits = sublayer.softcap * torch.tanh(logits / sublayer.softcap)
        shown = None if mask is None else mask[:, :, part, :seen]
        alpha, _ = past_weights(logits, first[part], limit[part], shown)
        mean = alpha @ tokens.value[:, :, :seen]
        found.append(_heads_last(mean.unflatten(2, (len(part), group))))
    return torch.cat(found, 1)


def _visible(
    sublayer: Sublayer, tokens: Projected, rows: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """First token that a row sees, one more than the last, and what is allowed in between."""
    if mask is not None:
        return torch.zeros_like(rows), torch.full_like(rows, tokens.key.shape[2]), mask[:, :, rows]
    first = torch.zeros_like(rows) if sublayer.window is None else (rows + 1 - sublayer.window).clamp(min=0)
    return first, rows + 1, None


def _offset(tokens: Tensor) -> Tensor:
    """Mean of the tokens behind the first, ``(B, K, 1, r)``."""
    later = tokens[:, :, 1:] if tokens.shape[2] > 1 else tokens
    return later.detach().mean(2, keepdim=True)


def _heads_last(part: Tensor) -> Tensor:
    """From ``(B, K, P, g, ...)`` to ``(B, P, H, ...)``."""
    return part.movedim(2, 1).flatten(2, 3)
