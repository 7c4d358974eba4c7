"""A conformance kit for transforms and distributions that should behave as torch's and Pyro's own do.

It was written for the classes of this package and serves for yours: each check raises :class:`ConformanceError` with
the name of the broken rule, the measured number and the bound.
"""

from __future__ import annotations

import copy
import math
import pickle

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

from probattn.numerics import linalg
from probattn.numerics.random import isolated_seed

__all__ = ["ConformanceError", "check_distribution", "check_transform"]

_SOLVED = 1e-8  # relative: of what goes through a solver or a dense Jacobian
_EXACT = 1e-10  # relative: of the same numbers computed again
_FAILURE_RATE = 1e-6  # of a correct distribution, over all coordinates (Bonferroni, normal tails)


class ConformanceError(AssertionError):
    """Raised where a rule of the conformance kit is broken."""


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ConformanceError(rule)


def _close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    _require(actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    error = float((actual - expected).abs().max()) if actual.numel() else 0.0
    scale = 1.0 + (float(expected.abs().max()) if expected.numel() else 0.0)
    _require(error <= tolerance * scale, f"{name}: error {error:.3g} exceeds {tolerance * scale:.3g}")


def check_transform(transform: Transform, x: Tensor, *, causal: bool = False) -> None:
    r"""Check a bijective transform at a batch of points of its domain.

    Rules: ``domain``, ``codomain`` and ``event_dim`` agree; the output lies in the codomain and keeps dtype and device;
    both round trips return; ``inv.inv`` is the transform; \|det\| agrees with the dense Jacobian of the *inverse* by
    autograd, has batch shape, and changes sign under ``inv``; extra batch axes and ``forward_shape``, ``inverse_shape``
    agree; ``with_cache`` returns the same object when nothing changes and caches otherwise; deepcopy and pickle give
    the same map; first derivatives of both directions and of the log-determinant pass ``gradcheck``; with ``causal``,
    the Jacobian's entries above the block diagonal are exactly zero.

    Args:
        transform: transform to check.
        x: points of the domain in float64, ``(*batch, *event)`` with at least one batch axis.
        causal: True checks also that token i of events (T, p) depends on the tokens up to i only.

    Raises:
        ConformanceError: naming the first broken rule.

    Example:
        >>> from torch.distributions import transforms
        >>> check_transform(transforms.ExpTransform(), torch.randn(3, dtype=torch.float64))
    """
    domain, codomain = transform.domain, transform.codomain
    for name, constraint in (("domain", domain), ("codomain", codomain)):
        _require(isinstance(constraint, constraints.Constraint), f"{name} is not a constraint: {constraint!r}")
    _require(transform.bijective, "bijective is False")
    event = domain.event_dim
    batch_shape = x.shape[: x.dim() - event]
    _require(len(batch_shape) > 0, f"x has shape {tuple(x.shape)}; it needs a batch axis before its {event} event axes")

    y = transform(x)
    _require((y.dtype, y.device) == (x.dtype, x.device), f"dtype or device changed: {y.dtype} on {y.device}")
    _require(bool(codomain.check(y).all()), "an output lies outside the codomain")
    _require(y.shape == transform.forward_shape(x.shape), "forward_shape disagrees with the output")
    _require(x.shape == transform.inverse_shape(y.shape), "inverse_shape disagrees with the input")
    _close("inv(t(x)) = x", transform.inv(y.clone()), x, _SOLVED)
    _close("t(inv(y)) = y", transform(transform.inv(y.clone())), y, _SOLVED)
    _require(transform.inv.inv is transform, "inv.inv is another object")
    _require(transform == copy.copy(transform), "a copy is not equal")

    ladj = transform.log_abs_det_jacobian(x, y)
    _require(ladj.shape == batch_shape, f"log_abs_det_jacobian has shape {tuple(ladj.shape)}, not {tuple(batch_shape)}")
    points = y.reshape(-1, *y.shape[y.dim() - codomain.event_dim :])
    size = points[0].numel()
    rows = [torch.autograd.functional.jacobian(transform.inv, point.unsqueeze(0)) for point in points]
    dense = torch.stack([row.reshape(size, size) for row in rows])
    _close("log|det| = dense log|det|", ladj.reshape(-1), -linalg.slogdet(dense)[1], _SOLVED)
    _close("inverse log|det| = -log|det|", transform.inv.log_abs_det_jacobian(y, x), -ladj, _SOLVED)
    if causal:
        length, dim = x.shape[-2:]
        above = torch.ones(length, length).triu(1).kron(torch.ones(dim, dim)).bool()
        _require(bool((dense[:, above] == 0).all()), "a token depends on a later one")

    stacked = torch.stack([x, x + 0.1])
    image = transform(stacked)
    _close("batch axes: t(stack) = stack(t)", image, torch.stack([y, transform(x + 0.1)]), _SOLVED)

    _require(transform.with_cache(0) is transform.with_cache(0).with_cache(0), "with_cache copies needlessly")
    cached = transform.with_cache(1)
    held = cached(x)
    _require(cached.inv(held) is x, "with_cache(1) does not return the cached input")
    for name, twin in (("deepcopy", copy.deepcopy(transform)), ("pickle", pickle.loads(pickle.dumps(transform)))):
        _close(name, twin(x), y, _SOLVED)

    point = x.reshape(-1, *x.shape[x.dim() - event :])[:1].clone().requires_grad_()
    image_point = y.reshape(-1, *y.shape[y.dim() - codomain.event_dim :])[:1].clone().requires_grad_()
    checks = {
        "forward": (lambda z: transform(z), point),
        "inverse": (lambda z: transform.inv(z), image_point),
        "log|det|": (lambda z: transform.log_abs_det_jacobian(transform.inv(z), z), image_point),
    }
    for name, (function, at) in checks.items():
        try:
            torch.autograd.gradcheck(function, (at,))
        except RuntimeError as error:
            raise ConformanceError(f"gradient of {name}: {error}") from error


def check_distribution(distribution: Distribution, *, draws: int = 2000) -> None:
    r"""Check a reparameterised, everywhere supported distribution: shapes, copies, and draws against density.

    Rules: ``support.event_dim``, sample and log_prob shapes; samples lie in the support; a wrong event shape raises
    under validation; ``expand`` to new batch axes keeps class, draws shape and density, chains, and refuses to shrink;
    deepcopy and pickle give the same density; ``rsample`` carries gradients; and the identities of Stein (1972),
    :math:`E[\partial_j \log p] = 0`, :math:`E[x_j \partial_j \log p] = -1` for every coordinate j, hold within Monte
    Carlo error, which a density that lost its Jacobian or its scale does not satisfy. A correct distribution fails with
    probability 1e-6. The draws are the same at every call, and the global generator is left as it was.

    Args:
        distribution: distribution with ``has_rsample`` and a smooth density on the whole space.
        draws: number of draws for the Stein identities.

    Raises:
        ConformanceError: naming the first broken rule.

    Example:
        >>> import pyro.distributions as dist
        >>> check_distribution(dist.Normal(torch.zeros(2, 3), 2.0).to_event(2))
    """
    with isolated_seed(0):
        batch, event = distribution.batch_shape, distribution.event_shape
        support = distribution.support
        _require(
            support is not None and support.event_dim == len(event),
            f"support has another event_dim than event_shape {tuple(event)}",
        )
        _require(distribution.has_rsample, "has_rsample is False")
        value = distribution.sample((2,))
        _require(value.shape == (2, *batch, *event), f"sample has shape {tuple(value.shape)}")
        _require(support is not None and bool(support.check(value).all()), "a sample lies outside the support")
        density = distribution.log_prob(value)
        _require(density.shape == (2, *batch), f"log_prob has shape {tuple(density.shape)}, not {(2, *batch)}")

        _check_copies(distribution, value, density)
        _check_expand(distribution, value, density)
        _check_stein(distribution, draws)


def _check_copies(distribution: Distribution, value: Tensor, density: Tensor) -> None:
    for name, twin in (("deepcopy", copy.deepcopy(distribution)), ("pickle", pickle.loads(pickle.dumps(distribution)))):
        _close(name, twin.log_prob(value), density, _EXACT)
    validated = copy.deepcopy(distribution)
    validated._validate_args = True
    if distribution.event_shape:
        wrong = torch.cat([value, value], dim=-1)
        try:
            validated.log_prob(wrong)
        except ValueError:
            pass
        else:
            raise ConformanceError("a value of a wrong event shape is scored without complaint")


def _check_expand(distribution: Distribution, value: Tensor, density: Tensor) -> None:
    batch = distribution.batch_shape
    wide = (2, *batch)
    try:
        expanded = distribution.expand(torch.Size(wide))
        again = expanded.expand(torch.Size((3, *wide)))
    except NotImplementedError as error:
        raise ConformanceError("expand is not implemented") from error
    _require(type(expanded) is type(distribution), f"expand returned a {type(expanded).__name__}")
    _require(expanded.batch_shape == torch.Size(wide), f"expand gave batch_shape {tuple(expanded.batch_shape)}")
    _require(
        again.sample().shape == (3, *wide, *distribution.event_shape), "an expansion of an expansion has a wrong shape"
    )
    _close("density after expand", expanded.log_prob(value), density, _EXACT)
    for impossible in ((5, *wide), (1, *wide), wide):
        try:
            again.expand(torch.Size(impossible))
        except (RuntimeError, ValueError):
            continue
        raise ConformanceError(f"expand took batch shape {tuple(again.batch_shape)} to {impossible} without complaint")
    if batch:
        try:
            distribution.expand(torch.Size())
        except (RuntimeError, ValueError):
            return
        raise ConformanceError(f"expand dropped the batch shape {tuple(batch)} without complaint")


def _check_stein(distribution: Distribution, draws: int) -> None:
    sample = distribution.rsample((draws,)).detach().requires_grad_()
    (score,) = torch.autograd.grad(distribution.log_prob(sample).sum(), sample)
    statistics = torch.cat([score.flatten(1), (sample.detach() * score + 1).flatten(1)], dim=1)  # (draws, 2 size)
    error = statistics.std(0) / math.sqrt(draws)
    z = (statistics.mean(0) / error.clamp(min=torch.finfo(error.dtype).tiny)).abs()
    bound = -float(torch.special.ndtri(torch.tensor(_FAILURE_RATE / (2 * statistics.shape[1]), dtype=torch.float64)))
    worst = int(z.argmax())
    half = statistics.shape[1] // 2
    identity = "E[d log p] = 0" if worst < half else "E[x d log p] = -1"
    _require(
        float(z[worst]) <= bound,
        f"draws disagree with log_prob: {identity} is off by {float(z[worst]):.1f} standard errors at coordinate "
        f"{worst % half} (bound {bound:.1f})",
    )
