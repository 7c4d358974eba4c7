"""A history of training and a record of a run, as the report of verify takes them."""

from probattn.models.language import LanguageConfig

HISTORY = {
    name: [1.0, 0.5] for name in ("step", "objective", "cross_entropy", "barrier", "smallest_margin", "embedding_norm")
}
RECORD = {
    "environment": {
        "command": "probattn verify",
        "date": "2026-01-01",
        "seed": 0,
        "dtype": "float64",
        "device": "cpu",
        "processor": "one",
        "cores": 2,
        "threads": 2,
        "python": "3.11",
        "versions": {"torch": "2"},
    },
    "corpus": {"characters": 1, "heldout_characters": 1, "vocabulary": 2},
    "model": LanguageConfig(3).as_dict(),
    "fit": {"stopped": "steps"},
}
