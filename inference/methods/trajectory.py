r"""Transitions of the No-U-Turn sampler, of many chains in one tensor program.

A trajectory of the Hamiltonian

.. math:: H(z, r) = -\log \pi(z) + \tfrac12 r^T M^{-1} r

is doubled to either side at random until it turns back, and one of its points is drawn with weights exp(-H): Hoffman
and Gelman (2014, arXiv 1111.4246), with the multinomial draw and the generalised criterion of Betancourt (2017, arXiv
1701.02434). The tree is built leaf by leaf and not by recursion, so that all chains take the same step at the same
time: Phan, Pradhan and Jankowiak (2019, arXiv 1912.11554).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Metric", "Point", "ValueAndGradient", "grow_trajectory", "leapfrog", "transition"]

ValueAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_DIVERGENCE = 1000.0  # error of the energy beyond which a trajectory has left the typical set, as in Stan


class Point(NamedTuple):
    """Points of C chains in phase space.

    Attributes:
        z: positions, ``(C, D)``.
        r: momenta, ``(C, D)``.
        value: log-density log pi, ``(C,)``.
        gradient: its gradient, ``(C, D)``.
    """

    z: Tensor
    r: Tensor
    value: Tensor
    gradient: Tensor

    def where(self, chosen: Tensor, other: Point) -> Point:
        """This point for the chosen chains, ``(C,)``, another for the rest."""
        return Point(*(_where(chosen, a, b) for a, b in zip(self, other, strict=True)))

    def at(self, rows: Tensor) -> Point:
        """Some of the chains by their numbers, ``(K,)``."""
        return Point(*(part[rows] for part in self))

    def put(self, rows: Tensor, new: Point) -> Point:
        """This point with some of the chains, ``(K,)``, replaced."""
        return Point(*(old.index_put((rows,), part) for old, part in zip(self, new, strict=True)))


class Metric:
    """Inverse mass matrix M^-1 of each chain, and what it does to momenta.

    Args:
        covariance: M^-1, an estimate of the posterior's covariance, ``(C, D, D)``.
    """

    def __init__(self, covariance: Tensor) -> None:
        self.covariance = covariance
        self._factor = torch.linalg.cholesky(covariance)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Momenta from N(0, M), ``(C, D)``."""
        noise = torch.randn(
            self._factor.shape[:-1], generator=generator, dtype=self._factor.dtype, device=self._factor.device
        )
        momenta: Tensor = torch.linalg.solve_triangular(self._factor.mT, noise.unsqueeze(-1), upper=True)
        return momenta.squeeze(-1)

    def velocity(self, r: Tensor) -> Tensor:
        """M^-1 r, ``(C, D)``."""
        return (self.covariance @ r.unsqueeze(-1)).squeeze(-1)

    def kinetic(self, r: Tensor) -> Tensor:
        """Kinetic energy, ``(C,)``."""
        return 0.5 * (r * self.velocity(r)).sum(-1)

    def at(self, rows: Tensor) -> Metric:
        """Some of the chains by their numbers, ``(K,)``."""
        chosen = Metric.__new__(Metric)
        chosen.covariance, chosen._factor = self.covariance[rows], self._factor[rows]
        return chosen

    def turning(self, left: Tensor, right: Tensor, total: Tensor) -> Tensor:
        r"""The generalised criterion: whether a piece of a trajectory turns back at either end.

        .. math:: v_\pm \cdot \bigl(\textstyle\sum_i r_i - \tfrac12 (r_- + r_+)\bigr) \le 0, \qquad v = M^{-1} r

        Half of the momenta at the ends is left out, so that the sum is the integral along the piece by the trapezoidal
        rule.

        Args:
            left: momentum at one end, ``(C, D)``.
            right: momentum at the other end, ``(C, D)``.
            total: sum of the momenta, both ends included, ``(C, D)``.

        Returns:
            ``(C,)``.
        """
        inner = total - 0.5 * (left + right)
        return ((self.velocity(left) * inner).sum(-1) <= 0) | ((self.velocity(right) * inner).sum(-1) <= 0)


def transition(
    value_and_gradient: ValueAndGradient,
    origin: Point,
    step_size: Tensor,
    metric: Metric,
    generator: torch.Generator,
    max_depth: int,
) -> tuple[Point, dict[str, Tensor]]:
    """Draw new momenta and the next point of every chain.

    Args:
        value_and_gradient: see :func:`grow_trajectory`.
        origin: present points; their momenta are not used.
        step_size: step size of each chain, ``(C,)``.
        metric: inverse mass matrices.
        generator: source of everything random.
        max_depth: largest number of doublings.

    Returns:
        The next points, and ``(C,)`` statistics by the names that ArviZ uses.
    """

    def uniform() -> Tensor:
        return torch.rand(len(step_size), generator=generator, dtype=step_size.dtype, device=step_size.device)

    origin = origin._replace(r=metric.draw(generator))
    return grow_trajectory(value_and_gradient, origin, step_size, metric, uniform, max_depth)


