r"""Margins as predictors of a language model's sensitivity to noise, and of its surprise.

Everything below was listed before anything was measured. A predictor is a score per token, large where the margin is
small, so that the predicted correlation is positive: -log|det J|, -log sigma_min, minus the spectral or the complex
margin; of the generator's blocks I - M or of the network's own I + M; its mean over all layers, over the first, middle
or last third of them, or its largest value over layers. The decisive target is the divergence of the next-token
distribution under noise of a tenth of the embeddings' root mean square on the whole context, for tokens behind the
first 16; the decisive number is the partial rank correlation given position and entropy of the distribution. All
intervals of one target hold at once with 95 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from probattn.errors import InputError
from probattn.hf.margins import Kind, Map
from probattn.inference.studies.language.location import FIRST
from probattn.inference.studies.language.plain import rounded
from probattn.inference.studies.language.statistics import (
    Array,
    partial_correlations,
    rank_correlations,
    resample_texts,
    simultaneous_band,
)
from probattn.inference.studies.language.tables import Tables

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["DECISIVE", "GIVEN", "OTHERS", "SUMMARIES", "TARGETS", "Prediction", "predict", "predictor_names"]

SUMMARIES = ("mean", "early", "middle", "late", "largest")
"""Summaries of a score over layers."""

DECISIVE = "kl_all_0.1"
TARGETS = (DECISIVE, "kl_all_0.3", "kl_last_0.1", "next_surprisal", "surprisal")
"""Targets of the prediction, divergences under noise and the surprisal of the next token and of the token itself."""

GIVEN: Mapping[str, tuple[str, ...]] = {
    "alone": (),
    "given position": ("position",),
    "given position and entropy": ("position", "entropy"),
}

OTHERS = (
    "entropy",
    "norm",
    "position",
    "head_alone_sigma_min",
    "head_alone_logabsdet",
    "turned_head_alone_sigma_min",
    "turned_head_alone_logabsdet",
    "local_all",
    "local_last",
)
"""Simpler predictors and controls, with which the margins are compared."""

_PERMUTED = 20  # permutations of a predictor across tokens; of their 95 % intervals a few may miss zero by chance


@dataclass(frozen=True)
class Prediction:
    """Summary of the study for the claim ``decoding``; plain numbers and lists.

    Attributes:
        facts: numbers by name: texts, tokens, controls.
        predictors: names of the predictors under test, K of them.
        bands: partial rank correlations by target and what is given: ``estimate``, ``low``, ``high``, K numbers each.
        others: the same for simpler predictors and controls, each with an interval of its own, in the order of
            :data:`OTHERS`.
        leads: decisive correlation of each predictor given position, less that of the entropy, both in absolute value:
            as in ``bands``.
        points: a few hundred tokens for a figure: ``score``, ``sensitivity``, ``entropy``.
    """

    facts: dict[str, float]
    predictors: list[str]
    bands: dict[str, dict[str, dict[str, list[float]]]]
    others: dict[str, dict[str, dict[str, list[float]]]]
    leads: dict[str, list[float]]
    points: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, to five digits."""
        plain: dict[str, Any] = rounded(vars(self))
        return plain

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Prediction:
        """Read a summary that :meth:`as_dict` wrote."""
        return cls(**content)


def predictor_names() -> list[str]:
    """Names of all predictors, MAP_KIND_SUMMARY, in the order of the list above.

    Example:
        >>> len(predictor_names()), predictor_names()[0]
        (40, 'generator_logabsdet_mean')
    """
    return [f"{one}_{kind}_{how}" for one in get_args(Map) for kind in get_args(Kind) for how in SUMMARIES]


