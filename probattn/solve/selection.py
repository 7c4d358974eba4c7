r"""Choosing one of several solutions by a named rule.

===============  =====================================================================================
rule             the next token is
===============  =====================================================================================
unique           the only solution; more than one is an error
uniform          one of the n solutions, each with probability 1 / n
smallest_step    the solution u with the smallest \|u - eps\| = \|mu(u)\|
nearest_mean     the solution nearest to the plain mean of the values, :math:`\sum_h \sum_s o^h_s / n`
===============  =====================================================================================
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.solve.context import Context

__all__ = ["Selection", "choose", "require_selection"]

Selection = Literal["unique", "uniform", "smallest_step", "nearest_mean"]


def require_selection(selection: str) -> None:
    """Refuse a rule that does not exist.

    Raises:
        InputError: naming those that do.
    """
    if selection not in get_args(Selection):
        raise InputError(f"selection is {selection!r}; use one of {', '.join(map(repr, get_args(Selection)))}.")


def choose(
    context: Context, noise: Tensor, roots: Tensor, valid: Tensor, selection: Selection, uniform: Tensor | None
) -> Tensor:
    """Index of the solution that a rule takes.

    Args:
        context: the past.
        noise: eps, ``(*sample, *batch, p)``.
        roots: solutions, ``(K, *sample, *batch, p)``.
        valid: which of them are solutions, each counted once, ``(K, *sample, *batch)``.
        selection: the rule; "unique" takes what "smallest_step" does.
        uniform: uniform random numbers in [0, 1) for the rule "uniform", ``(*sample, *batch)``.

    Returns:
        ``(*sample, *batch)``; 0 where nothing is valid.
    """
    if selection == "uniform":
        if uniform is None:
            uniform = torch.rand(valid.shape[1:], dtype=noise.dtype, device=noise.device)
        rank = (uniform * valid.sum(0)).floor()  # of the valid ones, which is taken
        taken: Tensor = (valid.cumsum(0) - 1 == rank) & valid
        return taken.to(torch.int8).argmax(0)
    aim = context.values.mean(-2).sum(-2) if selection == "nearest_mean" and context.length else noise
    distance: Tensor = torch.linalg.vector_norm(roots - aim, dim=-1)
    return distance.masked_fill(~valid, torch.inf).argmin(0)
