"""Words of the page of support tokens: margins, maps, scales, and what a margin does not mean."""

from __future__ import annotations

from typing import Any, NamedTuple

from probattn.hf.margins import Kind, Map

__all__ = ["KINDS", "MAP_WORDS", "KindWords", "sensitivity_words"]


class KindWords(NamedTuple):
    """A margin in words, with the scale of its colours, which is the same for every text and model.

    Attributes:
        title: its symbol.
        short: its name in the list of margins.
        meaning: one or two sentences.
        neutral: its value where attention does nothing, J = I, shown without colour.
        toward: the value at which the colours of the boundary are deepest.
        away: the value at which those of the other side are.
        ticks: the three of them in words.
        beyond: how many blocks lie beyond the boundary, in words; empty where the margin cannot tell.
    """

    title: str
    short: str
    meaning: str
    neutral: float
    toward: float
    away: float
    ticks: tuple[str, str, str]
    beyond: str

    def as_data(self) -> dict[str, Any]:
        """Plain values for the page's script."""
        return self._asdict()


KINDS: dict[Kind, KindWords] = {
    "sigma_min": KindWords(
        "σ_min",
        "singular value",
        "The smallest singular value of J: the distance from J to the nearest singular matrix.",
        1.0,
        0.0,
        2.0,
        ("0, boundary", "1, no attention", "≥ 2, away"),
        "",
    ),
    "logabsdet": KindWords(
        "log|det J|",
        "log-determinant",
        "The logarithm of the factor by which the map changes volume at the token. The list ranks by |det J|, whatever "
        "its sign; the boundary is at minus infinity, and beyond it det J is negative.",
        0.0,
        -60.0,
        60.0,
        ("≤ −60, nearer", "0, no attention", "≥ 60, away"),
        "have a negative determinant",
    ),
    "spectral": KindWords(
        "1 − λ",
        "real eigenvalue",
        "1 minus the largest real eigenvalue of I − J. Where it is negative, attention turned up from nothing to its "
        "full strength makes J singular on the way.",
        1.0,
        0.0,
        2.0,
        ("0, boundary", "1, no attention", "≥ 2, away"),
        "have a real eigenvalue beyond 1",
    ),
    "complex": KindWords(
        "1 − Re λ",
        "complex eigenvalue",
        "1 minus the largest real part of all eigenvalues of I − J, complex pairs included: where it is positive, "
        "relaxation towards the token's solution converges.",
        1.0,
        0.0,
        2.0,
        ("0, boundary", "1, no attention", "≥ 2, away"),
        "have an eigenvalue beyond 1",
    ),
}

MAP_WORDS: dict[Map, dict[str, str]] = {
    "generator": {
        "title": "generator, u − μ(u)",
        "meaning": "J = I − M with M = dμ/du. Were the token attention plus noise, u = μ(u) + ε, this would be the map "
        "from token to noise; its determinant makes the density.",
    },
    "update": {
        "title": "update, u + μ(u)",
        "meaning": "J = I + M with M = dμ/du: what the network itself does to the token. Its boundary is another one.",
    },
}

# Spearman, mean over layers of log sigma_min against the KL divergence of the prediction under noise on the embeddings,
# SmolLM2-135M-Instruct, texts of 53, 126 and 129 tokens.
_TRIAL = (0.36, 0.17, -0.13)


def sensitivity_words() -> str:
    """Sentence on how well margins tell the sensitivity of a network to noise, from the results in the package.

    Where there are none, of a small trial.
    """
    from probattn.inference.studies.language.prediction import DECISIVE
    from probattn.inference.studies.language.results import committed_results

    results = committed_results()
    if results is None or results.prediction is None:
        shown = [_signed(value) for value in _TRIAL]
        return (
            "In a small trial with SmolLM2-135M, the rank correlation of σ_min (its logarithm, mean over layers) with "
            f"the change of the prediction under noise on the embeddings was {shown[0]}, {shown[1]} and {shown[2]} on "
            "three texts."
        )
    prediction = results.prediction
    row = prediction.predictors.index("generator_sigma_min_mean")
    parts = []
    for given in ("alone", "given position and entropy"):
        band = prediction.bands[DECISIVE][given]
        low, estimate, high = (_signed(band[end][row]) for end in ("low", "estimate", "high"))
        parts.append(f"{estimate} [{low}, {high}] {given}")
    return (
        f"Measured on {results.record['model']['name']}: the rank correlation of a small σ_min (minus its logarithm, "
        "mean over layers) with the change of the prediction under noise on the embeddings is "
        f"{parts[0]} and {parts[1]} of the prediction, with 95 % intervals."
    )


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "\u2212")
