"""The claims of the theory, one file each, and what a verdict is."""

from probattn.inference.claims.claim import Claim, Subject
from probattn.inference.claims.ledger import CLAIMS, run_claims

__all__ = ["CLAIMS", "Claim", "Subject", "run_claims"]
