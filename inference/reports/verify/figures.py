"""Figures of the verification report that belong to no claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from torch import Tensor

from probattn import plotting
from probattn.barrier import BarrierKind, log_barrier, stability_margin
from probattn.folds.mass import next_token_density, scalar_mass
from probattn.inference.claims.claim import Subject
from probattn.inference.reports.verify.text import support_positions
from probattn.models.corpus import Corpus
from probattn.models.scalar import scalar_attention
from probattn.solve.context import Context

__all__ = ["critical_slope", "draw_figures"]

_LINE = 8
_FACTORS = (0.7, 1.6)  # slopes of the two panels, in units of the one at which the first fold appears


def draw_figures(subject: Subject, corpus: Corpus, history: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    """Draw the figures of the report that belong to no claim.

    Args:
        subject: the fitted model and held-out text.
        corpus: the text, for its vocabulary.
        history: metrics of the fit at each evaluation, by name.

    Returns:
        Figures by file name, without suffix.
    """
    attention, u = subject.attention, subject.tokens(1)[0]
    kinds = ("determinant", "spectral", "singular_value")
    margins = {kind: stability_margin(attention, u, kind).numpy() for kind in kinds}  # type: ignore[arg-type]
    characters = [corpus.vocabulary[index] for index in subject.inputs[0].tolist()]
    support = support_positions(characters, margins["singular_value"])
    line = _line(subject)
    critical = critical_slope(line)
    return {
        "margins": plotting.plot_margins(margins, characters, support),
        "conditional": plotting.plot_conditional([_panel(line, factor * critical, critical) for factor in _FACTORS]),
        "mass": _mass_figure(line, critical),
        "barriers": _barrier_figure(),
        "training": plotting.plot_training(history),
    }


def critical_slope(tokens: Tensor) -> float:
    r"""Find the slope a at which the residual map of a one-dimensional past first folds, a sup_x Var_x = 1.

    The supremum runs over all tilts x = a u of the past, so it does not depend on a. Derived here.

    Args:
        tokens: the past, (n,).

    Returns:
        The critical slope.

    Example:
        >>> round(critical_slope(torch.tensor([-1.0, 1.0], dtype=torch.float64)), 6)
        1.0
    """
    context = Context.of(scalar_attention(1.0), tokens.unsqueeze(-1))  # the slope of its mean is the variance

    def minus_variance(tilt: float) -> float:
        return -float(context.line_cumulants(torch.tensor([tilt], dtype=tokens.dtype))[1])

    spread = float(tokens.max() - tokens.min())
    grid = np.linspace(-40 / spread, 40 / spread, 801)
    best = grid[int(np.argmin([minus_variance(tilt) for tilt in grid]))]
    step = grid[1] - grid[0]
    result = minimize_scalar(minus_variance, bounds=(best - step, best + step), method="bounded")
    return float(-1 / result.fun)


def _line(subject: Subject) -> Tensor:
    """Project the first characters on the first principal axis of their embeddings, standardised, at most (8,)."""
    u = subject.tokens(1)[0, :_LINE]
    centred = u - u.mean(0)
    line: Tensor = centred @ torch.linalg.svd(centred, full_matrices=False)[2][0]
    return (line - line.mean()) / line.std()


def _panel(tokens: Tensor, a: float, critical: float, noise_scale: float = 0.7) -> dict[str, Any]:
    past = Context.of(scalar_attention(a), tokens.unsqueeze(-1))
    reach = float(tokens.abs().max()) + 3 * noise_scale
    u = torch.linspace(-reach, reach, 1200, dtype=torch.float64)
    mass = scalar_mass(past, noise_scale)
    plain = next_token_density(past, u, noise_scale, jacobian=False)
    return {
        "title": f"{'no fold' if a < critical else 'folded'}: attention at {a / critical:.1f} of the boundary",
        "u": u.numpy(),
        "residual": (u - past.mean(u.unsqueeze(-1)).squeeze(-1)).numpy(),
        "density": next_token_density(past, u, noise_scale).abs().numpy(),
        "plain": plain.numpy(),
        "mass": mass.absolute,
        "plain_mass": scalar_mass(past, noise_scale, jacobian=False).signed,
        "turning_points": mass.turning_points,
    }


def _mass_figure(tokens: Tensor, critical: float) -> Figure:
    slopes = np.linspace(0.2 * critical, 3 * critical, 40)
    pasts = [Context.of(scalar_attention(float(a)), tokens.unsqueeze(-1)) for a in slopes]
    return plotting.plot_mass(slopes, np.array([scalar_mass(past, 0.7).absolute for past in pasts]), critical)


def _barrier_figure() -> Figure:
    factor = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    tokens = torch.tensor([[-1.0], [1.0], [0.0]], dtype=torch.float64)
    kinds: tuple[BarrierKind, ...] = ("logdet", "one_sided", "smooth", "spectral", "singular_value")
    attention = scalar_attention(factor)
    values = {kind: log_barrier(attention, tokens, kind)[:, -1].numpy() for kind in kinds}
    return plotting.plot_barriers(factor.numpy(), 1.0, values)
