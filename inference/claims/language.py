"""The results that the two claims on language models are judged by: measured now, in short, or those that ship."""

from __future__ import annotations

from collections.abc import Callable

from probattn.errors import InputError
from probattn.inference.claims.claim import Settings, Subject
from probattn.inference.runtime.environment import describe, select_device
from probattn.inference.runtime.files import prepare_folder, write_json
from probattn.inference.studies.language.plan import Plan
from probattn.inference.studies.language.quick import QUICK, quick_tables
from probattn.inference.studies.language.results import Results, committed_results, read_results, summarise
from probattn.inference.studies.language.run import measure
from probattn.inference.studies.language.source import load_source
from probattn.models.options import as_plain

__all__ = ["QUICK_WORDS", "Load", "language_results"]

Load = Callable[[Subject, Settings], Results]

QUICK_WORDS = (
    f" (Quick form: a character model of {QUICK.growth.layers} layers and {QUICK.growth.dim} features, trained for "
    f"{QUICK.growth.training_steps} steps.)"
)
"""Added to a statement that was measured in the quick form."""


def language_results(subject: Subject, settings: Settings) -> Results:
    """Measure, or read what was measured.

    Args:
        subject: the fitted model, for its text.
        settings: ``full`` with ``named`` measures SmolLM2-135M on the held-out text, which takes an hour or more
            without a GPU and goes on from what is in ``folder``. ``full`` alone reads the results that ship with the
            package. Otherwise a small model of our own is trained and measured in seconds.

    Returns:
        Results; their record is empty in the quick form.

    Raises:
        InputError: no text, a text that is too short, or a package or model that is missing.
    """
    if settings.full and not settings.named:
        results = committed_results()
        if results is not None:
            return results
    corpus = subject.corpus
    if corpus is None:
        raise InputError("no text was given to measure a language model on")
    if not (settings.full and settings.named and settings.folder is not None):
        return summarise(quick_tables(corpus, subject.seed), resamples=300, seed=subject.seed)
    plan, folder = Plan(seed=subject.seed), prepare_folder(settings.folder / "language")
    source = load_source(corpus.name, corpus.heldout, None, plan)
    device = select_device("auto")
    model = source.model.to(device)
    record = {"schema": 1, "environment": describe(device, next(model.parameters()).dtype, plan.seed), **source.record}
    write_json(folder / "study.json", {**record, "plan": as_plain(plan)})
    measure(model, source.ids, plan, corpus=corpus, folder=folder)
    return read_results(folder)
