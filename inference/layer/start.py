"""Points to begin a fit of a layer at, on the side of the boundary where every det J > 0."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.layers.volume import log_volume
from probattn.inference.methods.log_density import LogDensity
from probattn.models.layer import LayerModel

__all__ = ["layer_start"]

_HALVINGS = 12


def layer_start(target: LogDensity, points: int, seed: int, *, spread: float = 0.02) -> Tensor:
    """Points about the layer as it was trained, or with all gains halved until det J > 0 at all tokens.

    Beyond a fold the density is none of the tokens and a chain may stay there, so that a fit begins on the side that
    the identity lies on.

    Args:
        target: log-density of a :class:`~probattn.models.layer.LayerModel`.
        points: number of points.
        seed: random seed.
        spread: standard deviation of the points about the centre, in unconstrained space.

    Returns:
        ``(points, D)``.

    Raises:
        InputError: det J is not positive at all tokens however small the gains.
    """
    model, u = cast(LayerModel, target.model), target.data[0]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(points, target.dim, generator=generator, dtype=torch.float64).to(target.origin)
    values = target.constrain(target.origin)
    gain = torch.ones_like(values["gain"])
    for _ in range(_HALVINGS):
        centre = target.unconstrain({**values, "gain": gain})
        with torch.no_grad():
            sign = log_volume(model.layer.scaled(gain), u, model.rows).smallest_sign
        if bool((sign > 0).all()):
            z = centre + spread * noise
            value, gradient = target.value_and_gradient(z)
            if bool(torch.isfinite(value).all() and torch.isfinite(gradient).all()):
                return z
        gain = gain / 2
    raise InputError(
        "no start with det J > 0 at all tokens was found; look for values in the streams that are too large for their "
        "dtype, or give the first tokens (--given)."
    )
