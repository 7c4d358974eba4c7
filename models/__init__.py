"""Generative models in Pyro, simulators, and the corpora that feed them."""

from probattn.models.corpus import Corpus, load_corpus
from probattn.models.embedding import EmbeddingModel
from probattn.models.initialisation import folded_share, init_to_feasible
from probattn.models.language import LanguageModel
from probattn.models.scalar import ScalarModel
from probattn.models.simulate import Simulation, simulate

__all__ = [
    "Corpus",
    "EmbeddingModel",
    "LanguageModel",
    "ScalarModel",
    "Simulation",
    "folded_share",
    "init_to_feasible",
    "load_corpus",
    "simulate",
]
