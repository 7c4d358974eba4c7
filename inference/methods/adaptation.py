r"""Adaptation of NUTS in its warm-up: a step size and an inverse mass matrix for each chain, in Stan's windows.

A first stretch adapts the step size alone, windows that double in length estimate the covariance, and a last stretch
adapts the step size to the last estimate (Stan reference manual, "HMC algorithm parameters"; here the first takes 15 %
of the warm-up and the last 10 %).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["StepSize", "window_covariance", "window_ends"]


class StepSize:
    r"""Step sizes by dual averaging, of each chain on its own (Hoffman and Gelman, 2014, arXiv 1111.4246).

    .. math::
        \bar e_t = \Bigl(1 - \frac{1}{t + t_0}\Bigr) \bar e_{t-1} + \frac{\delta - a_t}{t + t_0}, \quad
        \log \epsilon_t = \mu - \frac{\sqrt t}{\gamma} \bar e_t, \quad
        \log \bar\epsilon_t = t^{-\kappa} \log \epsilon_t + (1 - t^{-\kappa}) \log \bar\epsilon_{t-1}

    with t_0 = 10, gamma = 0.05, kappa = 0.75 and mu = log(2 epsilon_0).

    Args:
        initial: step sizes epsilon_0 to begin with, ``(C,)``.
        target: acceptance statistic delta to aim at.

    Attributes:
        count: number of updates t.
        averaged: mean of the logarithms, weighted towards the last ones, ``(C,)``.
    """

    def __init__(self, initial: Tensor, target: float) -> None:
        self.target, self.count = target, 0
        self.centre = (2 * initial).log()
        self.error = torch.zeros_like(initial)
        self.averaged = initial.log()

    def update(self, acceptance: Tensor) -> Tensor:
        """Take in the acceptance statistics of a transition, ``(C,)``.

        Returns:
            Step sizes of the next transition, ``(C,)``.
        """
        self.count += 1
        rate = 1 / (self.count + 10)
        self.error = (1 - rate) * self.error + rate * (self.target - acceptance)
        log_step = self.centre - math.sqrt(self.count) / 0.05 * self.error
        decay = self.count**-0.75
        self.averaged = decay * log_step + (1 - decay) * self.averaged
        return log_step.exp()

    def final(self) -> Tensor:
        """Step sizes to sample with, ``(C,)``."""
        return self.averaged.exp()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        return dict(vars(self))

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        vars(self).update(content)


def window_ends(warmup: int) -> list[int]:
    """Transitions at which the stretches of the warm-up end, but for the last.

    Args:
        warmup: number of transitions of the whole warm-up.

    Returns:
        The end of the first stretch, then the ends of the windows.

    Example:
        >>> window_ends(1000)
        [150, 200, 300, 500, 900]
    """
    first, last = math.ceil(0.15 * warmup), warmup - math.ceil(0.1 * warmup)
    ends, width = [first], max(10, math.ceil(0.05 * warmup))
    while ends[-1] < last:
        end = ends[-1] + width
        width *= 2
        ends.append(last if end + width > last else end)
    return ends


def window_covariance(window: Tensor, chains_per_metric: int, before: Tensor) -> Tensor:
    r"""Inverse mass matrices from the positions in a window.

    .. math:: \frac{n S + 5 \Sigma}{n + 5}

    with S the covariance of the n positions, and Sigma the matrix of before.

    Args:
        window: positions, ``(W, C, D)``.
        chains_per_metric: number of neighbouring chains whose positions are pooled; divides C.
        before: matrix to shrink towards, ``(C, D, D)``.

    Returns:
        ``(C, D, D)``.
    """
    count, chains, dim = window.shape
    pools = chains // chains_per_metric
    pooled = window.reshape(count, pools, chains_per_metric, dim).transpose(0, 1).reshape(pools, -1, dim)
    centred = pooled - pooled.mean(1, keepdim=True)
    size = pooled.shape[1]
    covariance = centred.mT @ centred / (size - 1)
    return (size * covariance.repeat_interleave(chains_per_metric, dim=0) + 5 * before) / (size + 5)
