r"""Place of the blocks of a trained model with respect to the boundary, by layer, beside that of its controls.

Two statistics were chosen before any value was looked at, for tokens behind the first 16 (which hold the sinks of the
attention):

- the *volume*: the median of :math:`\log|\det J_i|` over tokens, by layer;
- the *nearest*: the 1 % quantile of :math:`\sigma_{\min}(J_i)`, the distance to a singular block, by layer.

A layer is *apart* from a control if the interval of the difference excludes zero, and the difference is at least a nat,
or at least 0.05; for the nearest it must also be negative. All intervals of all statistics, over layers and controls,
hold at once with 95 %. A statistic is the work of training if more than half of the layers are apart from every control
that changes the weights and was measured. Shuffled text changes no weight; it is reported apart. So is the 1 % quantile
of the spectral margin, whose eigenvalues cost most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from probattn.errors import InputError
from probattn.inference.studies.language.plain import rounded
from probattn.inference.studies.language.statistics import (
    Array,
    Band,
    resample_texts,
    resampled_means,
    resampled_quantiles,
    simultaneous_band,
)
from probattn.inference.studies.language.tables import Tables

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["FIRST", "NAMES", "ORDERS", "STATISTICS", "Location", "Statistic", "locate", "swapped_apart"]

FIRST = 16
"""Number of tokens at the beginning of a text that are looked at apart."""

ORDERS = (0.01, 0.5, 0.99)
"""Orders of the quantiles that are shown by layer."""

Name = Literal["volume", "nearest", "spectral"]


class Statistic(NamedTuple):
    """A number per layer.

    Attributes:
        kind: kind of margin.
        order: order of its quantile over tokens.
        relevant: smallest difference that counts.
        sign: sign that a difference must have; 0 for either.
        words: what it is.
    """

    kind: str
    order: float
    relevant: float
    sign: int
    words: str


STATISTICS: Mapping[Name, Statistic] = {
    "volume": Statistic("logabsdet", 0.5, 1.0, 0, "median of log|det J|"),
    "nearest": Statistic("sigma_min", 0.01, 0.05, -1, "1 % quantile of the smallest singular value"),
    "spectral": Statistic("spectral", 0.01, 0.05, -1, "1 % quantile of the spectral margin"),
}
"""The first two decide."""

NAMES: Mapping[str, str] = {
    "text": "as trained",
    "random_weights": "random weights",
    "turned_output": "output map turned, one layer at a time",
    "turned_outputs": "output maps turned in all layers",
    "exchanged_output": "output map of another layer",
    "shuffled_text": "shuffled text",
}
"""Groups of measurements in words."""

_UNCHANGED = ("text", "shuffled_text")  # groups whose weights are the model's own
_LEVEL = 1 - 0.05 / len(STATISTICS)  # of each statistic, so that all hold at once with 95 %


@dataclass(frozen=True)
class Location:
    """Summary of the study for the claim ``trained``; plain numbers and lists.

    Attributes:
        facts: numbers by name: texts, tokens, shares of negative determinants with their ends, quantiles.
        layers: numbers of the layers, L of them.
        profiles: quantiles by group, kind and order ("0.01", ...): ``estimate``, ``low``, ``high``, L numbers each.
        differences: trained minus control, by statistic and control, as in ``profiles``.
        apart: layers that are apart, by statistic and control.
        growth: loss, and profiles of small models along their training; empty if none was trained.
        example: margins of one text by kind, layers by tokens.
    """

    facts: dict[str, float]
    layers: list[int]
    profiles: dict[str, dict[str, dict[str, dict[str, list[float]]]]]
    differences: dict[str, dict[str, dict[str, list[float]]]]
    apart: dict[str, dict[str, list[int]]]
    growth: dict[str, Any] = field(default_factory=dict)
    example: dict[str, list[list[float]]] = field(default_factory=dict)

    def holds(self, name: Name) -> bool | None:
        """True if more than half of the layers are apart from every control of the weights; None if not measured."""
        decisive = [layers for control, layers in self.apart.get(name, {}).items() if control not in _UNCHANGED]
        if not decisive:
            return None
        common = set(self.layers).intersection(*decisive)
        return 2 * len(common) > len(self.layers)

    def common(self, name: Name) -> list[int]:
        """Layers that are apart from every control of the weights."""
        decisive = [layers for control, layers in self.apart.get(name, {}).items() if control not in _UNCHANGED]
        return sorted(set(self.layers).intersection(*decisive)) if decisive else []

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, to five digits."""
        plain: dict[str, Any] = rounded(vars(self))
        return plain

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Location:
        """Read a summary that :meth:`as_dict` wrote."""
        return cls(**content)


