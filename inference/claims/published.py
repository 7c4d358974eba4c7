r"""Claim: pointed at what others published on attention, the functions of this package get their numbers.

Five papers and a model: critical attention scaling (2510.05554), long contexts (2605.08505), the error of the Gaussian
limit at finite n and with it the boundary 4/27 (2501.18322, 2606.07600, 2605.10466), the sensitivity of a softmax as a
bound on covariances (2602.18849), and the growth of Jacobians with the length of a text (2312.14820). When two
numbers agree is stated in :mod:`~probattn.inference.studies.published.comparisons`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from probattn.errors import InputError
from probattn.inference.claims.claim import Claim, Settings, Subject, Verdict, judge
from probattn.inference.claims.stationarity import balanced_noise
from probattn.inference.studies.published.comparisons import (
    EXACT,
    compare_critical,
    compare_gaussian,
    compare_growth,
    compare_selectivity,
    compare_sensitivity,
    finite_size_error,
    over_layers,
)
from probattn.inference.studies.published.critical import (
    Transition,
    leading_sign_change,
    measure_transition,
    sign_change,
)
from probattn.inference.studies.published.gaussian import boundary_at, measure_deviation
from probattn.inference.studies.published.lengths import Growth
from probattn.inference.studies.published.long_context import Selectivity, measure_selectivity
from probattn.inference.studies.published.record import Comparison, Estimate
from probattn.inference.studies.published.results import GrowthResults, committed_growth, measure_on_smollm2
from probattn.inference.studies.published.sensitivity import measure_local_bound
from probattn.mean_field import CRITICAL
from probattn.models.scalar import scalar_attention
from probattn.plotting.published import plot_published

__all__ = ["published_claim"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Size:
    """Sizes of the measurements that need no language model."""

    critical: tuple[int, ...]
    powers: range  # of two: numbers of keys
    draws: int
    length: int  # of Gaussian pasts
    pasts: int
    boundary: tuple[int, ...]
    boundary_pasts: int


_QUICK = _Size((16, 64), range(6, 11), 100, 1600, 1000, (100,), 400)
_FULL = _Size((16, 64, 256, 512), range(6, 13), 300, 6400, 4000, (100, 200, 400), 2000)


def published_claim(subject: Subject, settings: Settings, *, growth: GrowthResults | None = None) -> Claim:
    """Compare the package's numbers with published ones.

    Args:
        subject: the fitted model, whose text SmolLM2 reads where it is measured.
        settings: ``full`` takes larger sizes and shows the growth of Jacobians on SmolLM2 that ships with the package;
            with ``named`` it is measured, which takes ten minutes of one core. The quick form leaves it out.
        growth: results on a language model; None for those that ``settings`` ask for.
    """
    size = _FULL if settings.full else _QUICK
    missing = "" if settings.full else " (Quick form: smaller sizes, and without the language model.)"
    if growth is None and settings.full:
        growth, missing = _growth(subject, settings)
    transitions = [measure_transition(n) for n in size.critical]
    transitions.append(measure_transition(64, 0.5))  # the place in units of gamma_c does not depend on rho
    _LOG.info("published: long contexts")
    lengths = [2**k for k in size.powers]
    selective = [measure_selectivity(dim, lengths, size.draws, seed=subject.seed) for dim in (3, 5)]
    control = measure_selectivity(3, lengths, size.draws, ball=True, seed=subject.seed).plain
    _LOG.info("published: Gaussian pasts")
    deviations = [
        measure_deviation(size.length, exponent, pasts=size.pasts, seed=subject.seed) for exponent in (0.25, 1.0)
    ]
    boundary = _boundary(size, subject.seed)
    local = {strength: measure_local_bound(strength) for strength in (0.3, 1.0, 2.0)}
    clusters = measure_local_bound(1.0, dim=1, clusters=True)
    comparisons = [
        *compare_critical(transitions),
        *compare_selectivity(selective),
        *compare_gaussian(deviations, boundary),
        *compare_sensitivity([*local.values(), clusters]),
        *(compare_growth(growth.layers) if growth is not None else ()),
    ]
    measured = {name: value for one in comparisons for name, value in one.measured().items()}
    measured |= {
        "finite_size_error": finite_size_error(transitions),
        "critical_sign_other_cosine": transitions[-1].sign_at,
        "control_selectivity_ball": control.value,
        "control_theta": clusters.control,
        **{f"theta_sharper_{strength:g}": found.sharper for strength, found in local.items()},
        **{f"theta_slack_{strength:g}": found.slack for strength, found in local.items()},
        "theta_slack_clusters": clusters.slack,
        **(_growth_numbers(growth.layers) if growth is not None else {}),
    }
    controlled = clusters.control > 1.1 and not control.low <= 1 <= control.high
    bound = {"finite_size_error": EXACT, "theta_largest": 1 + 1e-9}
    verdict, condition = _judge(comparisons, exact=judge(measured, bound), controlled=controlled)
    return Claim(
        "published",
        "Pointed at what others published on attention, the functions of this package get their numbers." + missing,
        "statistical",
        verdict,
        measured,
        bound,
        condition=condition,
        formula="γ_c = 1/(1 − ρ);   β* ~ n^(2/(d−1));   RMS² = e^(b²V) (V + b²V²)/n;   "
        "|Cov(v, k)| ≤ θ D_v D_k / 4, θ = max_S 4 p(S)(1 − p(S));   |∂μ/∂x| ~ n^(1/4)",
        control=f"Keys in the ball instead of on the sphere: an exponent of {control.value:.2f} where the sphere of "
        f"R³ has 1 (predicted 0.5). θ taken as 4m(1 − m) where no weight m reaches a half: covariances up to "
        f"{clusters.control:.2f} times the bound.",
        finding=" ".join(f"{_sentence(one.quantity)}: {one.why}." for one in comparisons if one.why and not one.agrees),
        figures={"published": _figure(transitions, selective, growth)},
    )


def _growth_numbers(layers: Sequence[Growth]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name in ("held", "stream", "blocks"):
        mean = over_layers(layers, name)
        numbers |= {f"growth_{name}": mean.value, f"growth_{name}_low": mean.low, f"growth_{name}_high": mean.high}
    for layer in layers:
        for name in ("normed", "held", "stream", "blocks"):
            found = layer.exponent(name)
            key = f"growth_{name}_layer{layer.layer}"
            numbers |= {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
    return numbers


def _growth(subject: Subject, settings: Settings) -> tuple[GrowthResults | None, str]:
    """Results on SmolLM2, and words on what is missing."""
    if not settings.named:
        return committed_growth(), ""
    if subject.corpus is None:
        return None, " (Without the language model: no text was given.)"
    folder = None if settings.folder is None else settings.folder / "published"
    try:
        return measure_on_smollm2(subject.corpus.name, subject.corpus.heldout, folder), ""
    except InputError as error:
        return None, f" (Without the language model: {str(error).rstrip('.')}.)"


def _boundary(size: _Size, seed: int) -> Estimate:
    """The boundary at finite n, each corrected by the closed form, as one weighted mean."""
    values, weights = [], []
    for k, n in enumerate(size.boundary):
        _LOG.info("published: boundary at %d tokens", n)
        found = balanced_noise(scalar_attention(1.0), n, size.boundary_pasts, 100 * seed + k)
        values.append(found.critical + CRITICAL - boundary_at(n))
        weights.append(1 / found.error**2)
    value, half = float(np.average(values, weights=weights)), 1.96 / math.sqrt(sum(weights))
    return Estimate(value, value - half, value + half)


def _judge(comparisons: Sequence[Comparison], *, exact: bool, controlled: bool) -> tuple[Verdict, str | None]:
    if not controlled:
        return "not_run", "a control failed: a wrong measurement gets the published number"
    apart = [one for one in comparisons if not one.agrees]
    if not apart:
        return "supported", None
    if exact and len(apart) < len(comparisons) / 2:
        return "supported_within", "these are left out: " + "; ".join(one.quantity for one in apart)
    return "not_supported", None


def _figure(
    transitions: Sequence[Transition],
    selective: Sequence[Selectivity],
    growth: GrowthResults | None,
) -> Figure:
    places = {found.length: found.sign_at for found in transitions}
    return plot_published(
        places,
        {n: (sign_change(n), leading_sign_change(n)) for n in places},
        {one.dim: (one.lengths, one.scales) for one in selective},
        {one.layer: (one.lengths, one.normed, one.held, one.blocks) for one in growth.layers} if growth else {},
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
