"""Claim: the exact posteriors are calibrated. The posterior without the Jacobian, the negative control, is not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probattn import plotting
from probattn.inference.claims.claim import Claim, Settings, judge
from probattn.inference.runtime.environment import describe
from probattn.inference.runtime.files import write_json
from probattn.inference.studies.calibration import METHODS, Ranks, Study, calibrate, rank_band, simulate_study

__all__ = ["calibration_claim"]

STUDY = Study()
ERROR = 0.01
_CONTROL = "nuts_without_jacobian"
# Exact up to Monte Carlo error; for the last two as far as their importance weights can be trusted.
_EXACT = ("nuts", "nuts_pyro", "laplace", "svi_full_rank")
_SHORT = ("nuts", "laplace", _CONTROL)
_RESULTS = "calibration.json"
_NAMES = {
    "nuts": "NUTS",
    "nuts_pyro": "Pyro's NUTS",
    "nuts_without_jacobian": "NUTS without the Jacobian",
    "laplace": "Laplace",
    "laplace_uncorrected": "uncorrected Laplace",
    "laplace_without_jacobian": "Laplace without the Jacobian",
    "svi_full_rank": "full-rank SVI",
    "svi_mean_field": "mean-field SVI",
}


def calibration_claim(settings: Settings, *, study: Study = STUDY) -> Claim:
    """Rank the truth among posterior draws for every method, and for the posterior without the Jacobian as a control.

    Talts et al., 2018, arXiv:1804.06788.

    Args:
        settings: ``full`` runs two methods and the control, and reads the others from the results that ship with the
            package; with ``named`` every method is run, which takes most of an hour on two cores.
        study: the model, its prior and the number of replicates.
    """
    if not settings.full:
        return _claim("not_run", {}, {}, condition="it takes minutes: run probattn verify --full")
    simulated = simulate_study(study)
    ranks: dict[str, Ranks] = {}
    for method in METHODS if settings.named else _SHORT:
        store = None if settings.folder is None else settings.folder / f"calibration-{method}.json"
        ranks[method] = calibrate(study, method, simulated=simulated, jobs=settings.jobs, store=store)
    if settings.named and settings.folder is not None:
        _export(settings.folder / _RESULTS, study, ranks)
    read, origin = ({}, "") if settings.named else _committed(study)
    every = {**{name: found for name, found in read.items() if name not in ranks}, **ranks}
    measured = {
        "replicates": float(study.replicates),
        "redrawn": float(simulated.redrawn),
        "certified_share": simulated.certified,
    }
    for name, found in every.items():
        measured[f"{name}_excess"] = max(found.excess(ERROR).values())
        measured[f"{name}_coverage_90_worst"] = min(found.coverage(0.9).values())
    bound = {f"{name}_excess": 0.0 for name in every if name in _EXACT}
    control = measured[f"{_CONTROL}_excess"]
    holds = judge(measured, bound)
    others = [name for name in every if name not in _EXACT and not name.endswith("_without_jacobian")]
    failing = [name for name in others if measured[f"{name}_excess"] > 0]
    passing = [name for name in others if name not in failing]
    findings = []
    if passing:
        findings.append(f"Also calibrated in this study, which nothing guarantees: {_list(passing)}.")
    if failing:
        findings.append(f"Not calibrated: {_list(failing)}.")
    if read:
        findings.append(f"The ranks of {_list(sorted(set(every) - set(ranks)))} are those of an earlier run: {origin}.")
    return _claim(
        "supported" if holds and control > 0 else "not_supported",
        measured,
        bound,
        control="The posterior without the Jacobian, by the same sampler on the same data, has ranks that leave the "
        f"band by {control:.2f}; its 90 % intervals contain the truth in "
        f"{100 * measured[f'{_CONTROL}_coverage_90_worst']:.0f} % of the replicates for the worst quantity.",
        finding=" ".join(findings),
        figures={"calibration": _figure(every)},
    )


def _claim(verdict: Any, measured: Mapping[str, float], bound: Mapping[str, float], **more: Any) -> Claim:
    return Claim(
        "calibration",
        "NUTS, and Laplace and full-rank SVI with importance weights, are calibrated: with parameters drawn from the "
        "prior and data from the model, the rank of the truth among posterior draws is uniform for the parameters, the "
        f"log-likelihood and the margin (family-wise error {ERROR:.0%} per method).",
        "statistical",
        verdict,
        measured,
        bound,
        formula="θ ~ p(θ), u ~ p(u | θ), θ₁…θ_L ~ q(θ | u)  ⇒  #{l : f(θ_l, u) < f(θ, u)} ~ Uniform{0, …, L}",
        **more,
    )


def _words(method: str) -> str:
    return _NAMES.get(method, method.replace("_", " "))


def _list(methods: Sequence[str]) -> str:
    """Join names with commas and a final "and"."""
    names = [_words(method) for method in methods]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _figure(every: Mapping[str, Ranks]) -> Any:
    """Draw the distribution function of the ranks of every quantity, one panel per method."""
    quantities = len(next(iter(every.values())).ranks)
    level = 1 - ERROR / quantities
    band = rank_band(len(next(iter(next(iter(every.values())).ranks.values()))), level)
    uniform = {_words(name): found.uniform() for name, found in every.items()}
    return plotting.plot_rank_bands(uniform, (band.points, band.low, band.high), level)


def _export(path: Path, study: Study, ranks: Mapping[str, Ranks]) -> None:
    """Write the ranks in the form in which they ship with the package."""
    environment = describe(torch.device("cpu"), torch.float64, study.seed)
    origin = "{date}, {command}, seed {seed}, {processor}".format(**environment)
    plain = {
        name: {label: [int(rank) for rank in values] for label, values in found.ranks.items()}
        for name, found in ranks.items()
    }
    write_json(path, {"schema": 1, "origin": origin, "study": vars(study), "ranks": plain})


def _committed(study: Study) -> tuple[dict[str, Ranks], str]:
    """Read the ranks of the long study that ships with the package, and their origin; none if the study differs."""
    file = resources.files("probattn.inference.studies") / "results" / _RESULTS
    if not file.is_file():
        return {}, ""
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["study"] != vars(study):
        return {}, ""
    ranks = {
        name: Ranks(name, study.ranked, {label: np.asarray(values) for label, values in quantities.items()}, {})
        for name, quantities in content["ranks"].items()
    }
    return ranks, content["origin"]
