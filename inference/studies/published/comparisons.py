"""Measurements beside published numbers, one comparison per number, each with the rule by which they agree.

- A place or a size that is exact at finite n: to 1e-6 of the finite-n form derived here, of which the published one is
  the leading order.
- An exponent: the published value lies in the interval, or within 0.05 of ours; on a language model by the rule of
  :mod:`~probattn.inference.studies.published.lengths`.
- A ratio or a boundary: within four, or three, standard errors.
- A bound: never exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from probattn.inference.studies.published.critical import Transition, leading_sign_change, sign_change
from probattn.inference.studies.published.gaussian import Deviation
from probattn.inference.studies.published.lengths import Growth
from probattn.inference.studies.published.long_context import Selectivity
from probattn.inference.studies.published.record import Comparison, Estimate, estimate, power_fit
from probattn.inference.studies.published.sensitivity import LocalBound, softmax_norm, theta
from probattn.mean_field import CRITICAL

__all__ = [
    "EXACT",
    "compare_critical",
    "compare_gaussian",
    "compare_growth",
    "compare_selectivity",
    "compare_sensitivity",
    "finite_size_error",
    "over_layers",
]

EXACT = 1e-6  #: difference from the finite-n forms that counts as none


def finite_size_error(transitions: Sequence[Transition]) -> float:
    """Largest difference of measured transitions from their finite-n forms.

    Args:
        transitions: measurements.
    """
    errors = []
    for found in transitions:
        n = found.length
        errors += [
            abs(found.halfway - math.log(n - 1) / math.log(n)),
            abs(found.own_weight - n / (2 * n - 1)),
            abs(found.covariance / math.log(n) - (n / (2 * n - 1)) ** 2),
            abs(found.sign_at - sign_change(n)),
        ]
    return max(errors)


def compare_critical(transitions: Sequence[Transition]) -> list[Comparison]:
    """Compare places and sizes at the transition of critical attention scaling.

    Args:
        transitions: measurements, the largest n of cosine 0 among them.
    """
    last = max(transitions, key=lambda found: found.length)
    n, quarter = last.length, math.log(last.length) / 4
    agrees = finite_size_error(transitions) <= EXACT
    found = [
        Comparison(
            "critical_place",
            f"place of the transition over γ_c, by a half of the weight on the token itself, n = {n}",
            1.0,
            Estimate.exact(last.halfway),
            "2510.05554",
            agrees,
            "log(n − 1)/log n at finite n",
        ),
        Comparison(
            "critical_own_weight",
            f"weight of a token on itself at γ_c, n = {n}",
            0.5,
            Estimate.exact(last.own_weight),
            "derived here",
            agrees,
            "n/(2n − 1) at finite n",
        ),
        Comparison(
            "critical_covariance",
            f"c |Cov| at γ_c over (log n)/4, n = {n}",
            1.0,
            Estimate.exact(last.covariance / quarter),
            "derived here",
            agrees,
            "4n²/(2n − 1)² at finite n",
        ),
    ]
    for one in dict.fromkeys(found.length for found in transitions):
        at = next(found.sign_at for found in transitions if found.length == one)
        found.append(
            Comparison(
                f"critical_sign_{one}",
                f"place where det J changes sign over γ_c, n = {one}",
                leading_sign_change(one),
                Estimate.exact(at),
                "derived here",
                agrees,
                "1 − log log n/log n is the leading order; the next term, log(2γ/γ_c)/log n, falls off no faster",
            )
        )
    return found


def compare_selectivity(found: Sequence[Selectivity]) -> list[Comparison]:
    """Compare exponents of the selective scale.

    Args:
        found: one measurement per dimension.
    """
    rows = []
    for one in found:
        expected = 2 / (one.dim - 1)
        agrees = one.plain.holds(expected) or abs(one.plain.value - expected) <= 0.05
        rows.append(
            Comparison(
                f"selectivity_d{one.dim}",
                f"exponent of β* in n, keys on the sphere of R^{one.dim}",
                expected,
                one.plain,
                "2605.08505",
                agrees,
                f"with the leading correction of a finite n it is {one.corrected.value:.2f} "
                f"[{one.corrected.low:.2f}, {one.corrected.high:.2f}]",
            )
        )
    return rows


def compare_gaussian(deviations: Sequence[Deviation], boundary: Estimate) -> list[Comparison]:
    """Compare the error of the Gaussian limit with its prediction, and the boundary corrected by it with 4/27.

    Args:
        deviations: one measurement per exponent b^2 V.
        boundary: a sigma^2 at the boundary, corrected for finite n.
    """
    rows = []
    for one in deviations:
        half = (one.ratio.high - one.ratio.low) / 2
        rows.append(
            Comparison(
                f"gaussian_error_{one.exponent:g}",
                f"mean square error of the Gaussian limit over e^(b²V)(V + b²V²)/n, b²V = {one.exponent:g}, "
                f"n = {one.length}",
                1.0,
                one.ratio,
                "derived here",
                abs(one.ratio.value - 1) <= 2 * half,
                "the next order in 1/n; squares of e^(bx) have heavy tails",
            )
        )
    half = (boundary.high - boundary.low) / 2
    agrees = abs(boundary.value - CRITICAL) <= 3 / 1.96 * half
    rows.append(
        Comparison(
            "boundary", "aσ² at the boundary, corrected for finite n", CRITICAL, boundary, "derived here", agrees
        )
    )
    return rows


def compare_sensitivity(found: Sequence[LocalBound]) -> list[Comparison]:
    """Compare theta with the norm of a softmax, and covariances with the bound that it makes.

    Args:
        found: measurements of the bound.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, 9, generator=generator, dtype=torch.float64) ** 4
    weights = weights / weights.sum(-1, keepdim=True)
    error = float((softmax_norm(weights) / theta(weights) - 1).abs().max())
    largest = max(one.largest for one in found)
    return [
        Comparison(
            "theta_norm",
            "norm of the Jacobian of a softmax from largest entry to sum, over θ",
            1.0,
            Estimate.exact(1 + error),
            "2602.18849",
            error <= 1e-9,
        ),
        Comparison(
            "theta_largest",
            "largest |Cov| over θ D_v D_k / 4, at most 1",
            1.0,
            Estimate.exact(largest),
            "2602.18849; derived here",
            largest <= 1 + 1e-9,
        ),
    ]


