r"""Claim: it is training that puts the attention blocks of a language model where they lie.

In hundreds of dimensions almost every block is inside the boundary, random ones too: that det J_i > 0 says nothing of
training. What controls can lack is the pattern by layer. The statistics and the rule are those of
:mod:`probattn.inference.studies.language.location`, stated there before anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from probattn import plotting
from probattn.errors import InputError
from probattn.inference.claims.claim import Claim, Settings, Subject, Verdict
from probattn.inference.claims.language import QUICK_WORDS, Load, language_results
from probattn.inference.studies.language.location import NAMES, STATISTICS, Location
from probattn.inference.studies.language.results import Results

__all__ = ["judge_location", "trained_claim"]

_SWAPPED = 0.15  # largest share of 20 permutations in which layers may be apart, of which 5 % are expected


def trained_claim(subject: Subject, settings: Settings, *, load: Load = language_results) -> Claim:
    """Compare where the blocks of a trained model lie with where those of its controls do.

    - "supported": both statistics, volume and nearest, are the work of training.
    - "supported_within": one of them is.
    - "not_supported": neither is.
    - "not_run": no model or no control, or layers are found to differ where trained model and control change places.

    Args:
        subject: the fitted model and its text.
        settings: see :func:`~probattn.inference.claims.language.language_results`.
        load: source of the results.
    """
    try:
        results = load(subject, settings)
    except InputError as error:
        return _claim("not_run", {}, condition=str(error).rstrip("."))
    location = results.location
    verdict, condition = judge_location(location, results.swapped)
    return _claim(
        verdict,
        {**location.facts, **_measured(location), "control_swapped_apart": results.swapped},
        condition=condition,
        quick=not results.record,
        control="Where trained model and control change places in a random half of the texts, nothing can differ: "
        f"a difference is found in {results.swapped:.0%} of 20 permutations, 5 % are expected.",
        finding=_finding(results),
        figures=draw_location(location),
    )


def judge_location(location: Location, swapped: float) -> tuple[Verdict, str | None]:
    """Judge a summary by the rule.

    Args:
        location: the summary.
        swapped: share of permutations of trained model and control in which layers are apart.

    Returns:
        The verdict, and its condition or reason.
    """
    volume, nearest = location.holds("volume"), location.holds("nearest")
    if volume is None or nearest is None:
        return "not_run", "the margins of the controls were not measured"
    if not swapped <= _SWAPPED:
        return "not_run", "a control failed: layers are found to differ where there is no difference"
    if volume and nearest:
        return "supported", None
    if volume:
        return "supported_within", "only the volume log|det J_i| is claimed, not the smallest singular value"
    if nearest:
        return "supported_within", "only the smallest singular value is claimed, not the volume log|det J_i|"
    return "not_supported", None


def draw_location(location: Location) -> dict[str, Figure]:
    """Draw margins by layer and token, by layer beside the controls, and by layer along training.

    Args:
        location: the summary.

    Returns:
        Figures by name.
    """
    titles = {"logabsdet": "log|det J|", "sigma_min": "smallest singular value of J"}
    profiles: dict[str, dict[str, tuple[Any, Any, Any]]] = {}
    for statistic in STATISTICS.values():
        shown = {}
        for group in sorted(location.profiles, key=list(NAMES).index):
            if statistic.kind in location.profiles[group]:
                band = _interval(location.profiles[group][statistic.kind][f"{statistic.order:g}"])
                # Bands of controls of few texts would hide the rest; their intervals decide by the differences.
                shown[NAMES[group]] = band if group == "text" else (band[0], band[0], band[0])
        if shown:
            profiles[statistic.words] = shown
    boundary = {statistic.words: 0.0 for statistic in STATISTICS.values()}
    figures = {"trained-profiles": plotting.plot_layer_profiles(location.layers, profiles, boundary)}
    if location.example:
        maps = {titles[kind]: np.array(values, dtype=float) for kind, values in location.example.items()}
        figures["trained-map"] = plotting.plot_layer_map(maps, {titles["logabsdet"]: 0.0})
    if location.growth:
        growth = {name: np.array(location.growth[name], dtype=float) for name in ("loss", "volume", "nearest")}
        figures["trained-growth"] = plotting.plot_profiles_in_training(
            location.growth["steps"],
            growth["loss"],
            {STATISTICS[name].words: growth[name] for name in ("volume", "nearest")},
        )
    return figures


def _interval(band: Mapping[str, Sequence[float]]) -> tuple[Any, Any, Any]:
    return tuple(np.array(band[end], dtype=float) for end in ("estimate", "low", "high"))  # type: ignore[return-value]


def _measured(location: Location) -> dict[str, float]:
    """Return the number of layers that are apart, and the range of each statistic over layers, by group."""
    measured: dict[str, float] = {}
    for name, statistic in STATISTICS.items():
        measured[f"layers_{name}_apart"] = float(len(location.common(name)))
        for control, layers in location.apart[name].items():
            measured[f"layers_{name}_apart_from_{control}"] = float(len(layers))
        for group, kinds in location.profiles.items():
            if statistic.kind in kinds:
                values = kinds[statistic.kind][f"{statistic.order:g}"]["estimate"]
                measured[f"{name}_{group}_lowest"] = float(np.nanmin(values))
                measured[f"{name}_{group}_highest"] = float(np.nanmax(values))
    growth = location.growth
    if growth:
        steps, loss = growth["steps"], np.array(growth["loss"], dtype=float)
        for run, appears in enumerate(growth["appears"]):
            measured[f"growth_{run}_appears_at_step"] = float(appears)
            measured[f"growth_{run}_loss_then"] = float(loss[run, steps.index(appears)])
            measured[f"growth_{run}_loss_at_start"] = float(loss[run, 0])
            measured[f"growth_{run}_loss_at_end"] = float(loss[run, -1])
            measured[f"growth_{run}_range_at_start"] = float(growth["spread"][run][0])
            measured[f"growth_{run}_range_at_end"] = float(growth["spread"][run][-1])
    return measured


def _finding(results: Results) -> str:
    location, facts = results.location, results.location.facts
    layers = len(location.layers)
    words = [
        f"Of {facts['tokens']:,.0f} tokens, det J_i < 0 in {_share(facts, 'negative_text')} of the blocks behind the "
        "first 16 of each text"
        + "".join(
            f", {_share(facts, f'negative_{control}')} ({NAMES[control]})"
            for control in ("random_weights", "turned_output")
            if f"negative_{control}" in facts
        )
        + ": to be inside is no sign of training."
    ]
    for name, statistic in STATISTICS.items():
        if location.apart[name]:
            each = ", ".join(
                f"{NAMES.get(control, control)} {len(found)}" for control, found in location.apart[name].items()
            )
            values = location.profiles["text"][statistic.kind][f"{statistic.order:g}"]["estimate"]
            words.append(
                f"The {statistic.words} goes from {min(values):.2f} to {max(values):.2f} over layers. Of {layers} "
                f"layers, so many differ from a control: {each}; from all controls with other weights at once "
                f"{len(location.common(name))}."
            )
    growth = location.growth
    if growth:
        loss = np.array(growth["loss"], dtype=float)
        at = [growth["steps"].index(step) for step in growth["appears"]]
        then = ", ".join(f"{loss[run, k]:.2f}" for run, k in enumerate(at))
        words.append(
            "In small models of our own the range of the median volume over layers reaches half of its last value for "
            f"good after {', '.join(map(str, growth['appears']))} of {growth['steps'][-1]} steps, at a loss of {then} "
            f"(first {loss[:, 0].mean():.2f}, last {loss[:, -1].mean():.2f})."
        )
    if results.origin:
        words.append(f"Measured on {results.origin}.")
    return " ".join(words)


def _share(facts: Mapping[str, float], name: str) -> str:
    return f"{facts[name]:.2%} [{facts[f'{name}_low']:.2%}, {facts[f'{name}_high']:.2%}]"


def _claim(verdict: Verdict, measured: Mapping[str, float], *, quick: bool = False, **more: Any) -> Claim:
    return Claim(
        "trained",
        "Training decides where the attention blocks of a language model lie with respect to the boundary: in most "
        "layers the median of log|det J_i| and the 1 % quantile of σ_min(J_i) differ from those of every control with "
        "other weights, the quantile towards the boundary." + QUICK_WORDS * quick,
        "empirical",
        verdict,
        measured,
        formula="median_i log|det J_i^ℓ| ≠ control,   q_1% σ_min(J_i^ℓ) < control,   "
        "J_i^ℓ = I − ∂μ_i^ℓ/∂u_i on the residual stream",
        **more,
    )
