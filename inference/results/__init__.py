"""Results for ArviZ, their diagnosis, and the comparison of models."""

from probattn.inference.results.diagnosis import Diagnosis, diagnose
from probattn.inference.results.fit_file import Fit

__all__ = ["Diagnosis", "Fit", "diagnose"]