def scores(table: Dataset, one: str, kind: str) -> dict[str, Array]:
    """Scores per token by summary over layers, ``(N, S)`` each; none where the table lacks the margin.

    Args:
        table: margins, with dimensions sequence, layer and token.
        one: "generator" or "update".
        kind: kind of margin.
    """
    name = kind if one == "generator" else f"update_{kind}"
    if name not in table:
        return {}
    margin = table[name].transpose("sequence", "layer", "token").values.astype(float)
    score = -np.log(margin) if kind == "sigma_min" else -margin
    layers = score.shape[1]
    thirds = np.array_split(np.arange(layers), 3) if layers >= 3 else [np.arange(layers)] * 3
    return {
        "mean": score.mean(1),
        **{how: score[:, third].mean(1) for how, third in zip(("early", "middle", "late"), thirds, strict=True)},
        "largest": score.max(1),
    }


def predict(tables: Tables, *, resamples: int = 1000, seed: int = 0) -> Prediction:
    """Correlate the margins with the sensitivity.

    Args:
        tables: tables of the study; "text" and "noise" at least.
        resamples: number of bootstrap resamples of whole texts.
        seed: random seed for resamples and permutations.

    Returns:
        :class:`Prediction`.

    Raises:
        InputError: a table is missing, or fewer than two texts are in both.
    """
    for name in ("text", "noise"):
        if name not in tables:
            raise InputError(f"the tables hold no {name!r}; measure that table first.")
    shared = np.intersect1d(tables["text"].sequence.values, tables["noise"].sequence.values)
    if len(shared) < 2:
        raise InputError(f"{len(shared)} texts have both margins and noise; at least 2 are needed.")
    text, noise = tables["text"].sel(sequence=shared), tables["noise"].sel(sequence=shared)
    base = _base(text, noise)
    weights = resample_texts(len(shared), resamples, seed)
    groups = [_scores_at(text, ("logabsdet", "sigma_min"))]
    if "text-eigenvalues" in tables:
        eigen = tables["text-eigenvalues"]
        if set(shared) <= set(eigen.sequence.values.tolist()):
            groups.append(_scores_at(eigen.sel(sequence=shared), ("spectral", "complex")))
    found = [_correlated(columns, base, positions, weights) for columns, positions in groups]

    names = [name for columns, _ in groups for name in columns]
    order = [name for name in predictor_names() if name in names]
    place = [names.index(name) for name in order]
    texts = len(shared)
    every = {key: np.concatenate([part[key] for part in found], 1)[:, place] for key in found[0]}
    bands = {
        target: {given: simultaneous_band(every[target, given], texts=texts).as_lists() for given in GIVEN}
        for target in TARGETS
    }
    whole = _correlated({}, base, groups[0][1], weights, with_others=True)
    others = {target: {given: _single(whole[target, given], texts) for given in GIVEN} for target in TARGETS}
    entropy = np.abs(whole[DECISIVE, "given position"][:, OTHERS.index("entropy")])[:, None]
    own = np.abs(every[DECISIVE, "given position"])
    leads = simultaneous_band(own - entropy, texts=texts).as_lists()
    facts = {
        "texts": float(texts),
        "tokens": _tokens(base, groups[0][1]),
        "eigenvalue_tokens": _tokens(base, groups[1][1]) if len(groups) > 1 else 0.0,
        "predictors": float(len(order)),
        **_controls(groups[0][0], base, groups[0][1], weights, seed),
    }
    return Prediction(facts, order, bands, others, leads, _points(groups[0], base, seed))


def _base(text: Dataset, noise: Dataset) -> dict[str, Array]:
    """Targets and simpler predictors at all tokens, ``(N, T)`` each."""
    shape = (text.sizes["sequence"], text.sizes["token"])
    surprisal = text.surprisal.values.astype(float)
    following = np.full(shape, np.nan)
    following[:, :-1] = surprisal[:, 1:]
    found = {name: noise[name].values.astype(float) for name in (*TARGETS, *OTHERS) if name in noise}
    # The heads' own margins are stored as they are; a score is large where the margin is small.
    found |= {name: -values for name, values in found.items() if "head_alone" in name}
    found |= {"surprisal": surprisal, "next_surprisal": following, "entropy": text.entropy.values.astype(float)}
    found["position"] = np.broadcast_to(text.token.values.astype(float), shape)
    return found


