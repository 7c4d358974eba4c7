r"""Simulation-based calibration of the posterior of a layer's heads, with its naive twin.

Gains, inverse temperatures and a noise scale come from their prior, streams from the model by solving u = mu(u) + e
token by token, and draws of the posterior from the Laplace approximation, corrected by importance resampling. As in
:mod:`probattn.inference.studies.calibration`, the rank of the truth is uniform for a posterior that is right, and the
likelihood without log-determinants must fail the same test.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.layers.volume import log_volume
from probattn.inference.layer.start import layer_start
from probattn.inference.methods.laplace import LaplaceConfig, fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.runtime.files import write_json
from probattn.inference.runtime.isolation import isolated
from probattn.inference.runtime.seeds import derived_seed
from probattn.inference.studies.calibration import Ranks
from probattn.inference.studies.layer.small import random_layer
from probattn.models.layer import LayerModel
from probattn.models.simulate import draw_data_sets

__all__ = ["LayerStudy", "calibrate_layer", "simulate_layer"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerStudy:
    """A small random layer and its prior.

    Attributes:
        replicates: number of data sets R.
        sequences: number of sequences in each.
        length: number of tokens T.
        dim: number of features p.
        heads: number of heads H.
        strength: scale of the layer's update.
        gain_spread: of the prior of the gains.
        temperature_spread: of the prior of the inverse temperatures.
        noise_spread: of the prior of the noise scale.
        ranked: number of posterior draws among which the truth is ranked.
        seed: random seed.
    """

    replicates: int = 200
    sequences: int = 6
    length: int = 8
    dim: int = 8
    heads: int = 2
    strength: float = 0.12
    gain_spread: float = 0.4
    temperature_spread: float = 0.4
    noise_spread: float = 0.2
    ranked: int = 99
    seed: int = 0

    def model(self) -> LayerModel:
        """The model of the study."""
        layer = random_layer(self.dim, self.heads, self.length, strength=self.strength, seed=self.seed)
        return LayerModel(
            layer,
            self.length,
            gain_spread=self.gain_spread,
            temperature_spread=self.temperature_spread,
            noise_spread=self.noise_spread,
            share_spread=None,
        )


def simulate_layer(study: LayerStudy) -> tuple[dict[str, Tensor], Tensor, int]:
    """Draw the data sets of a study.

    Args:
        study: sizes, prior and seed.

    Returns:
        Values of the sites, ``(R, *event)`` by name; data sets, ``(R, N, T, p)``; and the number of parameters that
        were left out because another solution is known on one of their paths, or det J < 0 there.

    Raises:
        InputError: more than half of the parameters fold.
    """
    model = study.model()
    asked = 2 * study.replicates
    nothing = torch.zeros(1, study.length, study.dim, dtype=torch.float64)
    prior = LogDensity(model, nothing).prior_draws(asked, study.seed)
    with isolated(seed=study.seed + 1), torch.no_grad():
        u, usable = draw_data_sets(model, prior, study.sequences)  # type: ignore[arg-type]
        lifted = {name: value.unsqueeze(1) for name, value in prior.items()}
        signs = log_volume(model.attention_of(lifted), u).smallest_sign  # (2 R, N)
    usable = usable & (signs > 0).all(-1)
    kept = usable.nonzero().squeeze(-1)[: study.replicates]
    if len(kept) < study.replicates:
        raise InputError(
            f"strength is {study.strength}: only {int(usable.sum())} of {asked} parameters do not fold; lower it."
        )
    left_out = int(kept[-1]) + 1 - study.replicates
    return {name: value[kept] for name, value in prior.items()}, u[kept], left_out


def calibrate_layer(study: LayerStudy, *, jacobian: bool, store: Path | None = None, chunk: int = 10) -> Ranks:
    """Rank the truth among posterior draws in every data set.

    Args:
        study: sizes, prior and seed.
        jacobian: keep the log-determinants in the likelihood that is fitted.
        store: JSON file of finished data sets, which are not computed again; None keeps none.
        chunk: number of data sets after which the file is written.

    Returns:
        Ranks and errors of each gain, inverse temperature, the noise scale and the log-likelihood.

    Raises:
        InputError: a store of another study.
    """
    values, u, _ = simulate_layer(study)
    identity = {**asdict(study), "jacobian": jacobian}
    rows = _load(store, identity)
    judge = study.model()
    model = judge.altered(jacobian=jacobian)
    for k in range(len(rows), study.replicates):
        truth = {name: value[k : k + 1] for name, value in values.items()}
        rows.append(_ranks(model, judge, truth, u[k], study, derived_seed(study.seed, k)))
        if store is not None and (len(rows) % chunk == 0 or len(rows) == study.replicates):
            write_json(store, {"schema": 1, "identity": identity, "rows": rows})
            _LOG.info("calibration %s: %d of %d", "with" if jacobian else "without", len(rows), study.replicates)
    ranks, errors = (
        {name: np.array([row[name][part] for row in rows], dtype=float) for name in rows[0]} for part in (0, 1)
    )
    return Ranks("laplace" if jacobian else "laplace_without_jacobian", study.ranked, ranks, errors)


def _ranks(
    model: LayerModel, judge: LayerModel, truth: dict[str, Tensor], u: Tensor, study: LayerStudy, seed: int
) -> dict[str, list[float]]:
    """Rank and error of each quantity in one data set."""
    target = LogDensity(model, u)
    config = LaplaceConfig(draws=2 * study.ranked, seed=seed)
    draws = fit_laplace(target, config, start=layer_start(target, 1, seed)[0])
    flat = draws.z.reshape(-1, target.dim)
    chosen = flat[torch.linspace(0, len(flat) - 1, study.ranked).round().long()]
    own = LogDensity(judge, u)
    drawn = _quantities(own, target.constrain(chosen))
    true = _quantities(own, truth)
    generator = np.random.default_rng(seed)
    found = {}
    for name, value in true.items():
        below, equal = int((drawn[name] < value).sum()), int((drawn[name] == value).sum())
        found[name] = [float(below + generator.integers(0, equal + 1)), float(drawn[name].mean() - value)]
    return found


def _quantities(target: LogDensity, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantities that are ranked, ``(S,)`` by name."""
    found: dict[str, Tensor] = {}
    for name in ("gain", "inverse_temperature"):
        found |= {f"{name}[{h}]": values[name][:, h] for h in range(values[name].shape[-1])}
    with torch.no_grad():
        likelihood = target.log_terms(values)["u"].sum(-1)
    return {**found, "noise_scale": values["noise_scale"][:, 0], "log_likelihood": likelihood}


def _load(store: Path | None, identity: dict[str, Any]) -> list[dict[str, list[float]]]:
    if store is None or not store.exists():
        return []
    content = json.loads(store.read_text(encoding="utf-8"))
    if content.get("identity") != identity:
        raise InputError(f"{store}: ranks of another study; give another folder, or delete it.")
    rows: list[dict[str, list[float]]] = content["rows"]
    return rows
