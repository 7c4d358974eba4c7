"""Claim: the posteriors are calibrated. And the one that forgets the Jacobian is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
# Exact up to Monte Carlo error, the last two where their importance weights can be trusted.
_EXACT = ("nuts", "nuts_pyro", "laplace", "svi_full_rank")
_SHORT = ("nuts", "laplace", _CONTROL)
_RESULTS = "calibration.json"


def calibration_claim(settings: Settings, *, study: Study = STUDY) -> Claim:
    """Simulation-based calibration of the methods, and of the posterior without the Jacobian as the negative control.

    Args:
        settings: ``full`` runs two methods and the control; ``named`` as well runs every method, hours on two cores.
            Otherwise those come from the results that ship with the package.
        study: what to simulate.
    """
    if not settings.full:
        return _claim("not_run", {}, {}, condition="takes minutes: run probattn verify --full")
    simulated = simulate_study(study)
    ranks: dict[str, Ranks] = {}
    for method in METHODS if settings.named else _SHORT:
        store = None if settings.folder is None else settings.folder / f"calibration-{method}.json"
        ranks[method] = calibrate(
            study,
            method,
            simulated=simulated,
            jobs=settings.jobs,
            store=store,
            report=lambda done, of, method=method: settings.report(f"calibration of {method}: {done} of {of}"),  # type: ignore[misc]
        )
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
    conditions = []
    if failing:
        conditions.append(f"not for {', '.join(map(_words, failing))}")
    if passing:
        conditions.append(f"in this study also for {', '.join(map(_words, passing))}, which nothing guarantees")
    if read:
        conditions.append(f"ranks of {', '.join(map(_words, sorted(set(every) - set(ranks))))} read in: {origin}")
    verdict = "supported" if holds and control > 0 else "not_supported"
    if verdict == "supported" and conditions:
        verdict = "supported_within"
    return _claim(
        verdict,
        measured,
        bound,
        condition="; ".join(conditions) or None,
        control="The posterior without the Jacobian, by the same sampler on the same data: its ranks leave the band by "
        f"{control:.2f}; its 90 % intervals hold the truth in {100 * measured[f'{_CONTROL}_coverage_90_worst']:.0f} % "
        "of the replicates for the worst quantity.",
        figures={"calibration": _figure(every)},
    )


def _claim(verdict: Any, measured: Mapping[str, float], bound: Mapping[str, float], **more: Any) -> Claim:
    return Claim(
        "calibration",
        "Drawing parameters from the prior and data from the model, the rank of the truth among the draws of the "
        f"posterior is uniform, for the parameters, the log-likelihood and the margin (family-wise error {ERROR:.0%} a "
        "method).",
        "statistical",
        verdict,
        measured,
        bound,
        formula="θ ~ p(θ), u ~ p(u | θ), θ₁…θ_L ~ q(θ | u)  ⇒  #{l : f(θ_l, u) < f(θ, u)} ~ Uniform{0, …, L}",
        **more,
    )


def _words(method: str) -> str:
    return method.replace("_", " ")


def _figure(every: Mapping[str, Ranks]) -> Any:
    """ECDF of the ranks of a few quantities, each method that was ranked in a panel."""
    quantities = len(next(iter(every.values())).ranks)
    level = 1 - ERROR / quantities
    band = rank_band(len(next(iter(next(iter(every.values())).ranks.values()))), level)
    uniform = {_words(name): found.uniform() for name, found in every.items()}
    return plotting.plot_rank_bands(uniform, (band.points, band.low, band.high), level)


def _export(path: Path, study: Study, ranks: Mapping[str, Ranks]) -> None:
    """Write the ranks in the form in which the package carries them."""
    environment = describe(torch.device("cpu"), torch.float64, study.seed)
    origin = "{date}, {command}, seed {seed}, {processor}".format(**environment)
    plain = {
        name: {label: [int(rank) for rank in values] for label, values in found.ranks.items()}
        for name, found in ranks.items()
    }
    write_json(path, {"schema": 1, "origin": origin, "study": vars(study), "ranks": plain})


def _committed(study: Study) -> tuple[dict[str, Ranks], str]:
    """Ranks of the long study that ship with the package, where they are of the same study, and their origin."""
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
