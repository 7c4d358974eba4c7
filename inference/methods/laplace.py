"""The Laplace approximation: a normal law at the mode in unconstrained space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from probattn.errors import InputError, require_at_least
from probattn.inference.methods.draws import Draws, approximation, feasible_start
from probattn.inference.methods.log_density import LogDensity

__all__ = ["LaplaceConfig", "fit_laplace", "maximise"]


@dataclass(frozen=True)
class LaplaceConfig:
    """Options of the Laplace approximation.

    Attributes:
        draws: number of draws.
        steps: largest number of steps of the search for the mode.
        correct: resample the draws by importance weights where these can be trusted.
        seed: random seed of the start and of the draws.
    """

    draws: int = 2000
    steps: int = 200
    correct: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, smallest in (("draws", 4), ("steps", 1)):
            require_at_least(name, getattr(self, name), smallest)


_FLAT = 1e-7
_POLISH = 3


def maximise(target: LogDensity, start: Tensor, *, steps: int = 200, tolerance: float = 1e-8) -> Tensor:
    """The mode in unconstrained space from one start, (D,): L-BFGS with a strong Wolfe search, then Newton's steps.

    The search compares values, which at a maximum agree to rounding over a distance of sqrt(epsilon); Newton's steps
    compare gradients and go on from there.

    Args:
        target: the posterior.
        start: (D,), feasible.
        steps: iterations at most.
        tolerance: largest entry of the gradient, relative to the number of observations.

    Raises:
        InputError: the search leaves the region where the density is finite, or does not end.
    """
    z = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [z], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=0.0
    )

    def objective() -> Tensor:
        value, gradient = target.value_and_gradient(z.detach().unsqueeze(0))
        z.grad = -gradient[0]
        return -value[0]

    optimizer.step(objective)
    mode, gradient = _polish(target, z.detach())
    size = float(target.data[0].numel())
    if not float(gradient.abs().max()) <= max(tolerance * size, 1e-5):
        raise InputError(
            f"no mode found from this start: the gradient is still {float(gradient.abs().max()):.3g} after {steps} "
            "steps; the posterior may run away (give it a tighter prior) or fold (see regime)."
        )
    return mode


def _polish(target: LogDensity, mode: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's steps in the directions that are curved, as long as they make the gradient smaller; it comes too."""
    gradient = target.value_and_gradient(mode.unsqueeze(0))[1][0]
    for _ in range(_POLISH):
        hessian = target.hessian(mode.unsqueeze(0))[0]
        if not bool(torch.isfinite(hessian).all()):
            break
        values, vectors = torch.linalg.eigh(-hessian)
        curved = values > _FLAT * values.max()
        trial = mode + vectors[:, curved] @ ((vectors[:, curved].mT @ gradient) / values[curved])
        after = target.value_and_gradient(trial.unsqueeze(0))[1][0]
        if not float(after.norm()) < float(gradient.norm()):
            break
        mode, gradient = trial, after
    return mode, gradient


def fit_laplace(target: LogDensity, config: LaplaceConfig, *, start: Tensor | None = None) -> Draws:
    r"""Draws from N(z*, -H^{-1}) with H the Hessian of the log-density at its mode z*, one chain.

    Directions in which the density does not change at all (rotations that W_Q and W_K share) get no spread: what is
    identified does not depend on them. Their number is in the notes, and there are then no weights to correct by.

    Args:
        target: the posterior.
        config: options, see :class:`LaplaceConfig`.
        start: where to begin, (D,); None finds a feasible point.

    Raises:
        InputError: no mode, or a Hessian with a direction of growth (a saddle).
    """
    if start is None:
        start = feasible_start(target, 1, config.seed)[0]
    mode = maximise(target, start, steps=config.steps)
    values, vectors = torch.linalg.eigh(-target.hessian(mode.unsqueeze(0))[0])
    largest = float(values.max())
    if float(values.min()) < -_FLAT * largest:
        raise InputError(
            f"the point found is a saddle (curvature {float(values.min()):.3g} beside {largest:.3g}); start elsewhere "
            "with another --seed, or use --method nuts."
        )
    curved = values > _FLAT * largest
    flat = int((~curved).sum())
    root = vectors[:, curved] / values[curved].sqrt()  # (D, curved)
    if not flat:
        law = MultivariateNormal(mode, scale_tril=torch.linalg.cholesky(root @ root.mT))
        return approximation(
            target,
            "laplace",
            law,
            draws=config.draws,
            seed=config.seed,
            correct=config.correct,
            notes={"flat_directions": 0},
        )
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(config.draws, int(curved.sum()), generator=generator, dtype=torch.float64).to(mode)
    z = mode + noise @ root.mT
    return Draws("laplace", z.unsqueeze(0), {"lp": target.evaluate(z)["lp"].unsqueeze(0)}, {"flat_directions": flat})