def compare_growth(layers: Sequence[Growth]) -> list[Comparison]:
    """Compare the exponent of the whole Jacobian of a trained attention with 1/4.

    Args:
        layers: one measurement per layer.
    """
    exponents = [layer.exponent("normed") for layer in layers]
    lowest, highest = (end(one.value for one in exponents) for end in (min, max))
    mean = over_layers(layers, "normed")
    held = over_layers(layers, "held")
    agrees = abs(mean.value - 0.25) <= 0.1 and all(one.low <= 0.5 for one in exponents)
    return [
        Comparison(
            "growth_normed",
            "exponent of the norm of the whole Jacobian in the length of a text, mean over layers of SmolLM2",
            0.25,
            mean,
            "2312.14820",
            agrees,
            f"layers differ, from {lowest:.2f} to {highest:.2f}; "
            f"with the first token held fixed, to which most tokens attend, it is {held.value:.2f} "
            f"[{held.low:.2f}, {held.high:.2f}]",
        )
    ]


def over_layers(layers: Sequence[Growth], name: str) -> Estimate:
    """Mean exponent over layers; its interval comes from the texts, which all layers share.

    Args:
        layers: one measurement per layer, of the same texts.
        name: "normed", "held", "stream" or "blocks".
    """
    return estimate(np.mean([power_fit(layer.lengths, getattr(layer, name)) for layer in layers], axis=0))
