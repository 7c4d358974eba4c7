r"""The posterior of a Pyro model as a plain function on R^D, many points at a time.

Every latent site is moved to unconstrained space by torch's own ``biject_to``; the log-density there carries the
log-determinant of that move. One trace of the model scores a whole batch of points: they ride on a plate of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Transform, biject_to

from probattn.errors import InputError
from probattn.inference.runtime.isolation import isolated, require_local_parameters

__all__ = ["LogDensity"]


_SCORES = 2**23


class _Site(NamedTuple):
    shape: torch.Size
    transform: Transform
    unconstrained: torch.Size
    start: int
    stop: int


class LogDensity:
    r"""log p(theta, data) as a function of unconstrained z in R^D.

    .. math:: \log \pi(z) = \log p(\theta(z), \text{data}) + \log |\det \partial\theta / \partial z|

    Args:
        model: a Pyro module whose data plate is the last axis and whose sites accept particles (those of
            :mod:`probattn.models` do).
        data: its positional arguments; a first tensor of shape (C, N, T, p) gives each of C points its own data.

    Attributes:
        sites: shape, transform and place of each latent site in z.
        dim: D.

    Raises:
        InputError: a model without latent sites, with discrete ones, or whose parameters are not its own.

    Example:
        >>> from probattn.models import ScalarModel
        >>> target = LogDensity(ScalarModel(4), torch.zeros(3, 4, 1).double())
        >>> target.dim, target.log_density(torch.zeros(5, 2).double()).shape
        (2, torch.Size([5]))
    """

    def __init__(self, model: nn.Module, *data: Tensor) -> None:
        require_local_parameters(model)
        self.model, self.data = model, data
        self.sites: dict[str, _Site] = {}
        self.observed: list[str] = []
        self.dim = 0
        single = tuple(part[0] if part.dim() == 4 else part for part in data)
        with isolated(seed=0), torch.no_grad():
            trace = poutine.trace(poutine.block(model, hide_types=["param"])).get_trace(*single)
        for name, node in trace.nodes.items():
            law: Any = node.get("fn")
            if node["type"] != "sample" or isinstance(law, poutine.subsample_messenger._Subsample):
                continue
            if node["is_observed"]:
                self.observed.append(name)
                continue
            if law.support.is_discrete:
                raise InputError(f"site {name} is discrete; the inference here is for continuous parameters.")
            transform = biject_to(law.support)
            value: Any = node["value"]
            shape = value.shape
            free = torch.Size(transform.inverse_shape(shape))
            self.sites[name] = _Site(shape, transform, free, self.dim, self.dim + free.numel())
            self.dim += free.numel()
        if not self.sites:
            raise InputError("the model has no latent site; there is nothing to infer.")

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Values of the sites, (*batch, *event), from z, (*batch, D)."""
        return {
            name: site.transform(z[..., site.start : site.stop].reshape((*z.shape[:-1], *site.unconstrained)))
            for name, site in self.sites.items()
        }

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """z, (*batch, D), from values of the sites, (*batch, *event)."""
        parts = []
        for name, site in self.sites.items():
            free = site.transform.inv(values[name])
            parts.append(free.reshape(*free.shape[: free.dim() - len(site.unconstrained)], -1))
        return torch.cat(parts, dim=-1)

    def log_density(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Log pi(z), (C,), at C points z, (C, D). Differentiable; NaN and infinities are passed on as they are.

        Args:
            z: the points.
            rows: where each point has data of its own, which of the data sets are meant, (C,); None: all, in order.
        """
        values = self.constrain(z)
        terms = self.log_terms(values, rows)
        return _total(terms) + self._log_volume(z, values)

    def value_and_gradient(self, z: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log pi, (C,), and its gradient, (C, D), both detached; arguments as in :meth:`log_density`."""
        point = z.detach().requires_grad_(True)
        with torch.enable_grad():
            value = self.log_density(point, rows)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient

    def hessian(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Second derivatives of log pi, (C, D, D), symmetric, detached; arguments as in :meth:`log_density`.

        One backward pass a coordinate, for all points together.
        """
        point = z.detach().requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.log_density(point, rows).sum(), point, create_graph=True)
            found = torch.stack(
                [torch.autograd.grad(gradient[:, k].sum(), point, retain_graph=True)[0] for k in range(self.dim)],
                dim=-2,
            )
        return 0.5 * (found + found.mT)

    def evaluate(self, z: Tensor) -> dict[str, Tensor]:
        """Terms of :meth:`log_terms` and their total with the volume as ``lp``, (S,) or (S, N), at S points z, (S, D).

        The points are taken in groups, so that memory does not grow with S; nothing is differentiable.
        """
        data = self.data[0]
        each = data.numel() * data.shape[-2 if data.dim() > 2 else -1]  # scores of every position against every other
        groups = z.detach().split(max(1, _SCORES // each))
        rows = []
        with torch.no_grad():
            for group in groups:
                values = self.constrain(group)
                terms = self.log_terms(values)
                rows.append({**terms, "lp": _total(terms) + self._log_volume(group, values)})
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def prior_draws(self, count: int, seed: int) -> dict[str, Tensor]:
        """Draws of the sites from their prior, (count, *event) each."""
        single = tuple(part[:1] for part in self.data)
        with isolated(self.data[0].device, seed=seed), pyro.plate("points", count, dim=-2), torch.no_grad():
            trace = poutine.trace(self.model).get_trace(*single)
        drawn: dict[str, Any] = {name: trace.nodes[name]["value"] for name in self.sites}
        return {name: value.squeeze(1) for name, value in drawn.items()}

    def log_terms(self, values: Mapping[str, Tensor], rows: Tensor | None = None) -> dict[str, Tensor]:
        """Log-probability of each site, (C,) for latent ones and (C, N) for observed ones, at values (C, *event)."""
        data = self.data if rows is None else tuple(part[rows] if part.dim() == 4 else part for part in self.data)
        points = len(next(iter(values.values())))
        lifted = {name: value.unsqueeze(1) for name, value in values.items()}  # (C, 1, *event): beside the data plate
        # Unvalidated: far out in z a scale overflows, and the density there is to be NaN, a divergence, not an error.
        with isolated(), pyro.validation_enabled(False), pyro.plate("points", points, dim=-2):
            traced = poutine.trace(poutine.condition(self.model, data=lifted)).get_trace(*data)
            traced.compute_log_prob()
        terms = {}
        for name in [*self.sites, *self.observed]:
            term = traced.nodes[name]["log_prob"]
            term = term.expand(points, term.shape[-1])
            terms[name] = term.squeeze(-1) if name in self.sites else term
        return terms

    def _log_volume(self, z: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        total = z.new_zeros(z.shape[:-1])
        for name, site in self.sites.items():
            free = z[..., site.start : site.stop].reshape((*z.shape[:-1], *site.unconstrained))
            ladj = site.transform.log_abs_det_jacobian(free, values[name])
            total = total + ladj.reshape(*z.shape[:-1], -1).sum(-1)
        return total


def _total(terms: Mapping[str, Tensor]) -> Tensor:
    """Sum of the terms at each point, (C,)."""
    return torch.stack([term if term.dim() == 1 else term.sum(-1) for term in terms.values()]).sum(0)
