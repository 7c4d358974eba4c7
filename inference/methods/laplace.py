r"""The Laplace approximation: a normal distribution at the mode in unconstrained space.

.. math:: q = N(z^*, (-H)^{-1}), \qquad z^* = \arg\max_z \log \pi(z), \qquad H = \nabla^2 \log \pi(z^*)

The mode is found by L-BFGS with a strong Wolfe search, then by Newton's steps: the search compares values, which at a
maximum agree to rounding over a distance of sqrt(epsilon); Newton's steps compare gradients and go on from there.
Sources: Tierney and Kadane (1986, doi:10.1080/01621459.1986.10478240); Nocedal and Wright (2006, chapter 7) for the
search.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from probattn.errors import InputError
from probattn.inference.methods.cost import FEWER, require_memory
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.importance import draw_corrected
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.starts import feasible_start
from probattn.inference.runtime.checkpoint import identify, iterate
from probattn.inference.runtime.progress import log_step
from probattn.models.options import Range, Seed, check_options

__all__ = ["LaplaceConfig", "LaplaceState", "bytes_of_hessian", "find_mode", "finish", "fit_laplace", "init", "update"]

_log = logging.getLogger(__name__)
_SEARCH = 10  # iterations of L-BFGS in one step of the state
_POLISH = 3  # Newton's steps at most
_STATIONARY = 1e-8  # largest entry of the gradient at a mode, per number in the data
_FLAT = 1e-7  # curvature, relative to the largest, below which a direction is flat


@dataclass(frozen=True)
class LaplaceConfig:
    """Options of the Laplace approximation.

    Attributes:
        draws: number of draws.
        steps: largest number of steps of the search for the mode.
        correct: resample the draws by importance weights where these can be trusted.
        seed: random seed of the start and of the draws.
    """

    draws: Annotated[int, Range(least=4)] = 2000
    steps: Annotated[int, Range(least=1)] = 200
    correct: bool = True
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class LaplaceState:
    """State of the search for the mode.

    Attributes:
        z: point reached, ``(D,)``.
        optimizer: L-BFGS on it.
        step: number of iterations asked for.
        ended: whether the search has nothing left to do.
    """

    z: Tensor
    optimizer: torch.optim.LBFGS
    step: int = 0
    ended: bool = False

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        plain = {"z": self.z.detach(), "step": self.step, "ended": self.ended}
        return {**plain, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        with torch.no_grad():
            self.z.copy_(content["z"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.ended = content["step"], content["ended"]


def init(target: LogDensity, config: LaplaceConfig, start: Tensor) -> LaplaceState:
    """State before the first step.

    Args:
        target: log-density.
        config: options.
        start: feasible point to begin at, ``(D,)``.
    """
    z = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([z], line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=0.0)
    return LaplaceState(z, optimizer)


def update(state: LaplaceState, target: LogDensity, config: LaplaceConfig) -> None:
    """Ten iterations of L-BFGS, or as many as are left.

    Args:
        state: state, changed in place.
        target: log-density.
        config: options.
    """
    before = state.z.detach().clone()
    iterations = min(_SEARCH, config.steps - state.step)
    state.optimizer.param_groups[0]["max_iter"] = iterations

    def objective() -> Tensor:
        value, gradient = target.value_and_gradient(state.z.detach().unsqueeze(0))
        state.z.grad = -gradient[0]
        return -value[0]

    state.optimizer.step(objective)
    state.step += iterations
    state.ended = torch.equal(state.z.detach(), before)
    largest = float("nan") if state.z.grad is None else float(state.z.grad.abs().max())
    metrics = {"largest_gradient": largest}
    log_step(_log, f"laplace step {state.step}: largest gradient {largest:.3g}", state.step, config.steps, metrics)


def finish(state: LaplaceState, target: LogDensity, config: LaplaceConfig) -> Draws:
    """Draws of the normal distribution at the mode.

    Args:
        state: state after the last step.
        target: log-density.
        config: options.

    Raises:
        InputError: no mode, or a Hessian with a direction of growth (a saddle).
    """
    mode, hessian = find_mode(state, target)
    values, vectors = torch.linalg.eigh(-hessian)
    largest, flat_below = float(values.max()), _flat_below(values)
    if float(values.min()) < -flat_below:
        raise InputError(
            f"the point found is a saddle (curvature {float(values.min()):.3g} beside {largest:.3g}); start elsewhere "
            "with another --seed, or use --method nuts."
        )
    curved = values > flat_below
    flat = int((~curved).sum())
    root = vectors[:, curved] / values[curved].sqrt()  # (D, curved)
    if not flat:
        guide = MultivariateNormal(mode, scale_tril=torch.linalg.cholesky(root @ root.mT))
        return draw_corrected(
            target,
            "laplace",
            guide,
            draws=config.draws,
            seed=config.seed,
            correct=config.correct,
            info={"flat_directions": 0},
        )
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(config.draws, int(curved.sum()), generator=generator, dtype=torch.float64).to(mode)
    z = mode + noise @ root.mT
    return Draws("laplace", z.unsqueeze(0), {"lp": target.evaluate(z)["lp"].unsqueeze(0)}, {"flat_directions": flat})


def bytes_of_hessian(dim: int, element: int = 8) -> int:
    """Memory of a Hessian, its vectors, and what exists in passing.

    Args:
        dim: number D of parameters that are inferred.
        element: bytes of a number.

    Returns:
        The bytes of six matrices, ``(D, D)``.

    Example:
        >>> bytes_of_hessian(1000) // 2**20
        45
    """
    return 6 * dim * dim * element


def fit_laplace(
    target: LogDensity,
    config: LaplaceConfig,
    *,
    start: Tensor | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
) -> Draws:
    """Find the mode of a posterior and draw from the normal distribution there.

    Directions in which the density does not change at all (rotations that W_Q and W_K share) get no spread: what is
    identified does not depend on them. There are then no weights to correct by.

    Args:
        target: log-density.
        config: options.
        start: feasible point to begin at, ``(D,)``; None finds one.
        checkpoint: file for the state; None keeps none.
        resume: continue from the checkpoint if it exists. A run that was interrupted and resumed ends with the bits of
            an unbroken one, on the same machine and thread count.
        identity: names and values that tell this fit from others, beside model, data and options.

    Returns:
        One chain. The info has ``flat_directions``, their number, and where it is 0 what
        :func:`~probattn.inference.methods.importance.draw_corrected` adds.

    Raises:
        InputError: more memory than is free, no mode, a Hessian with a direction of growth (a saddle), a checkpoint of
            another fit.
        KeyboardInterrupt: after Ctrl-C, once the state has been saved.

    Example:
        >>> from probattn.models import ScalarModel
        >>> target = LogDensity(ScalarModel(4), torch.ones(3, 4, 1).double())
        >>> fit_laplace(target, LaplaceConfig(draws=8)).z.shape
        torch.Size([1, 8, 2])
    """
    matrices = bytes_of_hessian(target.dim, target.origin.element_size())
    require_memory(target, matrices, "--method laplace", f"use --method svi --guide mean_field, or {FEWER}")
    if start is None:
        start = feasible_start(target, 1, config.seed)[0]
    state = init(target, config, start)
    iterate(
        state,
        partial(update, target=target, config=config),
        lambda state: state.step >= config.steps or state.ended,
        save_every=1,
        checkpoint=checkpoint,
        resume=resume,
        identity={"method": "laplace", **asdict(config), **identify(target.model, target.data), **(identity or {})},
    )
    return finish(state, target, config)


def find_mode(state: LaplaceState, target: LogDensity) -> tuple[Tensor, Tensor]:
    """The mode near the point that the search has reached, by Newton's steps in the directions that are curved.

    The steps go on as long as they make the gradient smaller.

    Args:
        state: state after the last step.
        target: log-density.

    Returns:
        The mode, ``(D,)``, and the Hessian there, ``(D, D)``.

    Raises:
        InputError: the gradient there is not zero to rounding: the search left the region where the density is finite,
            or did not end.
    """
    mode = state.z.detach().clone()
    gradient = target.value_and_gradient(mode.unsqueeze(0))[1][0]
    hessian = target.hessian(mode.unsqueeze(0))[0]
    for _ in range(_POLISH):
        if not bool(torch.isfinite(hessian).all()):
            break
        values, vectors = torch.linalg.eigh(-hessian)
        curved = values > _flat_below(values)
        trial = mode + vectors[:, curved] @ ((vectors[:, curved].mT @ gradient) / values[curved])
        after = target.value_and_gradient(trial.unsqueeze(0))[1][0]
        if not float(after.norm()) < float(gradient.norm()):
            break
        mode, gradient, hessian = trial, after, target.hessian(trial.unsqueeze(0))[0]
    largest = float(gradient.abs().max())
    rounding = max(_STATIONARY, torch.finfo(mode.dtype).eps) * target.data[0].numel()
    if not largest <= max(rounding, 1e-5):
        raise InputError(
            f"no mode found from this start: the gradient is still {largest:.3g} after {state.step} steps; "
            "the posterior may run away (give it a tighter prior) or fold (see regime)."
        )
    return mode, hessian


def _flat_below(values: Tensor) -> float:
    """Curvature below which a direction counts as flat; the differences that it comes from have rounding errors."""
    relative: float = max(_FLAT, 10 * torch.finfo(values.dtype).eps ** (2 / 3))
    return relative * float(values.max())
