"""Posteriors of the heads of an early, a middle and a late layer of a trained model, with and without the Jacobian."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from probattn.errors import InputError
from probattn.hf.layers.volume import log_volume
from probattn.inference.layer.start import layer_start
from probattn.inference.methods.laplace import LaplaceConfig, init, update
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.runtime.files import write_json
from probattn.models.layer import LayerModel
from probattn.models.layer_streams import layer_streams, outlying_coordinates
from probattn.numerics import linalg
from probattn.numerics.random import isolated_seed

__all__ = ["TrainedStudy", "fit_layers"]

_LOG = logging.getLogger(__name__)
_LEVELS = (0.025, 0.5, 0.975)
_LOOKED_AT = 8  # draws whose density and determinants are evaluated
_SMALL = 3.0  # largest entry of the gradient from which one Newton step is enough
_DIFFERENCE = 1e-5  # between the points of a one-sided difference


@dataclass(frozen=True)
class TrainedStudy:
    """Layers, data and prior.

    Attributes:
        layers: numbers of the layers.
        sequences: number of sequences of the text.
        tokens: number of tokens in each.
        given: number of first tokens that are conditions.
        positions: number of positions per sequence at which the log-determinant is taken.
        gain_spread: standard deviation of the gains' normal prior around 1.
        temperature_spread: standard deviation of the prior of the logarithms of the inverse temperatures.
        draws: number of draws of the Laplace approximation.
        steps: largest number of iterations of the search for the mode.
        seed: random seed.
    """

    layers: tuple[int, ...] = (3, 15, 27)
    sequences: int = 4
    tokens: int = 64
    given: int = 1
    positions: int = 3
    gain_spread: float = 1.0
    temperature_spread: float = 0.25
    draws: int = 400
    steps: int = 200
    seed: int = 0


def fit_layers(study: TrainedStudy, model: Any, ids: Tensor, folder: Path) -> list[dict[str, Any]]:
    """Fit every layer twice; what the folder holds is not fitted again.

    Args:
        study: layers, data and prior.
        model: causal model of ``transformers``.
        ids: token ids of the text, ``(n,)``.
        folder: where each fit is written.

    Returns:
        One record per fit, with and without the Jacobian.

    Raises:
        InputError: a folder of another study, or input that cannot be used.
    """
    found = []
    for number in study.layers:
        for jacobian in (False, True):
            path = folder / f"layer-{number}-{'with' if jacobian else 'without'}.json"
            if path.exists():
                record = json.loads(path.read_text(encoding="utf-8"))
                if record["study"] != json.loads(json.dumps(asdict(study))):
                    raise InputError(f"{path}: a fit of another study; give another folder, or delete it.")
            else:
                record = _fit(study, model, ids, number, jacobian)
                write_json(path, record)
            found.append(record)
    return found


def _fit(study: TrainedStudy, model: Any, ids: Tensor, number: int, jacobian: bool) -> dict[str, Any]:
    began, processor = time.monotonic(), time.process_time()
    streams = layer_streams(
        model,
        ids,
        number,
        sequences=study.sequences,
        length=study.tokens,
        given=study.given,
        dtype=torch.float64,
    )
    layer = LayerModel(
        streams.layer,
        study.tokens,
        given=study.given,
        reference=streams.reference,
        offset=streams.offset,
        gain_spread=study.gain_spread,
        temperature_spread=study.temperature_spread,
        share_spread=None,
        signed=True,
        positions=study.positions,
        position_seed=study.seed,
        jacobian=jacobian,
    )
    target = LogDensity(layer, streams.u)
    words = "with" if jacobian else "without"
    _LOG.info("layer %d %s the Jacobian: %d parameters", number, words, target.dim)
    start = layer_start(target, 1, study.seed)[0]
    z, log_q = _laplace(target, start, study)
    _LOG.info("layer %d %s the Jacobian: mode found", number, words)
    values = target.constrain(z)
    some = {name: value[:_LOOKED_AT].unsqueeze(1) for name, value in values.items()}
    with torch.no_grad():
        volume = log_volume(layer.attention_of(some), streams.u, layer.rows)
        trained = log_volume(layer.layer.scaled(), streams.u, layer.rows)
    found = target.evaluate(z[:_LOOKED_AT])
    record: dict[str, Any] = {
        "schema": 1,
        "study": asdict(study),
        "layer": number,
        "jacobian": jacobian,
        "heads": layer.heads,
        **{name: _summary(values[name]) for name in ("gain", "inverse_temperature", "noise_scale")},
        # Zero where the posterior is the normal distribution that it is approximated by.
        "deviation_of_log_weights": float((found["lp"] - log_q[:_LOOKED_AT]).std()),
        "draws_with_positive_determinants": float((volume.smallest_sign > 0).all(-1).double().mean()),
        "log_volume_per_token": {
            "as trained": float(trained.value.sum()) / (study.sequences * len(layer.rows)),  # type: ignore[arg-type]
            "posterior mean": float(volume.value.sum(-1).mean()) / (study.sequences * len(layer.rows)),  # type: ignore[arg-type]
        },
        "log_density": {
            "as trained": float(target.evaluate(layer_start(target, 1, study.seed, spread=0.0))["u"].sum()),
            "posterior mean": float(found["u"].sum(-1).mean()),
        },
        "outlying_coordinates": outlying_coordinates(streams.u, study.given),
        "seconds": time.monotonic() - began,
        "processor_seconds": time.process_time() - processor,
    }
    _LOG.info("layer %d %s: gains %s", number, words, np.round(record["gain"]["mean"], 2).tolist())
    return record


def _laplace(target: LogDensity, start: Tensor, study: TrainedStudy) -> tuple[Tensor, Tensor]:
    """Draws of the Laplace approximation, ``(S, D)``, and their log-density under it, in few gradients.

    L-BFGS goes on until the gradient is small, and one Newton step does the rest. The curvature of the density without
    log-determinants costs next to nothing; that of the log-determinants is added by one-sided differences of their
    gradient.

    Raises:
        InputError: the search did not come near a mode.
    """
    config = LaplaceConfig(steps=study.steps)
    state = init(target, config, start)
    while state.step < config.steps and not state.ended:
        update(state, target, config)
        if state.z.grad is not None and float(state.z.grad.abs().max()) < _SMALL:
            break
    mode = state.z.detach().clone()
    gradient = target.value_and_gradient(mode[None])[1][0]
    naive = LogDensity(cast(LayerModel, target.model).altered(jacobian=False), *target.data)
    curvature = -naive.hessian(mode[None])[0]
    if cast(LayerModel, target.model).jacobian:
        curvature = curvature - _volume_hessian(target, naive, mode, gradient)
    step = linalg.solve(curvature, gradient[:, None])[:, 0]
    decrement = float(step @ gradient)
    if not 0 <= decrement < 1:
        raise InputError(f"no mode was reached in {state.step} steps (decrement {decrement:.3g}); raise steps.")
    guide = MultivariateNormal(mode + step, precision_matrix=curvature)
    with isolated_seed(study.seed):
        z = guide.sample((study.draws,))
    return z, guide.log_prob(z)


def _volume_hessian(target: LogDensity, naive: LogDensity, mode: Tensor, gradient: Tensor) -> Tensor:
    """Second derivatives of the log-determinants, ``(D, D)``, zero in the directions of the noise."""
    own = gradient - naive.value_and_gradient(mode[None])[1][0]
    found = torch.zeros(target.dim, target.dim, dtype=mode.dtype)
    for name in ("gain", "inverse_temperature"):
        site = target.sites[name]
        for k in range(site.start, site.stop):
            shifted = mode.clone()
            shifted[k] += _DIFFERENCE
            both = target.value_and_gradient(shifted[None])[1][0], naive.value_and_gradient(shifted[None])[1][0]
            found[:, k] = (both[0] - both[1] - own) / _DIFFERENCE
    return 0.5 * (found + found.mT)


def _summary(values: Tensor) -> dict[str, Sequence[float]]:
    """Mean, deviation and quantiles of draws ``(S, n)``."""
    quantiles = torch.quantile(values, torch.tensor(_LEVELS, dtype=values.dtype), dim=0)
    found = {"mean": values.mean(0).tolist(), "sd": values.std(0).tolist()}
    return found | {f"{level:g}": row.tolist() for level, row in zip(_LEVELS, quantiles, strict=True)}