def locate(tables: Tables, *, resamples: int = 1000, seed: int = 0) -> Location:
    """Summarise the tables of the study.

    Args:
        tables: tables as :func:`~probattn.inference.studies.language.run.measure` returns them; "text" at least.
        resamples: number of bootstrap resamples of whole texts.
        seed: random seed for the resamples.

    Returns:
        :class:`Location`.

    Raises:
        InputError: no table "text".
    """
    if "text" not in tables:
        raise InputError("the tables hold no margins of the text; measure the table 'text' first.")
    groups = {name.removesuffix("-eigenvalues"): None for name in tables if name not in ("noise", "growth")}
    text = tables["text"]
    layers = [int(number) for number in text.layer.values]
    profiles = {
        group: {kind: bands for kind in _KINDS if (bands := _profile(tables, group, kind, resamples, seed))}
        for group in groups
    }
    differences: dict[str, dict[str, dict[str, list[float]]]] = {}
    apart: dict[str, dict[str, list[int]]] = {}
    for name, statistic in STATISTICS.items():
        found = _differences(tables, [group for group in groups if group != "text"], statistic, resamples, seed)
        differences[name] = {control: band.as_lists() for control, band in found.items()}
        apart[name] = {
            control: [layer for layer, is_apart in zip(layers, _is_apart(band, statistic), strict=True) if is_apart]
            for control, band in found.items()
        }
    return Location(
        _facts(tables, groups, resamples, seed),
        layers,
        profiles,
        differences,
        apart,
        _growth(tables["growth"]) if "growth" in tables else {},
        _example(tables),
    )


