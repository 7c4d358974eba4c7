"""Claim: from sequences of the certified regime the identified products are recovered, with honest intervals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom

from probattn import plotting
from probattn.inference.claims.claim import Claim, Settings, judge
from probattn.inference.runtime.isolation import isolated
from probattn.inference.studies.calibration import Ranks, Simulated, Study, calibrate
from probattn.models.simulate import draw_data_sets
from probattn.solve.bound import contraction_bound

__all__ = ["recovery_claim"]

# Known matrices A: attraction, repulsion, a rotation, and a saddle.
TRUTHS = (
    ((0.08, 0.03), (-0.03, 0.05)),
    ((-0.10, 0.00), (0.05, -0.05)),
    ((0.00, 0.08), (-0.08, 0.00)),
    ((0.06, 0.05), (0.05, -0.04)),
)
STUDY = Study(replicates=200, sequences=8, length=16, prior_scale=0.5, noise_spread=0.5)
_LARGER = 4  # how many times more sequences the second size has
ERROR = 0.01
_LEVELS = (0.5, 0.9)
_CURVE = np.arange(0.1, 1.0, 0.1)


def recovery_claim(settings: Settings, *, study: Study = STUDY, method: str = "laplace") -> Claim:
    """Coverage at 50 and 90 % and the fall of the error with the data, with the naive posterior beside it.

    Args:
        settings: only ``full`` runs it.
        study: replicates (a multiple of the four truths), sequences, length, and the weak prior of the posterior.
        method: a name of :data:`~probattn.inference.studies.calibration.METHODS` that has a form "..._without_jacobian".
    """
    if not settings.full:
        return _claim("not_run", condition="takes minutes: run probattn verify --full")
    sizes = (study.sequences, _LARGER * study.sequences)
    measured: dict[str, float] = {"replicates": float(study.replicates)}
    bound: dict[str, float] = {}
    curves: dict[str, NDArray[np.float64]] = {}
    errors: dict[str, list[float]] = {"with the Jacobian": [], "without": []}
    tests = 2 * 2 * len(_LEVELS) * len(TRUTHS[0]) ** 2  # two ends, sizes, levels, entries
    for size in sizes:
        sized = replace(study, sequences=size)
        simulated = _simulate(sized)
        measured[f"certified_share_{size}"] = simulated.certified
        measured[f"without_law_{size}"] = float(simulated.redrawn)
        for label, name in (("with the Jacobian", method), ("without", f"{method}_without_jacobian")):
            store = None if settings.folder is None else settings.folder / f"recovery-{name}-{size}.json"
            settings.report(f"recovery by {name}, {size} sequences")
            ranks = calibrate(sized, name, simulated=simulated, jobs=settings.jobs, store=store)
            products = [entry for entry in ranks.ranks if entry.startswith("A[")]
            errors[label].append(float(np.sqrt(np.mean([ranks.errors[entry] ** 2 for entry in products]))))
            curves[f"{label}, N = {size}"] = _coverage(ranks, products, _CURVE).mean(0)
            arm = "" if label == "with the Jacobian" else "naive_"
            for level, covered in zip(_LEVELS, _coverage(ranks, products, np.array(_LEVELS)).T, strict=True):
                measured[f"{arm}coverage_{100 * level:.0f}_N{size}_lowest"] = float(covered.min())
                measured[f"{arm}coverage_{100 * level:.0f}_N{size}_highest"] = float(covered.max())
                gap = f"{arm}coverage_{100 * level:.0f}_N{size}_gap"
                measured[gap] = float(np.abs(covered - level).max())
                if not arm:
                    bound[gap] = _chance(study.replicates, level, ERROR / tests)
    measured["error_ratio"] = errors["with the Jacobian"][0] / errors["with the Jacobian"][1]
    measured["naive_error_ratio"] = errors["without"][0] / errors["without"][1]
    naive = f"naive_coverage_90_N{sizes[1]}_lowest"
    fails = measured[f"naive_coverage_90_N{sizes[1]}_gap"] > bound[f"coverage_90_N{sizes[1]}_gap"]
    holds = judge(measured, bound) and fails
    half = np.array([_chance(study.replicates, level, ERROR) for level in _CURVE])
    return _claim(
        "supported_within" if holds else "not_supported",
        measured=measured,
        bound=bound,
        condition=f"in the certified regime ({measured[f'certified_share_{sizes[0]}']:.0%} of these sequences), from "
        f"{sizes[0]} sequences of {study.length} tokens or more, for A itself: its factors are not identified. Four "
        f"times the data divide the error by {measured['error_ratio']:.2f} (the square root is 2)."
        if holds
        else None,
        control="The posterior without the Jacobian, on the same data: its 90 % intervals hold an entry of A in as few "
        f"as {measured[naive]:.0%} of the replicates at N = {sizes[1]}, and four times the data divide its error by "
        f"{measured['naive_error_ratio']:.2f} only.",
        figures={"recovery": plotting.plot_recovery(_CURVE, curves, (_CURVE - half, _CURVE + half), sizes, errors)},
    )


def _claim(verdict: Any, **more: Any) -> Claim:
    more = {"measured": {}, "bound": {}, **more}
    return Claim(
        "recovery",
        "From sequences of a known attention in the certified regime the identified product A is recovered: central "
        f"posterior intervals of 50 and 90 % hold it as often as they say (family-wise error {ERROR:.0%}).",
        "statistical",
        verdict,
        more.pop("measured"),
        more.pop("bound"),
        formula="P(A ∈ C₉₀(u)) = 0.9,  P(A ∈ C₅₀(u)) = 0.5,  u ~ LatentAttention(A, σ)",
        **more,
    )


def _simulate(study: Study) -> Simulated:
    """Data sets of the known matrices in turn, unit noise."""
    model = study.model()
    truths = torch.tensor(TRUTHS, dtype=torch.float64)
    matrices = truths.repeat(-(-study.replicates // len(truths)), 1, 1)[: study.replicates]
    values = {
        "qk_matrix": matrices.unsqueeze(1),  # one head
        "noise_scale": torch.ones(study.replicates, study.dim, dtype=torch.float64),
    }
    with isolated(seed=study.seed + 7), torch.no_grad():
        u, lawful = draw_data_sets(model, values, study.sequences)
    attention = model.attention_of({name: value.unsqueeze(1) for name, value in values.items()})
    certified = (contraction_bound(attention, u) < 1).all(-1).double().mean()
    return Simulated(values, u, int((~lawful).sum()), float(certified))


def _coverage(ranks: Ranks, names: list[str], levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the replicates that hold each entry at each level, (entries, levels)."""
    return np.array([[ranks.coverage(float(level))[name] for level in levels] for name in names])


def _chance(count: int, level: float, error: float) -> float:
    """How far a share of ``count`` may be from its probability, but for the given error on either side."""
    low, high = binom.ppf([error / 2, 1 - error / 2], count, level) / count
    return float(max(level - low, high - level))
