"""Files of a fit: ``fit.nc``, the diagnosis, a summary, the record of how it was made, and the figures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probattn.inference.results.comparison import Compared
from probattn.inference.results.diagnosis import Diagnosis
from probattn.inference.results.fit_file import Fit
from probattn.inference.runtime.files import prepare_folder, write_figure, write_json, write_text
from probattn.inference.runtime.progress import log_stage
from probattn.plotting import plot_chains, plot_comparison, plot_margin_bands, plot_posterior

__all__ = ["write_comparison", "write_files", "write_fit"]

_LOG = logging.getLogger(__name__)
_SUMMARISED = {
    "qk_matrix": "QK matrix",
    "ov_matrix": "OV matrix",
    "noise_scale": "noise scale",
    "smallest_margin": "smallest margin",
}


def write_fit(out: Path, found: Fit, diagnosis: Diagnosis, record: Mapping[str, Any]) -> None:
    """Write ``fit.nc``, ``diagnosis.json``, ``summary.csv``, ``config.json`` and ``figures/*.png``.

    Args:
        out: output folder.
        found: fit.
        diagnosis: its diagnosis.
        record: how it was made, for ``config.json``.
    """
    posterior = found.groups["posterior"]
    # A margin that is the same in every draw has no R-hat; that of a parameter would be news.
    fixed = {"smallest_margin"} if np.ptp(posterior.get("smallest_margin", np.zeros(1))) == 0 else set()
    names = [name for name in _SUMMARISED if name in posterior and name not in fixed]
    write_files(out, found, diagnosis, record, names, _figures(found))


def write_files(
    out: Path,
    found: Fit,
    diagnosis: Diagnosis,
    record: Mapping[str, Any],
    summarised: Sequence[str],
    figures: Mapping[str, Any],
) -> None:
    """Write the files that every fit has.

    Args:
        out: output folder.
        found: fit.
        diagnosis: its diagnosis.
        record: how it was made.
        summarised: variables of the posterior in ``summary.csv``.
        figures: figures by name.
    """
    from arviz_stats import summary

    log_stage(_LOG, "writing the fit and its figures")
    found.save(out / "fit.nc")
    kind = "stats" if found.method == "map" else "all"
    table = summary(found.to_datatree(), var_names=list(summarised), kind=kind, round_to=None)
    write_text(out / "summary.csv", table.to_csv())
    write_json(out / "diagnosis.json", {"schema": 1, **diagnosis.as_dict()})
    write_json(out / "config.json", record)
    folder = prepare_folder(out / "figures")
    for name, figure in figures.items():
        write_figure(folder / f"{name}.png", figure)


def write_comparison(out: Path, compared: Sequence[Compared]) -> None:
    """Write ``comparison.json`` and its figure.

    Args:
        out: output folder with ``figures`` in it.
        compared: models, best first.
    """
    write_json(out / "comparison.json", {"schema": 1, "models": [vars(entry) for entry in compared]})
    differences = {entry.name: (entry.difference, entry.difference_se) for entry in compared}
    write_figure(out / "figures" / "comparison.png", plot_comparison(differences))


def _figures(found: Fit) -> dict[str, Any]:
    posterior, prior = found.groups["posterior"], found.groups["prior"]
    shown: dict[str, np.ndarray[Any, Any]] = {}
    before: dict[str, np.ndarray[Any, Any]] = {}
    for name, words in _SUMMARISED.items():
        values = np.asarray(posterior.get(name, np.zeros((1, 1, 0))))
        for index in list(np.ndindex(*values.shape[2:]))[:16]:
            at = (slice(None), slice(None), *index)
            label = f"{words} {list(index)}" if index else words
            shown[label] = values[at]
            if name in prior:
                before[label] = np.asarray(prior[name])[at].ravel()
    tokens = found.groups["tokens"]
    chains = np.asarray(tokens["margin"])
    margin = chains[:, :, 0].reshape(-1, chains.shape[-1])
    logabs = np.asarray(tokens["log_abs_det"])[:, :, 0].reshape(margin.shape)
    figures = {"margins": plot_margin_bands(margin, logabs)}
    if found.method != "map":
        figures["posterior"] = plot_posterior({label: values.ravel() for label, values in shown.items()}, before)
    if found.method == "nuts":
        figures["chains"] = plot_chains(shown, np.asarray(found.groups["sample_stats"]["diverging"], dtype=bool))
    return figures
