"""Starts of Pyro's samplers and guides on the side of the boundary where nothing folds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import biject_to

from probattn.barrier import stability_margin
from probattn.distributions import LatentAttention, unwatched_folds
from probattn.errors import InputError
from probattn.numerics.random import isolated_seed

__all__ = ["folded_share", "init_to_feasible"]

_STARTS = 8  # different starts, for the chains of a sampler
_HALVINGS = 30


def init_to_feasible(
    model: Callable[..., Any], *data: Any, spread: float = 0.1, seed: int = 0, **options: Any
) -> Callable[[Mapping[str, Any]], Tensor]:
    r"""Initialisation strategy for Pyro that starts where det J > 0 and no real eigenvalue of J is negative.

    The sites start near the origin of unconstrained space, where the attention is nearly uniform and :math:`J_i` nearly
    the identity, and nearer until every observed :class:`~probattn.distributions.LatentAttention` is unfolded at the
    data. Pyro's own ``init_to_uniform`` and ``init_to_median`` know nothing of folds: where :math:`|\det J|` beyond one
    is large, a chain that starts there stays.

    Args:
        model: Pyro model.
        *data: its arguments.
        spread: standard deviation of the first starts tried, in unconstrained space.
        seed: random seed of the starts; the global random state is left as it was.
        **options: its keyword arguments.

    Returns:
        Strategy for ``NUTS(model, init_strategy=...)`` and for ``init_loc_fn`` of Pyro's guides. Each run of the model
        takes one of eight starts, at random.

    Raises:
        InputError: no such start is found, or the model observes no LatentAttention.

    Cost: eight runs of the model or a few more. Source: derived here; the margin is that of theory, section 4.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from probattn import CausalAttention
        >>> def model(u):
        ...     a = pyro.sample("a", dist.Normal(torch.zeros(1, 1, dtype=torch.float64), 3.0).to_event(2))
        ...     return pyro.sample("u", LatentAttention(CausalAttention.from_qk_matrix(a), 1.0, len(u)), obs=u)
        >>> u = torch.tensor([[-2.0], [2.0], [0.1]], dtype=torch.float64)
        >>> start = init_to_feasible(model, u)
        >>> with InitMessenger(start):
        ...     trace = poutine.trace(model).get_trace(u)
        >>> folded_share(trace.nodes["u"]["fn"].attention, u)
        0.0
    """
    with isolated_seed(seed):
        starts = [_find(model, data, options, spread) for _ in range(_STARTS)]
    return _Strategy(starts)


def folded_share(attention: Any, u: Tensor) -> float:
    """Share of draws of the parameters beyond a fold: with det J < 0 at a token of some sequence.

    Args:
        attention: attention with the draws as its first batch axis, ``(S, ...)``, or without batch axes.
        u: sequences, ``(*batch, T, p)``, whose batch axes broadcast with those of the attention.

    Returns:
        The share, 0 where all draws are on the side of the boundary where the density is one.

    Example:
        >>> from probattn import CausalAttention
        >>> draws = CausalAttention.from_qk_matrix(torch.tensor([0.5, 3.0]).view(2, 1, 1, 1), heads=1)
        >>> folded_share(draws, torch.tensor([[-1.0], [1.0], [0.0]]))
        0.5
    """
    with torch.no_grad():
        folded = attention.logabsdet(u)[0] < 0
    draws = attention.batch_shape[0] if attention.batch_shape else 1
    return float(folded.reshape(draws, -1).any(-1).double().mean())


class _Strategy:
    """One of the starts for each run of a model: a new one where a site is asked for again.

    Args:
        starts: values of the sites by name.
    """

    def __init__(self, starts: list[dict[str, Tensor]]) -> None:
        self._starts = starts
        self._current: dict[str, Tensor] = {}

    def __call__(self, site: Mapping[str, Any]) -> Tensor:
        name = site["name"]
        if name not in self._current:
            self._current = dict(self._starts[int(torch.randint(len(self._starts), ()))])
        if name not in self._current:
            raise InputError(f"init_to_feasible: the model has a site {name!r} that it did not have before.")
        return self._current.pop(name).clone()


def _find(
    model: Callable[..., Any], data: tuple[Any, ...], options: Mapping[str, Any], spread: float
) -> dict[str, Tensor]:
    for halving in range(_HALVINGS):
        scale = spread * 0.5**halving

        def near(site: Mapping[str, Any], scale: float = scale) -> Tensor:
            transform = biject_to(site["fn"].support)
            free = transform.inv(site["fn"].sample())
            value: Tensor = transform(scale * torch.randn_like(free))
            return value

        with torch.no_grad(), unwatched_folds(), poutine.block(), InitMessenger(near):
            trace = poutine.trace(poutine.block(model, hide_types=["param"])).get_trace(*data, **options)
        nodes: list[Any] = list(trace.nodes.values())
        densities = [
            (found, node["value"])
            for node in nodes
            if node["type"] == "sample" and node["is_observed"] and (found := _latent_attention(node["fn"])) is not None
        ]
        if not densities:
            raise InputError("init_to_feasible: the model observes no LatentAttention; use pyro's own strategies.")
        if all(_unfolded(found.attention, value) for found, value in densities):
            latent = (node for node in nodes if node["type"] == "sample" and not node["is_observed"])
            return {node["name"]: node["value"] for node in latent if type(node["fn"]).__name__ != "_Subsample"}
    raise InputError(
        f"init_to_feasible: det J < 0 at the data within {spread * 0.5 ** (_HALVINGS - 1):.1g} of the origin; "
        "standardise the data."
    )


def _latent_attention(distribution: Any) -> LatentAttention | None:
    """The density behind masks, events and expansions."""
    while distribution is not None and not isinstance(distribution, LatentAttention):
        distribution = getattr(distribution, "base_dist", None)
    return distribution


@torch.no_grad()
def _unfolded(attention: Any, u: Tensor) -> bool:
    positive = bool((attention.logabsdet(u)[0] > 0).all())
    return positive and bool((stability_margin(attention, u, kind="spectral") > 0).all())