def grow_trajectory(
    value_and_gradient: ValueAndGradient,
    origin: Point,
    step_size: Tensor,
    metric: Metric,
    uniform: Callable[[], Tensor],
    max_depth: int,
) -> tuple[Point, dict[str, Tensor]]:
    """Double trajectories until they turn back, and draw a point of each.

    Args:
        value_and_gradient: log-density, ``(K,)``, and its gradient, ``(K, D)``, at points ``(K, D)`` of the chains
            whose numbers, ``(K,)``, are its second argument. Only chains whose trajectory still grows are asked for.
        origin: points where the trajectories begin.
        step_size: step size of each chain, ``(C,)``.
        metric: inverse mass matrices.
        uniform: numbers uniform on (0, 1), ``(C,)`` at each call: once for the direction of a doubling, once at each of
            its leaves, once at its end.
        max_depth: largest number of doublings.

    Returns:
        The points drawn, and ``(C,)`` each of ``acceptance_rate``, ``diverging``, ``energy``, ``lp``, ``n_steps`` and
        ``tree_depth``.
    """
    chains = len(step_size)
    options: dict[str, Any] = {"dtype": step_size.dtype, "device": step_size.device}
    energy = metric.kinetic(origin.r) - origin.value
    left = right = proposal = origin
    momenta, weight = origin.r, torch.zeros(chains, **options)
    accepted, leaves, depth = torch.zeros(3, chains, **options)
    diverging = torch.zeros(chains, dtype=torch.bool, device=step_size.device)
    growing = ~diverging
    for level in range(max_depth):
        if not bool(growing.any()):
            break
        forward = uniform() < 0.5
        end = right.where(forward, left)
        signed = torch.where(forward, step_size, -step_size)
        inside = growing  # chains whose subtree still grows
        sub, sub_weight = end, torch.full((chains,), -math.inf, **options)
        sub_momenta = torch.zeros_like(origin.r)
        marks: dict[int, tuple[Tensor, Tensor]] = {}
        for leaf in range(2**level):
            if not bool(inside.any()):
                break
            rows = inside.nonzero().squeeze(-1)
            end = end.put(rows, leapfrog(value_and_gradient, end.at(rows), signed[rows], metric.at(rows), rows))
            change = (metric.kinetic(end.r) - end.value - energy).nan_to_num(nan=math.inf)
            leaf_weight = torch.where(inside, -change, -math.inf)
            accepted = accepted + torch.where(inside, (-change).clamp(max=0).exp(), 0.0)
            leaves = leaves + inside
            outside = inside & (change > _DIVERGENCE)
            grown = torch.logaddexp(sub_weight, leaf_weight)
            chosen = inside & (uniform().log() < leaf_weight - grown)
            sub, sub_weight = end.where(chosen, sub), grown
            sub_momenta = sub_momenta + torch.where(inside.unsqueeze(-1), end.r, 0.0)
            turned = _turned(metric, marks, leaf, end.r, sub_momenta)
            diverging = diverging | outside
            inside = inside & ~outside & ~turned
        complete = inside
        chosen = complete & (uniform().log() < sub_weight - weight)
        proposal = sub.where(chosen, proposal)
        right, left = end.where(complete & forward, right), end.where(complete & ~forward, left)
        momenta = torch.where(complete.unsqueeze(-1), momenta + sub_momenta, momenta)
        weight = torch.where(complete, torch.logaddexp(weight, sub_weight), weight)
        depth = depth + growing
        growing = complete & ~metric.turning(left.r, right.r, momenta)
    row = {
        "acceptance_rate": accepted / leaves,
        "diverging": diverging,
        "energy": energy,
        "lp": proposal.value,
        "n_steps": leaves,
        "tree_depth": depth,
    }
    return proposal, row


def leapfrog(
    value_and_gradient: ValueAndGradient, point: Point, step_size: Tensor, metric: Metric, rows: Tensor
) -> Point:
    """One leapfrog step.

    Args:
        value_and_gradient: see :func:`grow_trajectory`.
        point: points of K chains.
        step_size: step size of each, negative for a step back in time, ``(K,)``.
        metric: inverse mass matrices of the K chains.
        rows: numbers of the K chains.
    """
    half = 0.5 * step_size.unsqueeze(-1)
    r = point.r + half * point.gradient
    z = point.z + step_size.unsqueeze(-1) * metric.velocity(r)
    value, gradient = value_and_gradient(z, rows)
    return Point(z, r + half * gradient, value, gradient)


def _turned(metric: Metric, marks: dict[int, tuple[Tensor, Tensor]], leaf: int, r: Tensor, total: Tensor) -> Tensor:
    """True if one of the subtrees that a leaf completes turns back.

    A leaf with an even number begins subtrees: its momentum and the sum of momenta up to it are noted, one note for
    each 1 among the bits of its number but the last. A leaf with an odd number completes as many subtrees as its number
    has trailing ones, which began at the last so many notes.
    """
    turned = torch.zeros(len(r), dtype=torch.bool, device=r.device)
    last = (leaf >> 1).bit_count()
    if leaf % 2 == 0:
        marks[last] = (r, total)
        return turned
    trailing = (~leaf & (leaf + 1)).bit_length() - 1
    for mark in range(last, last - trailing, -1):
        begin, before = marks[mark]
        turned |= metric.turning(begin, r, total - before + begin)
    return turned


def _where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(chosen if a.dim() == 1 else chosen.unsqueeze(-1), a, b)
