r"""The distribution of the next token given a past, with its mass and its roots."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from probattn.distributions import expanded_shape, noise_distribution
from probattn.errors import InputError, require_at_least
from probattn.folds.branches import Branches
from probattn.numerics import linalg
from probattn.numerics.random import isolated_seed
from probattn.solve.context import Context
from probattn.solve.selection import Selection, require_selection
from probattn.solve.starts import hull_points
from probattn.solve.token import find_roots, solve_token

__all__ = ["Mass", "NextToken"]

_LOG = logging.getLogger(__name__)
_CORNERS = 64
_WIDE = 1.5  # scale of the proposals, in that of the noise
_BUDGET = 2_000_000_000  # multiplications
_LEAST = 512  # proposals, however long the past
_CHUNK = 2**22  # numbers of a chunk of proposals


class Mass(NamedTuple):
    """Mass Z of a next-token density.

    Attributes:
        value: the estimate, or the exact value.
        standard_error: zero where it is exact.
        method: "contraction" (exactly one), "branches" (exact, one dimension) or "importance sampling".
    """

    value: float
    standard_error: float
    method: str


class NextToken(dist.TorchDistribution):
    r"""u with u = mu(past, u) + eps, eps ~ N(0, S).

    .. math:: \log p(u | \text{past}) = \log N(u - \mu; 0, S) + \log|\det J(u)|

    This is a normalised density where u -> u - mu(u) does not fold; elsewhere its mass is the mean number of solutions,
    see :meth:`mass`. With one-dimensional tokens a selection rule makes it the exact, normalised distribution of the
    root that is taken.

    Args:
        past: tokens seen so far, as a context.
        noise_scale: as in :class:`LatentAttention`.
        scale_tril: as in :class:`LatentAttention`.
        selection: "unique" raises in sampling where a second solution is found; "uniform", "smallest_step" and
            "nearest_mean" choose. In one dimension, for one past, ``log_prob`` is then the density of the choice.
        validate_args: as in torch.

    Raises:
        InputError: as :class:`LatentAttention`; or a noise below what the floating-point numbers tell apart.

    Example:
        >>> from probattn.attention import CausalAttention
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[3.0]]).double())
        >>> past = Context.of(attention, torch.tensor([[-1.0], [1.0]]).double())
        >>> following = NextToken(past, 0.5)
        >>> len(following.roots(0.0)), round(following.mass().value, 4), following.mass().method
        (3, 2.2301, 'branches')
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own convention
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self,
        past: Context,
        noise_scale: float | Tensor | None = None,
        *,
        scale_tril: Tensor | None = None,
        selection: Selection = "unique",
        validate_args: bool | None = None,
    ) -> None:
        require_selection(selection)
        dim, like = past.attention.dim, past.attention.like
        noise = noise_distribution(noise_scale, 1, dim, like=like, scale_tril=scale_tril, validate_args=validate_args)
        _require_resolved(noise, past)
        batch_shape = torch.broadcast_shapes(past.batch_shape, noise.batch_shape)
        # Expanded, so that each past of a batch draws noise of its own.
        self.past, self.noise, self.selection = past, noise.expand(batch_shape), selection
        super().__init__(batch_shape, torch.Size((dim,)), validate_args=validate_args)
        self._branches: Branches | None = None

    def expand(self, batch_shape: Any, _instance: Any = None) -> NextToken:
        """The same distribution with its batch axes expanded; past and noise broadcast."""
        shape = expanded_shape(self.batch_shape, batch_shape)
        new: NextToken = self._get_checked_instance(NextToken, _instance)  # type: ignore[no-untyped-call]
        new.past, new.selection, new._branches = self.past, self.selection, self._branches
        new.noise = self.noise.expand(shape)
        super(NextToken, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def _scalar(self) -> bool:
        """True if the exact one-dimensional tools apply, for one past, p = 1 and the strict mask."""
        attention = self.past.attention
        return (
            attention.dim == 1
            and attention.mask == "strict"
            and not self.past.batch_shape
            and not self.noise.batch_shape
        )

    @property
    def branches(self) -> Branches:
        """Exact roots and distribution functions.

        Raises:
            InputError: several dimensions, a batch, or an inclusive mask.
        """
        if not self._scalar:
            raise InputError(
                "exact roots, cdf and icdf need one-dimensional tokens, one past, one noise scale, a strict mask."
            )
        if self._branches is None:
            rule = "all" if self.selection == "unique" else self.selection
            self._branches = Branches(self.past, float(self.noise.stddev.flatten()[0]), rule)
        return self._branches

    def log_prob(self, value: Tensor, normalised: bool = False) -> Tensor:
        """Log-density, ``(*batch,)``, with the log-probability of the choice under a selection rule in one dimension.

        Args:
            value: u, ``(*batch, p)``.
            normalised: subtract log Z, exact or estimated as :meth:`mass` says, so that the density integrates to one
                even where the map folds. It is then the distribution of the tokens that solve for a random noise, each
                counted alike, and not that of any rule that picks one. A one-dimensional density with a selection rule
                is normalised as it is.

        Raises:
            InputError: ``normalised`` for a batch of pasts.
        """
        if self._validate_args:
            self._validate_sample(value)
        if normalised and not (self._scalar and self.selection != "unique"):
            return self.log_prob(value) - math.log(self.mass().value)
        mean, jacobian = self.past.mean_and_jacobian(value)
        density: Tensor = self.noise.log_prob((value - mean).unsqueeze(-2)) + linalg.slogdet(jacobian)[1]
        if self.selection == "unique" or not self._scalar:
            return density
        weights = self.branches.log_weight(value.detach().squeeze(-1).cpu().numpy())
        return density + torch.as_tensor(weights).to(density).expand(density.shape)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        """Draw noise and solve; see ``selection``.

        Raises:
            SeveralSolutionsError, NoSolutionError: see :func:`probattn.solve.sequence.solve_sequence`.
        """
        noise = self.noise.sample(torch.Size(sample_shape)).squeeze(-2)  # (*sample, *batch, p)
        return solve_token(self.past, noise, self.selection, self.past.length)[0]

    def roots(self, noise: float | Tensor) -> Tensor:
        """The solutions for a noise.

        Args:
            noise: a number in one dimension; eps, (p,), in several.

        Returns:
            In one dimension all of them in increasing order, (K,), proved; in several those that many starts found,
            (K, p), see :func:`probattn.solve.token.find_roots`.

        Raises:
            InputError: a batch, or an inclusive mask in one dimension.
        """
        eps = torch.as_tensor(noise).to(self.past.attention.like)
        if self.past.attention.dim == 1 and eps.dim() == 0:
            return find_roots(self.past, eps.unsqueeze(-1)).squeeze(-1)
        return find_roots(self.past, eps)

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function, relative to the total mass, elementwise on ``(*shape, 1)``; one dimension, exact."""
        branches = self.branches
        return torch.as_tensor(branches.cdf(value.detach().cpu().numpy()) / branches.mass).to(value)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles, elementwise on ``(*shape, 1)``; one dimension, exact to the last bits."""
        quantiles = [self.branches.icdf(q) for q in value.detach().flatten().tolist()]
        return torch.tensor(quantiles, dtype=value.dtype, device=value.device).view(value.shape)

    @torch.no_grad()
    def mass(self, draws: int = 20_000, seed: int = 0, *, budget: int = _BUDGET) -> Mass:
        r"""Z of N(e(u); 0, S) \|det J(u)\|: the mean number of solutions.

        Exactly one where the contraction bound certifies; exact from the branches in one dimension; else by importance
        sampling from u = m + eps' with m one of the values that the mean can come near and eps' from a noise of 1.5
        times the scale. The estimator is defensive: the proposal has heavier tails than the integrand.

        Args:
            draws: largest number of proposals.
            seed: random seed of the proposals; the global random state is left as it was.
            budget: largest number of multiplications, of which a proposal takes about n p (p + 2) after n tokens. After
                a long past there are fewer proposals, at least 512, and the standard error says what that costs.

        Raises:
            InputError: batches; fewer than two draws.

        Cost: linear in n below the budget, in memory of 32 MiB.
        """
        if self.batch_shape:
            raise InputError(f"mass is for one past at a time; this one has batch shape {tuple(self.batch_shape)}.")
        require_at_least("draws", draws, 2)
        if float(self.past.contraction_bound()) < 1:
            return Mass(1.0, 0.0, "contraction")
        if self._scalar:
            branches = self.branches if self.selection == "unique" else Branches(self.past, self.branches.noise_scale)
            return Mass(branches.mass, 0.0, "branches")
        dim = self.event_shape[0]
        affordable = max(_LEAST, budget // (max(1, self.past.length) * dim * (dim + 2)))
        if affordable < draws:
            _LOG.info(
                "mass after %s tokens: %s proposals within the budget, not %s", *(self.past.length, affordable, draws)
            )
        count = min(draws, affordable)
        weights = self.importance_weights(count, seed)[0]
        return Mass(float(weights.mean()), float(weights.std() / math.sqrt(count)), "importance sampling")

    @torch.no_grad()
    def importance_weights(self, draws: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        r"""N \|det J\| / q and N det J / q at proposals u ~ q, (draws,) each; their means estimate Z and 1.

        The mean of the second is exactly one: an estimate far from it says that the proposals miss part of the mass.
        """
        values = self.past.values.sum(-3)  # (n, p)
        centre = values.mean(0, keepdim=True)
        anchors = torch.cat([centre, values, (values + centre) / 2])  # (A, p)
        if self.past.length > 1 and self.past.values.shape[-3] > 1:  # heads may look at different tokens
            anchors = torch.cat([anchors, hull_points(self.past, _CORNERS)])
        with isolated_seed(seed):
            chosen = torch.randint(len(anchors), (draws,))
            noise = _WIDE * self.noise.sample((draws,)).squeeze(-2)
        u = anchors[chosen] + noise  # (draws, p)
        size = max(1, _CHUNK // (len(anchors) + self.past.length * u.shape[-1]))
        parts = []
        for k, chunk in enumerate(u.split(size)):
            parts.append(self._weights(chunk, anchors - centre, centre))
            _LOG.debug("mass: %s of %s proposals", min(draws, (k + 1) * size), draws)
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]

    def _weights(self, u: Tensor, anchors: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of some proposals, given the anchors less their centre."""
        # The mixture's density from distances of whitened points, one product of matrices for all pairs.
        points, knots = self._whitened(u - centre) / _WIDE, self._whitened(anchors) / _WIDE
        squares = points.square().sum(-1, keepdim=True) + knots.square().sum(-1) - 2 * points @ knots.mT
        log_q = torch.logsumexp(-0.5 * squares.clamp(min=0), dim=1) + self.noise.log_prob(u.new_zeros(1, u.shape[-1]))
        log_q = log_q - math.log(len(anchors)) - u.shape[-1] * math.log(_WIDE)
        mean, jacobian = self.past.mean_and_jacobian(u)
        sign, logabs = linalg.slogdet(jacobian)
        weights = (self.noise.log_prob((u - mean).unsqueeze(-2)) + logabs - log_q).exp()
        return weights, sign * weights

    def _whitened(self, x: Tensor) -> Tensor:
        """L^-1 x for S = L L^T, (K, p)."""
        base: Any = self.noise
        while hasattr(base, "base_dist"):
            base = base.base_dist
        if hasattr(base, "scale_tril"):
            tril = base.scale_tril.reshape(x.shape[-1], x.shape[-1])
            white: Tensor = torch.linalg.solve_triangular(tril, x.mT, upper=False).mT
            return white
        scaled: Tensor = x / self.noise.stddev.reshape(x.shape[-1])
        return scaled

    def __repr__(self) -> str:
        return (
            f"NextToken(length={self.past.length}, selection={self.selection!r}, batch_shape={tuple(self.batch_shape)})"
        )


def _require_resolved(noise: dist.TorchDistribution, past: Context) -> None:
    """Refuse a noise smaller than the error to which u - mu(u) = eps is solved."""
    size = float(past.largest.max()) if past.largest.numel() else 0.0
    resolved = 1e3 * torch.finfo(past.attention.like.dtype).eps * (1 + size)
    smallest = float(noise.stddev.min()) if noise.stddev.numel() else math.inf
    if smallest < resolved:
        raise InputError(
            f"the noise has a standard deviation of {smallest:.3g}, and after tokens of size {size:.3g} "
            f"{past.attention.like.dtype} tells solutions apart down to {resolved:.2g}: those of different noise would "
            "coincide. Use a larger noise_scale, or float64."
        )
