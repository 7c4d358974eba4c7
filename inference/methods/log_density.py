r"""The posterior of a Pyro model as a plain function on R^D, many points at a time.

Every latent site is moved to unconstrained space by torch's own ``biject_to``; the log-density there carries the
log-determinant of that move. One trace of the model scores a whole batch of points, which ride on a plate of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Transform, biject_to

from probattn.errors import InputError
from probattn.inference.runtime.isolation import isolated, require_local_parameters

__all__ = ["LogDensity"]

_GROUP_BYTES = 2**27  # what a group of points may take where they are evaluated a group at a time
_PEAK_OVER_SAVED = 3.0  # 1.6 to 2.9 over sizes of sequences, heads and ranks, with compiled kernels or none


class _Site(NamedTuple):
    shape: torch.Size
    transform: Transform
    unconstrained: torch.Size
    start: int
    stop: int


class LogDensity:
    r"""Log-density log p(theta, data) as a function of unconstrained z in R^D.

    .. math:: \log \pi(z) = \log p(\theta(z), \text{data}) + \log |\det \partial\theta / \partial z|

    Args:
        model: Pyro module whose data plate is the last axis and whose sites accept particles, such as those of
            :mod:`probattn.models`.
        data: its positional arguments, sequences along the first axis; a first tensor of shape ``(C, N, T, p)`` gives
            each of C points its own data.

    Attributes:
        sites: shape, transform and place in z of each latent site, by name.
        observed: names of the observed sites.
        dim: D.

    Raises:
        InputError: no sequences; a model without latent sites, with discrete ones, or whose parameters are not its own.

    Example:
        >>> from probattn.models import ScalarModel
        >>> target = LogDensity(ScalarModel(4), torch.zeros(3, 4, 1).double())
        >>> target.dim, target.log_density(torch.zeros(5, 2).double()).shape
        (2, torch.Size([5]))
    """

    def __init__(self, model: nn.Module, *data: Tensor) -> None:
        require_local_parameters(model)
        self.model, self.data = model, data
        if self.sequences == 0:
            raise InputError("there are no sequences to fit; give at least one.")
        self.sites: dict[str, _Site] = {}
        self.observed: list[str] = []
        self.dim = 0
        self._like: Tensor
        with isolated(seed=0), torch.no_grad():
            trace = poutine.trace(poutine.block(model, hide_types=["param"])).get_trace(*self._first_sequence)
        for name, node in trace.nodes.items():
            distribution: Any = node.get("fn")
            if node["type"] != "sample" or isinstance(distribution, poutine.subsample_messenger._Subsample):
                continue
            if node["is_observed"]:
                self.observed.append(name)
                continue
            if distribution.support.is_discrete:
                raise InputError(f"site {name} is discrete; the inference here is for continuous parameters.")
            transform = biject_to(distribution.support)
            value: Any = node["value"]
            shape = value.shape
            if not self.sites:
                self._like = value.new_zeros(())
            free = torch.Size(transform.inverse_shape(shape))
            self.sites[name] = _Site(shape, transform, free, self.dim, self.dim + free.numel())
            self.dim += free.numel()
        if not self.sites:
            raise InputError("the model has no latent site; there is nothing to infer.")

    @property
    def data_sets(self) -> int | None:
        """Number of data sets C where each point has its own; None where all points share one."""
        return len(self.data[0]) if self.data[0].dim() == 4 else None

    @property
    def sequences(self) -> int:
        """Number of sequences N in a data set."""
        return self.data[0].shape[0 if self.data_sets is None else 1]

    @cached_property
    def bytes_per_point(self) -> int:
        """Largest memory of :meth:`value_and_gradient` per point, in bytes.

        Measured: what the graph of one sequence holds, times the number of sequences, times a factor for what exists
        only in passing.
        """
        held: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no two have one address

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage
            return tensor

        single = LogDensity(self.model, *(part.clone() for part in self._first_sequence))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            single.value_and_gradient(self.origin.unsqueeze(0))
        return int(_PEAK_OVER_SAVED * self.sequences * sum(storage.nbytes() for storage in held.values()))

    @property
    def group_size(self) -> int:
        """Number of points that are evaluated together within 128 MiB, at least 1."""
        return max(1, _GROUP_BYTES // self.bytes_per_point)

    @property
    def origin(self) -> Tensor:
        """The origin of unconstrained space, ``(D,)``."""
        return self._like.new_zeros(self.dim)

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Values of the sites, ``(*batch, *event)`` each, from z, ``(*batch, D)``."""
        return {
            name: site.transform(z[..., site.start : site.stop].reshape((*z.shape[:-1], *site.unconstrained)))
            for name, site in self.sites.items()
        }

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained z, ``(*batch, D)``, from values of the sites, ``(*batch, *event)`` each."""
        parts = []
        for name, site in self.sites.items():
            free = site.transform.inv(values[name])
            parts.append(free.reshape(*free.shape[: free.dim() - len(site.unconstrained)], -1))
        return torch.cat(parts, dim=-1)

    def log_density(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Log-density log pi(z). Differentiable; NaN and infinities are passed on as they are.

        Args:
            z: C points, ``(C, D)``.
            rows: where each point has its own data, numbers of the data sets, ``(C,)``; None: all, in order.

        Returns:
            ``(C,)``.
        """
        values = self.constrain(z)
        terms = self.log_terms(values, rows)
        return _total(terms) + self._log_volume(z, values)

    def value_and_gradient(self, z: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-density and its gradient, detached.

        Args:
            z: C points, ``(C, D)``.
            rows: as in :meth:`log_density`.

        Returns:
            ``(C,)`` and ``(C, D)``.
        """
        point = z.detach().requires_grad_(True)
        with torch.enable_grad():
            value = self.log_density(point, rows)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient

    def hessian(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Second derivatives of the log-density by central differences of its exact gradient, symmetric and detached.

        Exact second derivatives of attention take memory quadratic in T; gradients take linear memory, and their
        differences are right to about 1e-10 in double precision. Costs 2 D gradients.

        Args:
            z: C points, ``(C, D)``.
            rows: as in :meth:`log_density`.

        Returns:
            ``(C, D, D)``.
        """
        size = torch.finfo(z.dtype).eps ** (1 / 3) * (1 + z.abs())
        columns = []
        for k in range(self.dim):
            shift = torch.zeros_like(z)
            shift[:, k] = size[:, k]
            above, below = z + shift, z - shift
            difference = self.value_and_gradient(above, rows)[1] - self.value_and_gradient(below, rows)[1]
            columns.append(difference / (above - below)[:, k : k + 1])
        found = torch.stack(columns, dim=-1)
        return 0.5 * (found + found.mT)

    def evaluate(self, z: Tensor) -> dict[str, Tensor]:
        """Terms of :meth:`log_terms`, and their total with the volume as ``lp``, without derivatives.

        The points are taken in groups, so that memory does not grow with their number.

        Args:
            z: S points, ``(S, D)``.

        Returns:
            ``(S,)`` or ``(S, N)`` by name.
        """
        rows = []
        with torch.no_grad():
            for group in z.detach().split(self.group_size):
                values = self.constrain(group)
                terms = self.log_terms(values)
                rows.append({**terms, "lp": _total(terms) + self._log_volume(group, values)})
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def prior_draws(self, count: int, seed: int) -> dict[str, Tensor]:
        """Draws of the sites from their prior.

        Args:
            count: number of draws.
            seed: random seed.

        Returns:
            ``(count, *event)`` by name.
        """
        with isolated(self.data[0].device, seed=seed), pyro.plate("points", count, dim=-2), torch.no_grad():
            trace = poutine.trace(self.model).get_trace(*self._first_sequence)
        drawn: dict[str, Any] = {name: trace.nodes[name]["value"] for name in self.sites}
        return {name: value.squeeze(1) for name, value in drawn.items()}

    def log_terms(self, values: Mapping[str, Tensor], rows: Tensor | None = None) -> dict[str, Tensor]:
        """Log-probability of each site.

        Args:
            values: values of the latent sites, ``(C, *event)`` by name.
            rows: as in :meth:`log_density`.

        Returns:
            ``(C,)`` for latent and ``(C, N)`` for observed sites, by name.
        """
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

    @property
    def _first_sequence(self) -> tuple[Tensor, ...]:
        """The data with one sequence only, in one data set."""
        return tuple((part[0] if part.dim() == 4 else part)[:1] for part in self.data)

    def _log_volume(self, z: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        total = z.new_zeros(z.shape[:-1])
        for name, site in self.sites.items():
            free = z[..., site.start : site.stop].reshape((*z.shape[:-1], *site.unconstrained))
            log_det = site.transform.log_abs_det_jacobian(free, values[name])
            total = total + log_det.reshape(*z.shape[:-1], -1).sum(-1)
        return total


def _total(terms: Mapping[str, Tensor]) -> Tensor:
    """Sum of the terms at each point, ``(C,)``."""
    return torch.stack([term if term.dim() == 1 else term.sum(-1) for term in terms.values()]).sum(0)
