"""The study in seconds: a small model of our own, trained for a moment on the subject's text."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from probattn.inference.studies.language.growth import grow
from probattn.inference.studies.language.plan import Growth, Plan
from probattn.inference.studies.language.run import measure
from probattn.inference.studies.robustness.training import one_thread
from probattn.models.corpus import Corpus

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["QUICK", "quick_tables"]

QUICK = Plan(
    windows=12,
    length=40,
    control_windows=12,
    control_stride=2,
    eigenvalue_stride=2,
    draws=12,
    chunk=12,
    eigenvalue_chunk=12,
    growth=Growth(
        layers=3,
        dim=24,
        heads=3,
        context=48,
        training_steps=200,
        batch=16,
        learning_rate=1e-2,
        looks=4,
        measured_windows=6,
        stride=8,
        runs=0,  # the model itself is the one that is looked at while it grows
    ),
)
"""Sizes of the quick form."""


@lru_cache(maxsize=1)  # two claims are measured on the same tables
def quick_tables(corpus: Corpus, seed: int, plan: Plan = QUICK) -> dict[str, Dataset]:
    """Train a small model and measure everything on it.

    Args:
        corpus: text to train on, and held-out text to measure on.
        seed: random seed.
        plan: sizes.

    Returns:
        Tables as :func:`~probattn.inference.studies.language.run.measure` returns them; not to be written to.

    Raises:
        InputError: a text that does not fill the windows, or ``transformers`` is not installed.
    """
    with one_thread():
        model, grown = grow(plan.growth, corpus, seed)
        held = corpus.windows(plan.length, heldout=True).inputs
        ids = held[:: max(1, len(held) // plan.windows)][: plan.windows]
        return measure(model, ids, plan, tables={"growth": grown.expand_dims(run=[0])})
