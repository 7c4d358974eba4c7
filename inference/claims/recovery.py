"""Claim: posterior intervals of the identified product A contain the truth as often as stated."""

from __future__ import annotations

import logging
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

_LOG = logging.getLogger(__name__)

# Known matrices A: attraction, repulsion, a rotation, and a saddle.
TRUTHS = (
    ((0.08, 0.03), (-0.03, 0.05)),
    ((-0.10, 0.00), (0.05, -0.05)),
    ((0.00, 0.08), (-0.08, 0.00)),
    ((0.06, 0.05), (0.05, -0.04)),
)
STUDY = Study(replicates=200, sequences=8, length=16, prior_scale=0.5, noise_spread=0.5)
_LARGER = 4  # ratio of the two numbers of sequences
ERROR = 0.01
_LEVELS = (0.5, 0.9)
_CURVE = np.arange(0.1, 1.0, 0.1)


def recovery_claim(settings: Settings, *, study: Study = STUDY) -> Claim:
    """Measure coverage at 50 and 90 % and the fall of the error with the data, with and without the Jacobian.

    Args:
        settings: the measurement needs ``full``.
        study: number of replicates (a multiple of the four truths) and of sequences, their length, and the weak prior.
    """
    if not settings.full:
        return _claim("not_run", condition="it takes minutes: run probattn verify --full")
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
        for label, name in (("with the Jacobian", "laplace"), ("without", "laplace_without_jacobian")):
            store = None if settings.folder is None else settings.folder / f"recovery-{name}-{size}.json"
            _LOG.info("recovery by %s, %s sequences", name, size)
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
        condition=f"the regime is certified and there are at least {sizes[0]} sequences of {study.length} tokens"
        if holds
        else None,
        control="Without the Jacobian, on the same data, 90 % intervals contain an entry of A in as few as "
        f"{measured[naive]:.0%} of the replicates at N = {sizes[1]}, and four times the data divide the error by only "
        f"{measured['naive_error_ratio']:.2f}.",
        finding=f"{measured[f'certified_share_{sizes[0]}']:.1%} of the sequences are certified. Four times the data "
        f"divide the error by {measured['error_ratio']:.2f}; the square root is 2. The factors W_Q and W_K are not "
        "identified and are not recovered.",
        figures={"recovery": plotting.plot_recovery(_CURVE, curves, (_CURVE - half, _CURVE + half), sizes, errors)},
    )


def _claim(verdict: Any, **more: Any) -> Claim:
    more = {"measured": {}, "bound": {}, **more}
    return Claim(
        "recovery",
        "Central posterior intervals of 50 and 90 % contain each entry of the product A = c W_Kᵀ W_Q, from which the "
        f"sequences were simulated, in 50 and 90 % of the replicates (family-wise error {ERROR:.0%}).",
        "statistical",
        verdict,
        more.pop("measured"),
        more.pop("bound"),
        formula="P(A ∈ C₉₀(u)) = 0.9,  P(A ∈ C₅₀(u)) = 0.5,  u ~ LatentAttention(A, σ)",
        **more,
    )


def _simulate(study: Study) -> Simulated:
    """Draw data sets from the known matrices in turn, with unit noise."""
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
    """Return the share of replicates whose interval contains each entry at each level, (entries, levels)."""
    return np.array([[ranks.coverage(float(level))[name] for level in levels] for name in names])


def _chance(count: int, level: float, error: float) -> float:
    """Largest distance of a share of ``count`` from its probability, except with the given error probability."""
    low, high = binom.ppf([error / 2, 1 - error / 2], count, level) / count
    return float(max(level - low, high - level))
