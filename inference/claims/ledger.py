"""All claims in order, and running them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from probattn.inference.claims.barrier import barrier_claim
from probattn.inference.claims.claim import Claim, Subject
from probattn.inference.claims.jacobian import jacobian_claim
from probattn.inference.claims.margin import margin_claim
from probattn.inference.claims.normalisation import normalisation_claim
from probattn.inference.claims.objective import objective_claim

__all__ = ["CLAIMS", "run_claims"]

CLAIMS: Mapping[str, Callable[[Subject], Claim]] = MappingProxyType(
    {
        "jacobian": jacobian_claim,
        "barrier": barrier_claim,
        "margin": margin_claim,
        "normalisation": normalisation_claim,
        "objective": objective_claim,
    }
)


def run_claims(subject: Subject, report: Callable[[Claim], None] | None = None) -> list[Claim]:
    """Measure every claim on a fitted model.

    Args:
        subject: the fitted model and its text.
        report: called with each claim as soon as it is judged.
    """
    claims = []
    for measure in CLAIMS.values():
        start = time.perf_counter()
        claim = measure(subject)
        claim = replace(claim, seconds=time.perf_counter() - start)
        claims.append(claim)
        if report is not None:
            report(claim)
    return claims
