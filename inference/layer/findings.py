"""Findings of a fit of a layer on its heads, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probattn.inference.results.diagnosis import Diagnosis, Finding, diagnose
from probattn.inference.results.fit_file import Fit

__all__ = ["diagnose_layer", "head_intervals"]

Array = NDArray[Any]
_LEVEL = 0.95
_FAINT = 0.1  # a tenth of the strength as trained: a positive gain never reaches 0
_EXTREME = 0.025  # share of predictive draws beyond the data, on one side, that is worth a warning


def diagnose_layer(fit: Fit) -> Diagnosis:
    """Judge a fit of a layer, and answer what it was made for.

    Besides what :func:`~probattn.inference.results.diagnosis.diagnose` checks: which heads' strength excludes 0 or 1,
    how much a change of low rank changes the logits, whether det J > 0 along the posterior, and predictive checks of
    norms and successive differences.

    Args:
        fit: fit with the groups of :func:`~probattn.inference.layer.result.assemble_layer`.
    """
    diagnosis = diagnose(fit)
    numbers, findings = dict(diagnosis.numbers), list(diagnosis.findings)
    if fit.method != "map":
        findings += _heads(fit, numbers)
        if "inverse_temperature" in fit.groups["posterior"]:
            findings += _temperatures(fit)
        if "logit_change" in fit.groups["posterior"]:
            findings += _updates(fit, numbers)
    findings += _determinants(fit, numbers)
    findings += _predictive(fit, numbers)
    return Diagnosis(findings, numbers)


def head_intervals(fit: Fit, name: str = "strength") -> Array:
    """Central 95 % interval and median of a quantity of each head, ``(3, H)``: low, median, high."""
    values = np.asarray(fit.groups["posterior"][name])
    rows: Array = np.quantile(values.reshape(-1, values.shape[-1]), [(1 - _LEVEL) / 2, 0.5, (1 + _LEVEL) / 2], axis=0)
    return rows


def _heads(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    low, middle, high = head_intervals(fit)
    signed = bool(fit.attributes.get("signed", 0))
    if signed:
        off, turned = (low <= 0) & (high >= 0), high < 0
        words = f"the 95 % interval of the strength holds 0 for {_named(off)}"
        rest = f"below 0 for {_named(turned)}: the model would turn them round" if turned.any() else "below 0 for none"
    else:
        off = low < _FAINT
        words = f"the 95 % interval of the strength reaches below {_FAINT:g} for {_named(off)}"
        rest = "gains are positive by their prior; --signed lets them be 0"
    numbers["heads_without_effect"] = float(off.sum())
    yield Finding("heads that do nothing", "note" if off.any() else "good", f"{words}; {rest}.")
    weaker, stronger = high < 1, low > 1
    numbers["heads_weaker"], numbers["heads_stronger"] = float(weaker.sum()), float(stronger.sum())
    plausible = ~(weaker | stronger)
    words = (
        f"the interval holds 1, as trained, for {_named(plausible)}; it lies below 1 for {_named(weaker)} and above 1 "
        f"for {_named(stronger)} (medians {float(middle.min()):.2f} to {float(middle.max()):.2f})"
    )
    yield Finding("heads as trained", "good" if plausible.all() else "note", f"{words}.")


def _temperatures(fit: Fit) -> Iterator[Finding]:
    low, _, high = head_intervals(fit, "inverse_temperature")
    sharper, flatter = low > 1, high < 1
    level = "note" if (sharper | flatter).any() else "good"
    words = f"sharper than trained for {_named(sharper)}, flatter for {_named(flatter)}"
    yield Finding("temperatures", level, f"{words}; the interval holds 1 for the rest.")  # type: ignore[arg-type]


def _updates(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    """Change of the logits of each head whose QK product may change, beside what the prior expects."""
    low, middle, high = head_intervals(fit, "logit_change")
    prior = np.asarray(fit.groups["prior"]["logit_change"])
    expected = np.median(prior.reshape(-1, prior.shape[-1]), axis=0)
    heads = fit.coords.get("updated_head", np.arange(len(middle)))
    for place, head in enumerate(np.asarray(heads).tolist()):
        numbers[f"logit_change_{head}"] = float(middle[place])
        words = (
            f"logits change by {middle[place]:.2g} ({low[place]:.2g} to {high[place]:.2g}), in root mean square over "
            f"the tokens seen; the prior expects {expected[place]:.2g}"
        )
        size = np.median(np.asarray(fit.groups["posterior"]["update_norm"])[..., place])
        yield Finding(f"QK product of head {head}", "note", f"{words}. The product changes by {size:.2g} of its norm.")


def _determinants(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    looked, positive = int(fit.attributes["draws_looked_at"]), int(fit.attributes["positive_draws"])
    numbers["share_positive"] = positive / looked
    words = f"det J > 0 at every token looked at in {positive} of {looked} draws"
    if positive == looked:
        yield Finding("determinants", "good", f"{words}.")
        return
    remedy = "beyond a fold the likelihood is no density: leave these draws out of any conclusion, or give more tokens"
    yield Finding("determinants", "problem" if 2 * positive < looked else "warning", f"{words}; {remedy} (--given).")


def _predictive(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    drawn = fit.groups.get("posterior_predictive", {})
    for name, about in (("norm", "norms"), ("difference", "successive differences")):
        if name not in drawn:
            continue
        values = np.asarray(drawn[name])
        values = values.reshape(-1, values.shape[-1]).mean(-1)  # over the sequences, as the data are
        observed = float(np.asarray(fit.groups["observed_data"][name]).mean())
        above = numbers[f"predictive_{name}"] = float((values >= observed).mean())
        extreme = min(above, 1 - above) <= _EXTREME
        words = (
            f"{observed:.4g} in the data, {values.mean():.4g} +- {values.std():.2g} in {len(values)} draws of the "
            f"model, of which {100 * above:.0f} % are larger"
        )
        remedy = "; the model does not make streams like these in this respect: try another --noise" if extreme else ""
        yield Finding(f"predicted {about}", "warning" if extreme else "good", f"{words}{remedy}.")


def _named(which: Array) -> str:
    places = np.flatnonzero(which).tolist()
    if not places:
        return "no head"
    if len(places) == len(which):
        return "every head"
    return f"head{'s' * (len(places) > 1)} {', '.join(map(str, places))}"
