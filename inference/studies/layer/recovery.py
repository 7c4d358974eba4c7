"""Recovery of known gains and inverse temperatures of a random layer of 64 features from sequences of 64 tokens."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from probattn.inference.layer.start import layer_start
from probattn.inference.methods.laplace import LaplaceConfig, fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.studies.layer.small import random_layer
from probattn.models.layer import LayerModel
from probattn.models.layer_simulate import continue_streams
from probattn.numerics.random import isolated_seed

__all__ = ["Recovery", "recover"]


@dataclass(frozen=True)
class Recovery:
    """Sizes and truth.

    Attributes:
        sequences: number of sequences.
        length: number of tokens in each.
        dim: number of features.
        strength: scale of the layer's update.
        gain: true gains, one per head.
        inverse_temperature: true inverse temperatures.
        noise_scale: true scale of the noise.
        seed: random seed.
    """

    sequences: int = 4
    length: int = 64
    dim: int = 64
    strength: float = 0.05
    gain: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    inverse_temperature: tuple[float, ...] = (1.0, 1.0, 0.7, 1.4)
    noise_scale: float = 0.8
    seed: int = 0


def recover(study: Recovery) -> dict[str, Any]:
    """Draw streams from known parameters, and fit them with and without the Jacobian.

    Gains are signed, so that 0 is a value like others. The data know nothing of the inverse temperature of a head whose
    gain is 0.

    Args:
        study: sizes and truth.

    Returns:
        Truth, posterior means and deviations, and errors in deviations, plain JSON values by name.
    """
    began = time.process_time()
    layer = random_layer(study.dim, len(study.gain), study.length, strength=study.strength, seed=study.seed)
    model = LayerModel(layer, study.length, signed=True, gain_spread=1.0, share_spread=None)
    truth = {
        "gain": torch.tensor(study.gain, dtype=torch.float64),
        "inverse_temperature": torch.tensor(study.inverse_temperature, dtype=torch.float64),
        "noise_scale": torch.tensor([study.noise_scale], dtype=torch.float64),
    }
    with isolated_seed(study.seed):
        noise = model.noise_of(truth).expand((study.sequences,)).sample()
    u = continue_streams(model, truth, noise, noise)
    found: dict[str, Any] = {"schema": 1, "study": asdict(study)}
    found["log_volume_per_token"] = float(model.attention_of(truth).logabsdet(u)[1].mean())
    for jacobian in (True, False):
        target = LogDensity(model.altered(jacobian=jacobian), u)
        draws = fit_laplace(
            target, LaplaceConfig(draws=200, correct=False), start=layer_start(target, 1, study.seed)[0]
        )
        values = target.constrain(draws.z[0])
        found["with" if jacobian else "without"] = {name: _against(values[name], truth[name]) for name in truth}
    return found | {"processor_seconds": time.process_time() - began}


def _against(values: Tensor, truth: Tensor) -> dict[str, list[float]]:
    mean, sd = values.mean(0), values.std(0)
    return {"mean": mean.tolist(), "sd": sd.tolist(), "error_in_sd": ((mean - truth) / sd).tolist()}
