"""The claims of the theory, one file each, and what a verdict is."""

from probattn.inference.claims.claim import Claim, Settings, Subject
from probattn.inference.claims.ledger import CLAIMS, require_claims, run_claims

__all__ = ["CLAIMS", "Claim", "Settings", "Subject", "require_claims", "run_claims"]
