"""Points to begin a fit of a layer at, on the side of the boundary where every det J > 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.layers.update import QueryUpdate
from probattn.hf.layers.volume import log_volume
from probattn.inference.methods.log_density import LogDensity
from probattn.models.layer import LayerModel, StreamProcess

__all__ = ["layer_start", "leading_update"]

_HALVINGS = 12


def layer_start(target: LogDensity, points: int, seed: int, *, spread: float = 0.02) -> Tensor:
    """Points about the layer as it was trained, or with all gains halved until det J > 0 at all tokens.

    Beyond a fold the density is none of the tokens and a chain may stay there, so that a fit begins on the side that
    the identity lies on. A change of low rank begins in the direction of :func:`leading_update`, as the layer as it was
    trained is a stationary point in both of its factors.

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
        trial = {**values, "gain": gain}
        with torch.no_grad():
            sign = log_volume(model.layer.scaled(gain), u, model.rows).smallest_sign
        if bool((sign > 0).all()):
            trial |= {} if model.update is None else leading_update(model, trial, u)
            z = target.unconstrain(trial) + spread * noise
            value, gradient = target.value_and_gradient(z)
            if bool(torch.isfinite(value).all() and torch.isfinite(gradient).all()):
                return z
        gain = gain / 2
    raise InputError(
        "no start with det J > 0 at all tokens was found; look for values in the streams that are too large for their "
        "dtype, or give the first tokens (--given)."
    )


def leading_update(model: LayerModel, values: Mapping[str, Tensor], u: Tensor) -> dict[str, Tensor]:
    r"""Values of a change of low rank in the directions in which the likelihood rises most.

    With the gradient G of the log-likelihood by the product of the two factors, in units of the prior, the log-density
    at small factors :math:`\tilde A, \tilde B` is :math:`\langle G, \tilde B \tilde A \rangle - \tfrac12 (\lVert
    \tilde A \rVert^2 + \lVert \tilde B \rVert^2)`: no change at all is a mode where no singular value of G exceeds 1,
    and a saddle otherwise, left along the leading singular vectors.

    Args:
        model: model with an update.
        values: values of its other sites, without batch axes.
        u: streams, ``(N, T, p)``.

    Returns:
        Values of ``update_in``, ``(n, R, p)``, and ``update_out``, ``(n, r, R)``, with rows and columns of length 1.

    Raises:
        InputError: a model without an update.
    """
    prior = model.update
    if prior is None:
        raise InputError("the model has no change of low rank to begin; give LayerModel an update.")
    down = prior.features.new_zeros(len(prior.heads), prior.size, len(prior.features)).requires_grad_()
    up = torch.eye(prior.size, dtype=down.dtype, device=down.device).expand(len(prior.heads), -1, -1)
    process = StreamProcess(
        model.scaled_layer(values),
        model.noise_of(values),
        given=model.given,
        rows=model.rows,
        jacobian=model.jacobian,
        update=QueryUpdate(prior.heads, down, up),
    )
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(process.log_prob(u).sum(), down)
    left, _, right = torch.linalg.svd(gradient / (prior.features * prior.keys[:, None, None]), full_matrices=False)
    rank = min(prior.rank, right.shape[-2])
    found = {name: torch.zeros(law.event_shape).to(gradient) for name, law in prior.priors().items()}
    found["update_in"][:, :rank], found["update_out"][..., :rank] = right[:, :rank], left[..., :rank]
    return found
