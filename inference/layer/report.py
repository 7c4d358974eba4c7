"""Files of a fit of a layer: ``fit.nc``, the diagnosis, a summary, the record of how it was made, and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probattn.inference.layer.findings import head_intervals
from probattn.inference.reports.fit import write_files
from probattn.inference.results.diagnosis import Diagnosis
from probattn.inference.results.fit_file import Fit
from probattn.plotting import plot_chains, plot_posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_head_intervals", "plot_heads", "write_layer_fit"]

_SUMMARISED = (
    "strength",
    "inverse_temperature",
    "share",
    "noise_scale",
    "logit_change",
    "update_norm",
    "update_spectral_norm",
)
_BY_HEAD = ("strength", "inverse_temperature")
_MOST = 32  # scales of the noise in the summary


def write_layer_fit(out: Path, found: Fit, diagnosis: Diagnosis, record: Mapping[str, Any]) -> None:
    """Write ``fit.nc``, ``diagnosis.json``, ``summary.csv``, ``config.json`` and ``figures/*.png``.

    Args:
        out: output folder.
        found: fit.
        diagnosis: its diagnosis.
        record: how it was made, for ``config.json``.
    """
    posterior = found.groups["posterior"]
    names = [name for name in _SUMMARISED if name in posterior and np.asarray(posterior[name])[0, 0].size <= _MOST]
    figures: dict[str, Any] = {"heads": plot_heads({"": found})}
    shown, before = _by_head(found)
    if found.method != "map":
        figures["posterior"] = plot_posterior({label: values.ravel() for label, values in shown.items()}, before)
    if found.method == "nuts":
        figures["chains"] = plot_chains(shown, np.asarray(found.groups["sample_stats"]["diverging"], dtype=bool))
    write_files(out, found, diagnosis, record, names, figures)


def plot_heads(fits: Mapping[str, Fit]) -> Figure:
    """Strengths and inverse temperatures of the heads with their 95 % intervals, beside the layer as trained.

    Args:
        fits: fits by label.
    """
    names = [name for name in _BY_HEAD if all(name in fit.groups["posterior"] for fit in fits.values())]
    intervals = {name: {label: head_intervals(fit, name) for label, fit in fits.items()} for name in names}
    return plot_head_intervals(intervals)


def plot_head_intervals(intervals: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Intervals of each head, a panel per quantity.

    Args:
        intervals: low, median and high, ``(3, H)``, by label, by name of the quantity.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(intervals), 3.2), layout="constrained")
    axes = figure.subplots(1, len(intervals), squeeze=False)[0]
    for panel, (name, by_label) in zip(axes, intervals.items(), strict=True):
        for k, (label, (low, middle, high)) in enumerate(by_label.items()):
            places = np.arange(len(middle)) + 0.18 * (k - (len(by_label) - 1) / 2)
            errors = [middle - low, high - middle]
            panel.errorbar(places, middle, yerr=errors, fmt="o", markersize=4, capsize=2, label=label or None)
        panel.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
        panel.axhline(0, color="0.7", linewidth=0.8)
        panel.set(xlabel="head", ylabel=name.replace("_", " "), xticks=range(len(middle)))
        if any(by_label):
            panel.legend(frameon=False, fontsize="small")
    return figure


def _by_head(found: Fit) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draws of each head's numbers, ``(chain, draw)`` by label, and of their prior."""
    posterior, prior = found.groups["posterior"], found.groups["prior"]
    shown, before = {}, {}
    for name in (*_BY_HEAD, "logit_change"):
        if name not in posterior:
            continue
        values = np.asarray(posterior[name])
        heads = np.asarray(found.coords["updated_head"] if name == "logit_change" else range(values.shape[-1])).tolist()
        for place, head in enumerate(heads[:8]):
            label = f"{name.replace('_', ' ')} [{head}]"
            shown[label], before[label] = values[..., place], np.asarray(prior[name])[..., place].ravel()
    return shown, before
