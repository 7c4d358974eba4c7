"""Phase diagram of bounded memory on the line: where the mean of an attractive process returns to zero.

``python -m probattn.inference.studies.bounded_phase FILE.png`` draws it: exponents of mean field over radius and
contraction, with those of simulated paths beside them. No random number enters mean field; the paths have seed 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from probattn.attention import CausalAttention
from probattn.errors import InputError
from probattn.models.bounded_limit import bounded_limit
from probattn.models.bounded_run import bounded_run
from probattn.plotting.style import COLOURS, finish, panel

__all__ = ["mean_field_exponents", "plot_phases", "simulated_exponent"]

_SIMULATED = (0.3, 0.6, 0.9)


def mean_field_exponents(radii: Sequence[float], contractions: Sequence[float]) -> NDArray[np.float64]:
    """Exponents lambda of the mean in mean field, noise of variance 1.

    Args:
        radii: radii rho.
        contractions: contractions kappa.

    Returns:
        ``(radii, contractions)``; NaN where the stationary map folds.
    """
    return np.array([[_exponent(kappa, radius) for kappa in contractions] for radius in radii])


def simulated_exponent(radius: float, kappa: float, *, sequences: int = 16, last: int = 16_000) -> float:
    """Exponent lambda by the fall of the root mean square of the mean of paths, from a sixteenth of their length.

    Args:
        radius: rho.
        kappa: contraction, below 1.
        sequences: number of paths.
        last: their length, a multiple of 16.
    """
    run = bounded_run(_line(kappa, radius), 1.0, [last // 16, last], sequences=sequences)
    fell = run.mean[1].square().mean() / run.mean[0].square().mean()
    return 1 + 0.5 * math.log(float(fell)) / math.log(16)


def plot_phases(radii: Sequence[float], contractions: Sequence[float]) -> Figure:
    """Draw the exponents against the contraction, one curve per radius, with those of simulated paths.

    Args:
        radii: radii rho, in units of the noise.
        contractions: contractions kappa.
    """
    figure, axis = panel(None, (6.4, 4.4))
    found = mean_field_exponents(radii, contractions)
    for k, radius in enumerate(radii):
        colour = COLOURS[k % len(COLOURS)]
        axis.plot(contractions, found[k], color=colour, label=f"ρ = {radius:g} σ")
        simulated = [simulated_exponent(radius, kappa) for kappa in _SIMULATED]
        axis.plot(_SIMULATED, simulated, "o", color=colour)
    axis.axhline(1.0, color="black", linewidth=1, linestyle=":")
    axis.axvline(1.0, color="black", linewidth=1, linestyle=":")
    finish(axis, "contraction κ", "exponent λ of the mean, n to the power λ − 1", legend=True)
    return figure


def _line(kappa: float, radius: float) -> CausalAttention:
    slope = torch.tensor([[kappa / radius**2]], dtype=torch.float64)
    return CausalAttention.from_qk_matrix(slope, memory_radius=radius)


def _exponent(kappa: float, radius: float) -> float:
    try:
        return bounded_limit(_line(kappa, radius), 1.0).growth
    except InputError:  # the stationary map folds
        return math.nan


if __name__ == "__main__":
    plot_phases((1.0, 1.5, 2.0, 4.0), np.linspace(0.1, 2.2, 22).tolist()).savefig(Path(sys.argv[1]), dpi=130)
