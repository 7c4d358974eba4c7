"""All claims in order, and a function that runs them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from probattn.errors import require_choice
from probattn.inference.claims.barrier import barrier_claim
from probattn.inference.claims.barrier_training import barrier_training_claim
from probattn.inference.claims.bounded import bounded_claim
from probattn.inference.claims.calibration import calibration_claim
from probattn.inference.claims.claim import Claim, Settings, Subject
from probattn.inference.claims.consistency import consistency_claim
from probattn.inference.claims.decoding import decoding_claim
from probattn.inference.claims.implementation import implementation_claim
from probattn.inference.claims.jacobian import jacobian_claim
from probattn.inference.claims.margin import margin_claim
from probattn.inference.claims.normalisation import normalisation_claim
from probattn.inference.claims.objective import objective_claim
from probattn.inference.claims.published import published_claim
from probattn.inference.claims.recovery import recovery_claim
from probattn.inference.claims.robustness import robustness_claim
from probattn.inference.claims.stationarity import stationarity_claim
from probattn.inference.claims.stationary_distribution import stationary_distribution_claim
from probattn.inference.claims.tightness import tightness_claim
from probattn.inference.claims.trained import trained_claim
from probattn.inference.runtime.progress import log_stage

__all__ = ["CLAIMS", "require_claims", "run_claims"]

_LOG = logging.getLogger(__name__)
Measure = Callable[[Subject, Settings], Claim]

#: Measurements (subject, settings) -> claim by id of the claim, in the order of the report.
CLAIMS: Mapping[str, Measure] = MappingProxyType(
    {
        "jacobian": lambda subject, _: jacobian_claim(subject),
        "barrier": lambda subject, _: barrier_claim(subject),
        "barrier-training": lambda subject, _: barrier_training_claim(subject),
        "margin": lambda subject, _: margin_claim(subject),
        "normalisation": normalisation_claim,
        "objective": lambda subject, _: objective_claim(subject),
        "consistency": lambda _, settings: consistency_claim(settings),
        "implementation": lambda subject, _: implementation_claim(subject),
        "stationarity": lambda _, settings: stationarity_claim(settings),
        "stationary-distribution": lambda _, settings: stationary_distribution_claim(settings),
        "bounded": bounded_claim,
        "published": published_claim,
        "recovery": lambda _, settings: recovery_claim(settings),
        "calibration": lambda _, settings: calibration_claim(settings),
        "robustness": robustness_claim,
        "trained": trained_claim,
        "decoding": decoding_claim,
        "tightness": lambda subject, settings: tightness_claim(subject, settings, end=subject.line_feed),
    }
)


def require_claims(names: Sequence[str]) -> None:
    """Refuse claims that do not exist.

    Args:
        names: ids of claims.

    Raises:
        InputError: an id that is not in :data:`CLAIMS`, with those that are.
    """
    for name in names:
        require_choice("claim", name, tuple(CLAIMS))


def run_claims(
    subject: Subject,
    report: Callable[[Claim], None] | None = None,
    *,
    names: Sequence[str] = (),
    settings: Settings | None = None,
) -> list[Claim]:
    """Measure claims on a fitted model.

    Args:
        subject: the fitted model and its text.
        report: function that receives each claim as soon as it is judged.
        names: ids of the claims to measure; empty for all of them, in order.
        settings: size of the measurements; None for a representative part.

    Returns:
        The claims, with the duration of each measurement.

    Raises:
        InputError: an id that is not in :data:`CLAIMS`.
    """
    require_claims(names)
    settings = replace(settings or Settings(), named=bool(names))
    claims = []
    for name, measure in CLAIMS.items():
        if names and name not in names:
            continue
        log_stage(_LOG, f"measuring claim {name}")
        start = time.perf_counter()
        claim = measure(subject, settings)
        claim = replace(claim, seconds=time.perf_counter() - start)
        claims.append(claim)
        if report is not None:
            report(claim)
    return claims
