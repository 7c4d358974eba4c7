import pytest

from probattn.inference.claims import Subject
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.map import MapConfig, fit_map
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
    config = MapConfig(steps=30, evaluate_every=10, learning_rate=1e-2)
    target = LogDensity(model, *windows)
    mode = fit_map(target, config, start=target.unconstrain(model.initial_values(0)))
    return model, target.constrain(mode.z[0, 0])


@pytest.fixture(scope="session")
def subject(corpus, fitted):
    model, values = fitted
    heldout = corpus.windows(24, heldout=True)
    total = len(corpus.windows(24).inputs)
    return Subject(model, values, heldout.inputs[:64], heldout.targets[:64], total, corpus=corpus)
