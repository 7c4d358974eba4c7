"""Claim: an attractive process below the boundary of its spread has a stationary distribution. It does not: it drifts.

In mean field the mean m of the past obeys dm / d log n = aV / (1 - aV) m. For a > 0 the fixed point m = 0 is unstable:
m grows as a power of n, and widens the spread until that crosses its boundary from below. Long runs of the process are
compared with this flow, with the mean free and with the mean held at zero.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probattn import plotting
from probattn.inference.claims.claim import Claim, Settings, Verdict, judge, worst
from probattn.mean_field import mean_field_flow
from probattn.models.long_run import LongRun, long_run
from probattn.models.scalar import scalar_attention

__all__ = ["stationary_distribution_claim"]

_LOG = logging.getLogger(__name__)

Array = NDArray[np.float64]

ERROR = 0.01
FLOW_GAP = 0.15  # largest difference of a median spread from its mean-field flow, relative
_BELOW = (0.05, 0.10, 0.13)  # a sigma^2 below the boundary, with sigma = 1
_REPULSION = -1.0
_LIMIT = 10.0  # spread at which a repulsive run counts as escaped; its stationary value is 0.47
_RESAMPLES = 5000


class _Size(NamedTuple):
    lengths: tuple[int, ...]
    sequences: int
    slopes: tuple[float, ...]


_QUICK = _Size((25, 50, 100, 200), 40, _BELOW)
_FULL = _Size((25, 50, 100, 200, 400, 800), 100, (*_BELOW, 0.148, 0.17, 0.20))


def stationary_distribution_claim(settings: Settings, *, run: Callable[..., LongRun] = long_run) -> Claim:
    r"""Test whether the mean of the tokens stops growing, for attraction below the boundary of the spread.

    The number that decides is the growth of the median of ``|mean of u_1..n|`` from the first length to the last. In a
    stationary process it falls towards the mean of the stationary distribution, which is zero by symmetry; the claim
    does not hold if the growth at some slope is above one, by a bootstrap over the sequences with a family-wise error
    of one percent.

    Two controls decide whether the runs can be trusted: with repulsion, which is stationary in mean field, the growth
    must be below one and no run may escape; and the median spreads must follow the mean-field flow.

    Args:
        settings: ``full`` takes more and longer runs.
        run: the simulator under test, with the signature of :func:`~probattn.models.long_run.long_run`.
    """
    size = _FULL if settings.full else _QUICK
    _LOG.info("stationary distribution: long runs")
    slopes = torch.tensor(size.slopes, dtype=torch.float64)
    runs = {
        label: run(scalar_attention(slopes), 1.0, list(size.lengths), size.sequences, symmetric=held, limit=1 / slopes)
        for label, held in (("mean free", False), ("mean held at zero", True))
    }
    flows = {label: _flow(found, slopes, held=label != "mean free") for label, found in runs.items()}
    free = runs["mean free"]
    measured: dict[str, float] = {}
    for k, slope in enumerate(_BELOW):
        growth, low, high = _growth(free.mean[:, k, :, 0], ERROR / len(_BELOW))
        measured |= {f"growth_{slope:g}": growth, f"growth_{slope:g}_low": low, f"growth_{slope:g}_high": high}
    for label, name in (("mean free", "free"), ("mean held at zero", "held")):
        escaped = torch.isfinite(runs[label].escape).double().mean(-1)
        measured |= {f"escaped_{name}_{slope:g}": float(escaped[k]) for k, slope in enumerate(size.slopes)}
        measured[f"unsolved_{name}"] = runs[label].unsolved
    measured["flow_gap"] = worst(*(_gap(_median(found), flows[label]) for label, found in runs.items()))
    repelled = run(
        scalar_attention(torch.tensor([_REPULSION], dtype=torch.float64)),
        1.0,
        list(size.lengths),
        size.sequences,
        limit=_LIMIT,
    )
    control, _, control_high = _growth(repelled.mean[:, 0, :, 0], ERROR)
    measured |= {"control_growth_repulsion": control, "control_growth_repulsion_high": control_high}
    measured["control_escaped_repulsion"] = float(torch.isfinite(repelled.escape).double().mean())

    bound = {f"growth_{slope:g}_low": 1.0 for slope in _BELOW}
    steady = control_high < 1 and measured["control_escaped_repulsion"] == 0
    controlled = steady and measured["flow_gap"] <= FLOW_GAP
    verdict: Verdict = "supported" if judge(measured, bound) else "not_supported"
    last, near = size.lengths[-1], f"{_BELOW[-1]:g}"
    return Claim(
        "stationary-distribution",
        "An attractive process with 0 < a σ² ≤ 4/27 has a stationary distribution.",
        "statistical",
        verdict if controlled else "not_run",
        measured,
        bound,
        None if controlled else "a control failed: the runs do not behave as mean field says where it is certain",
        formula="dm/d log n = aV/(1 − aV) m  ⇒  |m| grows as n^{aV/(1 − aV)} for a > 0, and falls for a < 0",
        control=f"With repulsion, a σ² = {_REPULSION:g}, the mean falls to {control:.2f} of its size and "
        f"{measured['control_escaped_repulsion']:.0%} of the runs escape: there the claim would hold.",
        finding=f"From n = {size.lengths[0]} to {last} the median size of the mean grows by a factor of "
        f"{_words(measured[f'growth_{near}'])} [{_words(measured[f'growth_{near}_low'])}, "
        f"{_words(measured[f'growth_{near}_high'])}] at a σ² = {near}. In mean field this growth is slow and has no "
        "end, and it carries the spread over its boundary: at the same a σ², "
        f"{measured[f'escaped_free_{near}']:.0%} of the runs have escaped by n = {last}, against "
        f"{measured[f'escaped_held_{near}']:.0%} with the mean held at zero. Repulsion is stationary in mean field.",
        figures={
            "growth": plotting.plot_growth(
                np.array(size.lengths),
                size.slopes,
                {label: (_median(found), flows[label]) for label, found in runs.items()},
            ),
        },
    )


def _words(number: float) -> str:
    return f"{number:.2f}" if math.isfinite(number) else "∞"


def _growth(mean: Tensor, error: float) -> tuple[float, float, float]:
    """Growth of the median ``|mean|`` from the first length to the last, with the ends of its bootstrap interval.

    Args:
        mean: mean of the tokens so far, (lengths, sequences); inf for a sequence that has escaped.
        error: probability that the truth lies below the lower end, and that it lies above the upper one.
    """
    first, last = (row.abs().numpy() for row in (mean[0], mean[-1]))
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(first), size=(_RESAMPLES, len(first)))
    found = np.median(last[chosen], axis=1) / np.median(first[chosen], axis=1)
    # No interpolation: a quantile between a number and infinity is one of the two.
    low, high = np.quantile(found, (error, 1 - error), method="nearest")
    return float(np.median(last) / np.median(first)), float(low), float(high)


def _median(run: LongRun) -> Array:
    """Return the median spread over the sequences, (slopes, lengths)."""
    found: Tensor = run.covariance[..., 0, 0].median(-1)[0]  # (lengths, slopes)
    return found.T.numpy()


def _gap(measured: Array, flow: Array) -> float:
    """Largest relative difference of the median spread from its flow at the last length, below the boundary."""
    below = slice(len(_BELOW))
    return float(np.abs(flow[below, -1] / measured[below, -1] - 1).max())


def _flow(run: LongRun, slopes: Tensor, *, held: bool) -> Array:
    """Return the median mean-field flow, each sequence from its own state at the first length, (slopes, lengths)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    curves = []
    for k, slope in enumerate(slopes.tolist()):
        flows = []
        for mean, covariance in zip(run.mean[0, k], run.covariance[0, k], strict=True):
            if not bool(torch.isfinite(covariance).all()):
                flows.append(np.full(len(run.lengths), np.inf))
                continue
            begin = torch.zeros_like(mean) if held else mean
            _, path = mean_field_flow(scalar_attention(slope), one, run.lengths, covariance, begin, cap=1 / slope)
            flows.append(path[:, 0, 0].numpy())
        curves.append(np.median(np.array(flows), axis=0))
    return np.array(curves)