def _scores_at(table: Dataset, kinds: Sequence[str]) -> tuple[dict[str, Array], Array]:
    """Scores by name, ``(N, S)`` each, and the positions of their tokens, all behind the first few."""
    kept = table.token.values >= FIRST
    found = {
        f"{one}_{kind}_{how}": values[:, kept]
        for one in get_args(Map)
        for kind in kinds
        for how, values in scores(table, one, kind).items()
    }
    return found, table.token.values[kept]


def _correlated(
    columns: Mapping[str, Array],
    base: Mapping[str, Array],
    positions: Array,
    weights: Array,
    *,
    with_others: bool = False,
) -> dict[tuple[str, str], Array]:
    """Partial rank correlations of the columns, ``(1 + R, K)``, by target and what is given."""
    names = list(OTHERS) if with_others else list(columns)
    tested = [base[name][:, positions] if with_others else columns[name] for name in names]
    rest = [*TARGETS, "position", "entropy"]
    correlations = rank_correlations(np.stack([*tested, *(base[name][:, positions] for name in rest)]), weights)
    index = {name: len(names) + k for k, name in enumerate(rest)}
    return {
        (target, given): partial_correlations(correlations, index[target], [index[name] for name in conditions])[
            :, : len(names)
        ]
        for target in TARGETS
        for given, conditions in GIVEN.items()
    }


def _tokens(base: Mapping[str, Array], positions: Array) -> float:
    """Number of tokens at some positions that have a successor, whose surprisal is among the targets."""
    return float((~np.isnan(base["next_surprisal"][:, positions])).sum())


def _controls(
    columns: Mapping[str, Array], base: Mapping[str, Array], positions: Array, weights: Array, seed: int
) -> dict[str, float]:
    """The positive control, permutations of a predictor, and the heads' margin in another basis."""
    rng = np.random.default_rng(seed)
    target = base[DECISIVE][:, positions]
    score = next(iter(columns.values()))
    permuted = [rng.permutation(score.ravel()).reshape(score.shape) for _ in range(_PERMUTED)]
    local = base["local_all"][:, positions]
    heads = [base[f"{prefix}head_alone_sigma_min"][:, positions] for prefix in ("", "turned_")]
    # The decisive correlation, for the permuted predictors.
    conditions = [base[name][:, positions] for name in GIVEN["given position and entropy"]]
    correlations = rank_correlations(np.stack([*permuted, target, *conditions]), weights)
    null = partial_correlations(correlations, _PERMUTED, [_PERMUTED + 1, _PERMUTED + 2])[:, :_PERMUTED]
    low, high = np.quantile(null[1:], (0.025, 0.975), axis=0)
    sample = np.ones((1, weights.shape[1]))
    return {
        "control_positive_rho": float(rank_correlations(np.stack([local, target]), sample)[0, 0, 1]),
        "control_negative_holds_zero": float(((low <= 0) & (high >= 0)).mean()),
        "control_negative_largest_rho": float(np.abs(null[0]).max()),
        "control_head_alone_after_turning": float(rank_correlations(np.stack(heads), sample)[0, 0, 1]),
    }


def _points(group: tuple[Mapping[str, Array], Array], base: Mapping[str, Array], seed: int) -> dict[str, list[float]]:
    """Some tokens for a figure."""
    columns, positions = group
    score = columns.get("generator_sigma_min_mean", next(iter(columns.values())))
    shown = np.random.default_rng(seed).permutation(score.size)[:600]
    every = {"score": score, "sensitivity": base[DECISIVE][:, positions], "entropy": base["entropy"][:, positions]}
    return {name: values.ravel()[shown].tolist() for name, values in every.items()}


def _single(samples: Array, texts: int) -> dict[str, list[float]]:
    """Intervals of their own for numbers that are looked at one by one."""
    bands = [simultaneous_band(samples[:, k : k + 1], texts=texts).as_lists() for k in range(samples.shape[1])]
    return {end: [band[end][0] for band in bands] for end in ("estimate", "low", "high")}
