"""Costs as ratios, measured in one run."""

from probattn.inference.bench.harness import Row, race

__all__ = ["Row", "race"]
