r"""Damped Newton iteration for u - mu(u) = eps: the one solver of the package, with its tolerance.

.. math:: u \leftarrow u - t\, J(u)^{-1} (u - \mu(u) - \epsilon), \qquad t \in \{1, \tfrac12, \tfrac14, \dots\},

with the largest t that reduces the residual norm by the factor 1 - t / 10000 (Armijo 1966).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.numerics import linalg
from probattn.solve.context import Context

__all__ = ["Iterate", "newton", "newton_step", "polish", "residual_tolerance"]

_ITERATIONS = 100
_HALVINGS = 30
_FEW = 8  # one in so many starts still at work: Newton goes on with these alone


class Iterate(NamedTuple):
    """End of Newton's method from each start.

    Attributes:
        u: ``(starts, *batch, p)``.
        mean: mu(u), ``(starts, *batch, p)``.
        jacobian: J(u), ``(starts, *batch, p, p)``.
        distance: residual norm, ``(starts, *batch)``.
        tolerance: residual norm at which u counts as a solution, ``(starts, *batch)``.
    """

    u: Tensor
    mean: Tensor
    jacobian: Tensor
    distance: Tensor
    tolerance: Tensor

    @property
    def solved(self) -> Tensor:
        """True where the tolerance was reached, ``(starts, *batch)``."""
        return self.distance <= self.tolerance


def newton(context: Context, noise: Tensor, starts: Tensor) -> Iterate:
    """Iterate from each start until it is within tolerance or no step helps it.

    Args:
        context: the next-token map, batch axes ``(*batch,)``.
        noise: eps, ``(*sample, *batch, p)``.
        starts: ``(starts, *sample, *batch, p)``.

    Returns:
        An :class:`Iterate`, which may not have reached the tolerance: see ``solved``.
    """
    u, mean, jacobian = _iterate(context, noise, starts, _ITERATIONS)
    distance = torch.linalg.vector_norm(u - mean - noise, dim=-1)
    return Iterate(u, mean, jacobian, distance, residual_tolerance(u, mean))


def newton_step(jacobian: Tensor, residual: Tensor) -> Tensor:
    """J^{-1} r, ``(*batch, p)``; on a fold, where the block is singular, the plain fixed-point step r."""
    step = linalg.solve(jacobian, residual.unsqueeze(-1), check=False).squeeze(-1)
    return torch.where(torch.isfinite(step).all(-1, keepdim=True), step, residual)


def residual_tolerance(u: Tensor, mean: Tensor) -> Tensor:
    """Residual norm at which a token, ``(*batch, p)``, counts as found, ``(*batch,)``: relative, 1000 epsilons."""
    size: Tensor = 1 + torch.linalg.vector_norm(u, dim=-1) + torch.linalg.vector_norm(mean, dim=-1)
    return 1e3 * torch.finfo(u.dtype).eps * size


def polish(context: Context, noise: Tensor, u: Tensor) -> Tensor:
    """One more full step, which takes the residual from tolerance to rounding; kept only where it helps.

    Args:
        context: the next-token map.
        noise: eps, ``(*batch, p)``.
        u: solutions, ``(*batch, p)``.
    """
    mean, jacobian = context.mean_and_jacobian(u)
    residual = u - mean - noise
    polished = u - newton_step(jacobian, residual)
    after = torch.linalg.vector_norm(polished - context.mean(polished) - noise, dim=-1, keepdim=True)
    return torch.where(after < torch.linalg.vector_norm(residual, dim=-1, keepdim=True), polished, u)


def _iterate(context: Context, noise: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    mean, jacobian = context.mean_and_jacobian(u)
    stuck = torch.zeros(u.shape[:-1], dtype=torch.bool, device=u.device)  # at a fold, where no step helps
    for done in range(iterations):
        residual = u - mean - noise
        norm = torch.linalg.vector_norm(residual, dim=-1)
        active = (norm > residual_tolerance(u, mean)) & ~stuck
        count = int(active.sum())
        if count == 0:
            break
        if _FEW * count <= active.numel() > 1:  # go on with these alone
            index = active.nonzero(as_tuple=True)  # starts, then batch axes
            batch = torch.broadcast_shapes(noise.shape[:-1], u.shape[1:-1])
            rest = context.select(index[1:], batch)
            found = _iterate(rest, noise.expand(*batch, -1)[index[1:]], u[index].unsqueeze(0), iterations - done)
            u, mean, jacobian = (
                whole.index_put(index, part.squeeze(0)) for whole, part in zip((u, mean, jacobian), found, strict=True)
            )
            break
        step = newton_step(jacobian, residual)
        size = torch.ones_like(norm)
        for _ in range(_HALVINGS):
            trial = torch.where(active.unsqueeze(-1), u - size.unsqueeze(-1) * step, u)
            mean, jacobian = context.mean_and_jacobian(trial)
            reached = torch.linalg.vector_norm(trial - mean - noise, dim=-1)
            worse = active & ~(reached <= (1 - 1e-4 * size) * norm)
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        else:
            stuck = stuck | worse
        u = trial
    return u, mean, jacobian
