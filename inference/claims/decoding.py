r"""Claim: along a text, a language model is sensitive to noise where its margins are small.

A reason to expect it: :math:`du_i = J_i^{-1} d\varepsilon_i`, so that the reciprocal of the singular-value margin is
the gain of the generator from noise to token. A reason to doubt it: the network computes u + mu(u), not the inverse of
u - mu(u), and a distribution without entropy hardly changes, whatever the margin. The predictors, the targets and the
decisive number are listed in :mod:`probattn.inference.studies.language.prediction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from probattn import plotting
from probattn.errors import InputError
from probattn.inference.claims.claim import Claim, Settings, Subject, Verdict
from probattn.inference.claims.language import QUICK_WORDS, Load, language_results
from probattn.inference.studies.language.prediction import DECISIVE, OTHERS, Prediction

__all__ = ["decoding_claim", "judge_prediction"]

_RELEVANT = 0.1  # smallest partial correlation that counts
_CONTROL = 0.8  # smallest correlation of the local sensitivity with the measured one
_HOLDING = 0.75  # smallest share of permutations that may contain zero: below it lies 0.03 % of Binomial(20, 0.95)
_GIVEN = "given position and entropy"
_SHOWN = {
    "entropy": "entropy of the prediction",
    "norm": "norm of the embedding",
    "position": "position",
    "head_alone_sigma_min": "heads alone, σ_min\n(depends on the basis)",
    "turned_head_alone_sigma_min": "heads alone, σ_min,\nin another basis",
    "head_alone_logabsdet": "heads alone, log|det|\n(depends on the basis)",
    "turned_head_alone_logabsdet": "heads alone, log|det|,\nin another basis",
    "local_all": "local sensitivity,\nall embeddings (control)",
    "local_last": "local sensitivity,\nlast embedding (control)",
}


def decoding_claim(subject: Subject, settings: Settings, *, load: Load = language_results) -> Claim:
    """Rank tokens by the margins of their blocks, and by simpler predictors, against their measured sensitivity.

    - "not_run": no model, or a control fails, so that the experiment proves nothing.
    - "not_supported": no predictor has an interval above zero, all of them taken together, and a partial correlation of
      at least 0.1.
    - "supported": one has, and its correlation given position is larger than that of the entropy of the prediction.
    - "supported_within": one has, but the entropy does as well or better.

    Positive control: the local sensitivity, by draws of its own, must reach 0.8. Negative control: a predictor permuted
    across tokens must have intervals that contain zero.

    Args:
        subject: the fitted model and its text.
        settings: see :func:`~probattn.inference.claims.language.language_results`.
        load: source of the results.
    """
    try:
        results = load(subject, settings)
    except InputError as error:
        return _claim("not_run", {}, condition=str(error).rstrip("."))
    prediction = results.prediction
    if prediction is None:
        return _claim("not_run", {}, condition="the sensitivity to noise was not measured")
    verdict, condition = judge_prediction(prediction)
    facts = prediction.facts
    own, turned = (_other(prediction, f"{prefix}head_alone_sigma_min") for prefix in ("", "turned_"))
    return _claim(
        verdict,
        {**facts, **_measured(prediction)},
        condition=condition,
        quick=not results.record,
        control="Positive: the local sensitivity, by draws of its own, reaches "
        f"ρ = {facts['control_positive_rho']:.2f}; it must exceed {_CONTROL}. Negative: of 20 permutations of a "
        f"predictor across tokens, {facts['control_negative_holds_zero']:.0%} have a 95 % interval that contains 0. "
        f"The margin of the heads alone, which is no property of the model, has {own}; in another basis of the values, "
        f"in which the network is the same function, it has {turned}, and its rank correlation with itself is "
        f"{facts['control_head_alone_after_turning']:.2f}.",
        finding=_finding(prediction) + (f" Measured on {results.origin}." if results.origin else ""),
        figures={"decoding": draw_prediction(prediction)},
    )


def judge_prediction(prediction: Prediction) -> tuple[Verdict, str | None]:
    """Judge a summary by the rule.

    Args:
        prediction: the summary.

    Returns:
        The verdict, and its condition or reason.
    """
    facts = prediction.facts
    if not (facts["control_positive_rho"] > _CONTROL and facts["control_negative_holds_zero"] >= _HOLDING):
        return "not_run", "a control failed: the experiment could not have found a predictor"
    shown = relevant_predictors(prediction)
    if not shown:
        return "not_supported", None
    low = prediction.leads["low"]
    if any(low[prediction.predictors.index(name)] > 0 for name in shown):
        return "supported", None
    return (
        "supported_within",
        "a margin is not required to predict better than the entropy of the next-token distribution",
    )


def relevant_predictors(prediction: Prediction) -> list[str]:
    """Predictors whose decisive interval lies above zero and whose estimate counts, the best first.

    Args:
        prediction: the summary.
    """
    band = prediction.bands[DECISIVE][_GIVEN]
    found = [
        (estimate, name)
        for name, estimate, low in zip(prediction.predictors, band["estimate"], band["low"], strict=True)
        if low > 0 and estimate >= _RELEVANT
    ]
    return [name for _, name in sorted(found, reverse=True)]


def draw_prediction(prediction: Prediction) -> Figure:
    """Draw the decisive correlations of all predictors, those of the simpler ones beside them.

    Args:
        prediction: the summary.
    """
    targets = {DECISIVE: "divergence under noise", "next_surprisal": "surprisal of the next token"}
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for one, title in (("generator", "I − M, the generator's blocks"), ("update", "I + M, the network's own")):
        rows = [k for k, name in enumerate(prediction.predictors) if name.startswith(f"{one}_")]
        names = [_words(prediction.predictors[k].removeprefix(f"{one}_")) for k in rows]
        groups[title] = (
            names,
            {words: _interval(prediction.bands[target][_GIVEN], rows) for target, words in targets.items()},
        )
    rows = [OTHERS.index(name) for name in _SHOWN]
    groups["others, given position alone"] = (
        list(_SHOWN.values()),
        {words: _interval(prediction.others[target]["given position"], rows) for target, words in targets.items()},
    )
    return plotting.plot_predictors(groups, "partial rank correlation (95 %)")


def _interval(band: Mapping[str, list[float]], rows: list[int]) -> tuple[Any, Any, Any]:
    return tuple(np.array(band[end], dtype=float)[rows] for end in ("estimate", "low", "high"))  # type: ignore[return-value]


def _words(name: str) -> str:
    kind, _, how = name.rpartition("_")
    shown = {
        "logabsdet": "−log|det|",
        "sigma_min": "−log σ_min",
        "spectral": "−spectral margin",
        "complex": "−complex margin",
    }
    return f"{shown[kind]}, {how}"


def _measured(prediction: Prediction) -> dict[str, float]:
    """Return partial correlations of all predictors with all targets, and plain ones of the means and the others."""
    measured: dict[str, float] = {}
    for target, bands in prediction.bands.items():
        for given, band in bands.items():
            for k, name in enumerate(prediction.predictors):
                if given == _GIVEN or (name.endswith("_mean") and given == "alone"):
                    _record(measured, name, target, given, band, k)
    for target, bands in prediction.others.items():
        for given in ("alone", "given position"):
            for k, name in enumerate(OTHERS):
                if name != "position" or given == "alone":
                    _record(measured, name, target, given, bands[given], k)
    for k, name in enumerate(prediction.predictors):
        if name.endswith("_mean"):
            measured[f"lead_of_{name}_over_entropy"] = prediction.leads["estimate"][k]
            measured[f"lead_of_{name}_over_entropy_high"] = prediction.leads["high"][k]
    measured["predictors_that_count"] = float(len(relevant_predictors(prediction)))
    return measured


def _record(
    measured: dict[str, float], name: str, target: str, given: str, band: Mapping[str, list[float]], k: int
) -> None:
    label = {"alone": "rho", "given position": "rho_given_position", _GIVEN: "partial_rho"}[given]
    for end, suffix in (("estimate", ""), ("low", "_low"), ("high", "_high")):
        measured[f"{label}_{name}_{target}{suffix}"] = band[end][k]


def _other(prediction: Prediction, name: str, *, target: str = DECISIVE) -> str:
    band, k = prediction.others[target]["given position"], OTHERS.index(name)
    return f"ρ = {band['estimate'][k]:.2f} [{band['low'][k]:.2f}, {band['high'][k]:.2f}]"


def _finding(prediction: Prediction) -> str:
    band, names = prediction.bands[DECISIVE][_GIVEN], prediction.predictors
    shown = relevant_predictors(prediction)

    def words(name: str) -> str:
        k = names.index(name)
        map_name, _, rest = name.partition("_")
        return (
            f"{_words(rest)} of I {'−' if map_name == 'generator' else '+'} M: ρ = {band['estimate'][k]:.2f} "
            f"[{band['low'][k]:.2f}, {band['high'][k]:.2f}]"
        )

    best = max(names, key=lambda name: band["estimate"][names.index(name)])
    worst = min(names, key=lambda name: band["estimate"][names.index(name)])
    against = sum(high < 0 and value <= -_RELEVANT for value, high in zip(band["estimate"], band["high"], strict=True))
    last = prediction.bands["kl_last_0.1"][_GIVEN]
    first = max(names, key=lambda name: last["estimate"][names.index(name)])
    k = names.index(first)
    return (
        f"Given position and entropy, {len(shown)} of {len(names)} predictors count, by intervals that hold for all of "
        f"them at once, and {against} have the opposite sign as clearly. The best is {words(best)}; the most negative "
        f"{words(worst)}; the one that a reader would try first, {words('generator_sigma_min_mean')}. The entropy of "
        f"the prediction, given position, has {_other(prediction, 'entropy')}. For noise on the last embedding alone "
        f"the best is {words(first).partition(':')[0]}: ρ = {last['estimate'][k]:.2f} [{last['low'][k]:.2f}, "
        f"{last['high'][k]:.2f}], where the entropy, given position, has "
        f"{_other(prediction, 'entropy', target='kl_last_0.1')}."
    )


def _claim(verdict: Verdict, measured: Mapping[str, float], *, quick: bool = False, **more: Any) -> Claim:
    return Claim(
        "decoding",
        "Along a text, the next-token distribution is more sensitive to noise on the embeddings where the margins of a "
        "token's attention blocks are small, by at least one of the summaries that were listed before, given position "
        "and entropy; and that summary predicts this better than the entropy of the distribution."
        + QUICK_WORDS
        * quick,
        "empirical",
        verdict,
        measured,
        formula="ρ_S(−margin(J_i^ℓ), E_δ KL(p(·|u_≤i) ‖ p(·|u_≤i + δ)) | i, H_i) > 0,   δ = 0.1 · rms(u) · z,   "
        "J = I ∓ ∂μ/∂u on the residual stream",
        **more,
    )