def swapped_apart(
    tables: Tables, control: str, *, permutations: int = 20, resamples: int = 400, seed: int = 0
) -> float:
    """Share of permutations in which some layer's volume is found apart, where nothing can be: the negative control.

    In each permutation, trained and control change places in a random half of the texts.

    Args:
        tables: tables of the study.
        control: group to swap with.
        permutations: number of permutations.
        resamples: number of resamples in each.
        seed: random seed.
    """
    statistic = STATISTICS["volume"]
    pair = _pair(tables, control, statistic.kind)
    if pair is None:
        return float("nan")
    rng = np.random.default_rng(seed)
    mine, theirs = pair  # (N, L, S)
    found = 0
    for number in range(permutations):
        swap = (rng.permutation(len(mine)) < len(mine) // 2)[:, None, None]
        one, other = np.where(swap, theirs, mine), np.where(swap, mine, theirs)
        samples, texts = _difference(one, other, statistic.order, resamples, seed + number)
        found += bool(_is_apart(simultaneous_band(samples, _LEVEL, texts=texts), statistic).any())
    return found / permutations


_KINDS = ("logabsdet", "sigma_min", "spectral", "complex", "update_logabsdet", "update_sigma_min", "update_spectral",
          "update_complex")  # fmt: skip


def _table(tables: Tables, group: str, kind: str) -> Dataset | None:
    """The table of a group that holds a kind of margin."""
    for name in (group, f"{group}-eigenvalues"):
        if name in tables and kind in tables[name]:
            return tables[name]
    return None


def _values(table: Dataset, kind: str, least: int = FIRST, below: int | None = None) -> Array:
    """Values at tokens from a position on, ``(N, L, S)``."""
    chosen = table[kind].transpose("sequence", "layer", "token")
    kept = (chosen.token >= least) if below is None else (chosen.token >= least) & (chosen.token < below)
    values: Array = chosen.values[:, :, kept.values].astype(float)
    return values


def _profile(tables: Tables, group: str, kind: str, resamples: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Quantiles by layer with intervals that hold for all layers at once."""
    table = _table(tables, group, kind)
    if table is None:
        return {}
    values = _values(table, kind)
    weights = resample_texts(len(values), resamples, seed)
    found = np.stack([resampled_quantiles(values[:, k], ORDERS, weights) for k in range(values.shape[1])], 1)
    return {
        f"{order:g}": simultaneous_band(found[:, :, k], texts=len(values)).as_lists() for k, order in enumerate(ORDERS)
    }


def _pair(tables: Tables, control: str, kind: str) -> tuple[Array, Array] | None:
    """Values of the trained model and of a control on the same tokens of the same texts, ``(N, L, S)`` each."""
    mine, theirs = _table(tables, "text", kind), _table(tables, control, kind)
    if mine is None or theirs is None:
        return None
    shared = [np.intersect1d(mine[axis].values, theirs[axis].values) for axis in ("sequence", "token")]
    if len(shared[0]) < 2:
        return None
    mine, theirs = (part.sel(sequence=shared[0], token=shared[1]) for part in (mine, theirs))
    one, other = _values(mine, kind), _values(theirs, kind)
    missing = np.isnan(one) | np.isnan(other)
    return np.where(missing, np.nan, one), np.where(missing, np.nan, other)


def _difference(mine: Array, theirs: Array, order: float, resamples: int, seed: int) -> tuple[Array, Array]:
    """Difference of the quantiles by layer, ``(1 + R, L)``, and the effective number of texts behind it, ``(L,)``.

    Trained model and control are resampled independently, each over its own texts, since the controls may have fewer;
    that they share texts can only make the intervals too wide. The degrees of freedom are those of Welch (1947,
    Biometrika 34), and one more stands for the number of texts.
    """
    parts, shares = [], []
    for number, values in enumerate((mine, theirs)):
        weights = resample_texts(len(values), resamples, seed + number)
        columns = [resampled_quantiles(values[:, k], (order,), weights) for k in range(values.shape[1])]
        parts.append(np.concatenate(columns, 1))
        shares.append(parts[-1][1:].var(0) / (len(values) - 1))
    total = shares[0] * (len(mine) - 1) + shares[1] * (len(theirs) - 1)
    below = shares[0] ** 2 * (len(mine) - 1) + shares[1] ** 2 * (len(theirs) - 1)
    freedom = np.divide(total**2, below, out=np.full(len(total), float(len(mine) - 1)), where=below > 0)
    return parts[0] - parts[1], 1 + freedom


def _differences(
    tables: Tables, controls: Sequence[str], statistic: Statistic, resamples: int, seed: int
) -> dict[str, Band]:
    """Differences from every control, with intervals that hold for all of them and all layers at once."""
    samples: dict[str, Array] = {}
    texts: list[float] = []
    mine = _table(tables, "text", statistic.kind)
    for control in controls:
        theirs = _table(tables, control, statistic.kind)
        if mine is None or theirs is None or theirs.sizes["sequence"] < 2:
            continue
        samples[control], own = _difference(
            _values(mine, statistic.kind), _values(theirs, statistic.kind), statistic.order, resamples, seed
        )
        texts += own.tolist()
    if not samples:
        return {}
    band = simultaneous_band(np.concatenate(list(samples.values()), 1), _LEVEL, texts=texts)
    ends = np.cumsum([0, *(found.shape[1] for found in samples.values())])
    return {
        control: Band(band.estimate[first:last], band.low[first:last], band.high[first:last], band.factor)
        for control, first, last in zip(samples, ends[:-1], ends[1:], strict=True)
    }


def _is_apart(band: Band, statistic: Statistic) -> NDArray[np.bool_]:
    """True for the layers that are apart, ``(L,)``; NaN is not."""
    below = (band.high < 0) & (band.estimate <= -statistic.relevant)
    above = (band.low > 0) & (band.estimate >= statistic.relevant)
    found: NDArray[np.bool_] = below if statistic.sign < 0 else above if statistic.sign > 0 else below | above
    return found


def _facts(tables: Tables, groups: Mapping[str, None], resamples: int, seed: int) -> dict[str, float]:
    text = tables["text"]
    facts = {"texts": float(text.sizes["sequence"]), "layers": float(text.sizes["layer"])}
    facts["tokens"] = float(text.sizes["sequence"] * text.sizes["token"])
    for group in groups:
        if group not in tables:
            continue
        spans = {"": (FIRST, None), "_first_token": (0, 1), "_first_16": (1, FIRST)} if group == "text" else {
            "": (FIRST, None)
        }  # fmt: skip
        for prefix in ("", "update_") if group == "text" else ("",):
            for span, (least, below) in spans.items():
                sign = _values(tables[group], f"{prefix}sign", least, below)
                negative = np.where(np.isnan(sign), np.nan, sign < 0).reshape(len(sign), -1)
                share = resampled_means(negative, resample_texts(len(sign), resamples, seed))
                band = simultaneous_band(share[:, None], texts=len(sign))
                name = f"{prefix}negative_{group}{span}"
                facts[name] = float(band.estimate[0])
                facts[f"{name}_low"], facts[f"{name}_high"] = max(0.0, float(band.low[0])), float(band.high[0])
    for kind in _KINDS:
        table = _table(tables, "text", kind)
        if table is None:
            continue
        for span, (least, below) in {"": (FIRST, None), "_first_token": (0, 1), "_first_16": (1, FIRST)}.items():
            values = _values(table, kind, least, below).ravel()
            for order in ORDERS:
                if len(values):
                    facts[f"{kind}{span}_q{100 * order:g}"] = float(np.nanquantile(values, order))
    return facts


def _growth(table: Dataset) -> dict[str, Any]:
    """Loss, median volume and nearest margin by run, step and layer; and the step at which the volume has its shape."""
    run = table.transpose("run", "step", "sequence", "layer", "token")
    volume = np.nanmedian(run.logabsdet.values, axis=(2, 4))  # (run, step, layer)
    nearest = np.nanquantile(run.sigma_min.values, 0.01, axis=(2, 4))
    spread = volume.max(-1) - volume.min(-1)  # (run, step)
    steps = [int(step) for step in table.step.values]
    appears = []
    for own in spread:
        below = np.flatnonzero(own < own[-1] / 2)
        appears.append(steps[int(below[-1]) + 1] if len(below) else steps[0])
    return {
        "steps": steps,
        "loss": run.loss.values.astype(float).tolist(),
        "volume": volume.astype(float).tolist(),
        "nearest": nearest.astype(float).tolist(),
        "negative": (run.sign.values < 0).mean(axis=(2, 3, 4)).tolist(),
        "spread": spread.astype(float).tolist(),
        "appears": appears,
    }


def _example(tables: Tables) -> dict[str, list[list[float]]]:
    """Margins of the first text, layers by tokens."""
    found = {}
    for kind in ("logabsdet", "sigma_min"):
        if kind in tables["text"]:
            found[kind] = tables["text"][kind].isel(sequence=0).transpose("layer", "token").values.tolist()
    return found
