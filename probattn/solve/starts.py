"""Places from which to search for solutions: values that the mean can come near, far from each other."""

from __future__ import annotations

import torch
from torch import Tensor

from probattn.solve.context import Context

__all__ = ["STARTS", "hull_points", "vertices"]

_STARTS = 8
_LINE_STARTS = 17
STARTS = 1 + max(_LINE_STARTS, 2 * _STARTS)
"""Largest number of candidates that a search holds per token."""


def vertices(context: Context) -> Tensor:
    """Values that the mean can come near: on a line a grid, else far-apart tokens and points between them.

    Args:
        context: the past; where each of m candidates has a past of its own, for each.

    Returns:
        ``(starts, *batch, p)``, or ``(starts, m, *batch, p)`` with pasts of their own; the same at every call.
    """
    rows = 1 if context.visible is None else len(context.visible)
    if context.length == 0:
        found = context.values.new_empty(0, rows, *context.batch_shape, context.values.shape[-1])
    else:
        visible = context.visible
        if visible is None:
            visible = torch.ones(1, context.length, dtype=torch.bool, device=context.values.device)
        found = _grid(context, visible) if context.values.shape[-1] == 1 else _corners(context, visible)
    return found.squeeze(1) if context.visible is None else found


def hull_points(context: Context, count: int) -> Tensor:
    """Random points of the hull of what the mean can be, half of them corners with each head on a token of its own.

    Args:
        context: the past, with at least one token.
        count: number of points.

    Returns:
        ``(count, *batch, p)``, the same at every call.
    """
    weights = _hull_shares(count, *context.values.shape[-3:-1]).to(context.values)
    return (weights @ context.values).sum(-3).movedim(-2, 0)


def _grid(context: Context, visible: Tensor) -> Tensor:
    """From the least to the largest mean in equal steps, ``(starts, m, *batch, 1)``."""
    line = context.values.mT  # (*batch, H, 1, n)
    low = line.masked_fill(~visible, torch.inf).amin(-1).sum(-2)  # (*batch, m)
    high = line.masked_fill(~visible, -torch.inf).amax(-1).sum(-2)
    share = torch.linspace(0, 1, _LINE_STARTS, dtype=low.dtype, device=low.device)
    return (low + (high - low) * share.view(-1, *[1] * low.dim())).movedim(-1, 1).unsqueeze(-1)


def _corners(context: Context, visible: Tensor) -> Tensor:
    """Tokens far apart, each the farthest from those before it, and points inside, ``(starts, m, *batch, p)``."""
    values = context.values.sum(-3)  # all heads on one token, (*batch, n, p)
    corner = (visible / visible.sum(-1, keepdim=True)).to(values) @ values  # first the centre, (*batch, m, p)
    chosen, distance = [], values.new_empty(0)
    for step in range(min(_STARTS, context.length)):
        away = torch.cdist(corner, values, compute_mode="donot_use_mm_for_euclid_dist").masked_fill(~visible, -1.0)
        distance = away if step < 2 else torch.minimum(distance, away)  # (*batch, m, n)
        index = distance.argmax(-1, keepdim=True)
        corner = values.gather(-2, index.expand(*index.shape[:-1], values.shape[-1]))
        chosen.append(corner)
    corners = torch.stack(chosen)  # (starts, *batch, m, p)
    if context.length == 1:
        return corners.movedim(-2, 1)
    shares = [_hull_shares(_STARTS, context.values.shape[-3], int(n)) for n in visible.sum(-1)]
    shares = [torch.nn.functional.pad(share, (0, context.length - share.shape[-1])) for share in shares]
    weights = torch.stack(shares, dim=2).flatten(1, 2).to(values)  # (H, starts m, n)
    inside = (weights @ context.values).sum(-3).unflatten(-2, (_STARTS, len(shares))).movedim(-3, 0)
    return torch.cat([corners, inside]).movedim(-2, 1)


def _hull_shares(count: int, heads: int, length: int) -> Tensor:
    """Convex combinations of the tokens, (H, count, n)."""
    generator = torch.Generator().manual_seed(length)  # the same search every time
    share = torch.rand(count, heads, length, generator=generator, dtype=torch.float64)
    corners = torch.nn.functional.one_hot(share.argmax(-1), length).double()
    share = -share.log() / -share.log().sum(-1, keepdim=True)
    return torch.where(torch.arange(count)[:, None, None] % 2 == 0, corners, share).movedim(0, 1)
