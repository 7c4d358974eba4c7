import pytest

from probattn.inference.claims import Subject
from probattn.inference.language import LanguageFit, fit_language
from probattn.models import LanguageModel, load_corpus
from probattn.models.language import LanguageConfig


@pytest.fixture(scope="session")
def corpus():
    return load_corpus()


@pytest.fixture(scope="session")
def fitted(corpus):
    """A small language model after a few steps on real text."""
    model = LanguageModel(
        LanguageConfig(len(corpus.vocabulary), context=24, dim=8, layers=1, decoder_heads=2, stage_rank=3)
    )
    windows = corpus.windows(24)
    values, _ = fit_language(model, windows, LanguageFit(steps=30, evaluate_every=10, learning_rate=1e-2))
    return model, values


@pytest.fixture(scope="session")
def subject(corpus, fitted):
    model, values = fitted
    heldout = corpus.windows(24, heldout=True)
    total = len(corpus.windows(24).inputs)
    return Subject(model, values, heldout.inputs[:64], heldout.targets[:64], total, corpus=corpus)
