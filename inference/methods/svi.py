r"""Stochastic variational inference with Pyro's own guides and objectives, stopped by a rule, not by a step count.

A guide q is fitted to the posterior by stochastic gradients of the evidence lower bound, or of a Renyi bound,

.. math:: \mathrm{ELBO}(q) = \mathbb E_q[\log p(\theta, u) - \log q(\theta)] ,

and its parameters are averaged over the last window of steps. Sources: Kucukelbir et al. (2017, arXiv 1603.00788) for
the guides, Li and Turner (2016, arXiv 1602.02311) for the Renyi bound, Polyak and Juditsky (1992,
doi:10.1137/0330046) for the average; the rule that ends a stage is derived here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    init_to_value,
)
from torch import Tensor

from probattn.errors import InputError
from probattn.inference.methods.cost import FEWER, require_memory
from probattn.inference.methods.draws import Draws, Info
from probattn.inference.methods.importance import draw_corrected
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.minibatch import minibatch, sharded_gradient
from probattn.inference.methods.starts import feasible_start
from probattn.inference.runtime.checkpoint import identify, iterate
from probattn.inference.runtime.distributed import shard
from probattn.inference.runtime.isolation import isolated
from probattn.inference.runtime.progress import log_step
from probattn.inference.runtime.seeds import derived_seed
from probattn.models.options import Range, Seed, check_options

__all__ = ["Guide", "SviConfig", "SviState", "bytes_of_guide", "finish", "fit_svi", "init", "update"]

Guide = Literal["mean_field", "low_rank", "full_rank", "flow"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SviConfig:
    """Options of SVI.

    Attributes:
        guide: guide in unconstrained space: a normal distribution with diagonal, low-rank or full covariance, or an
            inverse autoregressive flow.
        particles: number of draws of the guide in the gradient of a shard.
        renyi: alpha of the Renyi bound; without it, the ELBO.
        shards: number of parts of a minibatch, each with its own draws; processes share them, and the result does not
            depend on how many processes there are.
        batch: number of sequences in a minibatch; 0 takes all.
        learning_rate: learning rate of Adam in the first stage.
        window: number of steps whose mean objective is compared with the best so far.
        stages: number of learning rates, each a third of the last; a stage ends when a window is not better than the
            best by two standard errors, and the fit has converged when the last stage ends.
        steps: largest number of steps.
        draws: number of draws of the fitted guide.
        correct: resample the draws by importance weights where these can be trusted.
        seed: random seed.
    """

    guide: Guide = "full_rank"
    particles: Annotated[int, Range(least=1)] = 8
    renyi: Annotated[float | None, Range()] = None
    shards: Annotated[int, Range(least=1)] = 2
    batch: Annotated[int, Range(least=0)] = 0
    learning_rate: Annotated[float, Range(above=0)] = 0.05
    window: Annotated[int, Range(least=2)] = 100
    stages: Annotated[int, Range(least=1)] = 4
    steps: Annotated[int, Range(least=1)] = 20_000
    draws: Annotated[int, Range(least=4)] = 2000
    correct: bool = True
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_options(self)
        if self.renyi is not None and (self.renyi == 1 or self.particles < 2):
            raise InputError(
                f"renyi is {self.renyi} with {self.particles} particles; alpha must not be 1 (that is the ELBO: omit "
                "it), and at least two particles are needed."
            )


@dataclass
class SviState:
    """State of a fit.

    Attributes:
        guide: distribution q that is fitted.
        optimizer: Adam on its parameters.
        averages: mean of each parameter over the steps of the window.
        step: number of steps taken.
        stage: number of learning rates that are done with.
        best: smallest mean objective of a window.
        best_error: its standard error.
        recent: objectives since the last window ended.
        history: numbers of each window, by name.
    """

    guide: AutoContinuous
    optimizer: torch.optim.Adam
    averages: list[Tensor]
    step: int = 0
    stage: int = 0
    best: float = math.inf
    best_error: float = 0.0
    recent: list[float] = field(default_factory=list)
    history: dict[str, list[float]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {**plain, "guide": self.guide.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.guide.load_state_dict(content["guide"])
        self.optimizer.load_state_dict(content["optimizer"])
        for name in _PLAIN:
            setattr(self, name, content[name])


_PLAIN = ("averages", "step", "stage", "best", "best_error", "recent", "history")


def init(target: LogDensity, config: SviConfig, start: Tensor) -> SviState:
    """State before the first step.

    Args:
        target: log-density; its model is called as ``model(*minibatch, total=N)``, with a plate that scales the
            minibatch to N.
        config: options.
        start: centre of a normal guide, ``(D,)``.

    Raises:
        InputError: a flow in one dimension, or a guide that needs more memory than is free.
    """
    if config.guide == "flow" and target.dim < 2:
        raise InputError("a flow needs at least two parameters; use --guide full_rank.")
    _require_memory(target, config)
    size, shards = _sizes(target, config)
    with isolated(start.device, seed=config.seed):
        guide = _build_guide(target, config, start)
        # The parameters exist only after a first call, and a flow's are single precision.
        guide(*shard(minibatch(target.data, size, 0, config.seed), 0, shards), total=target.sequences)
        guide.to(start)
    parameters = list(guide.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, 0.99))
    return SviState(guide, optimizer, [torch.zeros_like(parameter) for parameter in parameters])


def update(state: SviState, target: LogDensity, config: SviConfig) -> None:
    """One step of Adam on one minibatch; at the end of a window the rule decides on the learning rate.

    Args:
        state: state, changed in place.
        target: log-density.
        config: options.

    Raises:
        InputError: the processes do not divide the shards.
        ArithmeticError: the objective or its gradient is not finite; the state is as before the step.
    """
    size, shards = _sizes(target, config)
    parameters = list(state.guide.parameters())
    bound = _build_bound(config)

    def backward(part: tuple[Tensor, ...]) -> float:
        return float(bound.loss_and_grads(target.model, state.guide, *part, total=target.sequences))

    batch = minibatch(target.data, size, state.step, config.seed)
    with isolated(target.data[0].device):
        objective = sharded_gradient(backward, parameters, batch, shards, derived_seed(config.seed, state.step))
    finite = all(bool(torch.isfinite(parameter.grad).all()) for parameter in parameters if parameter.grad is not None)
    if not math.isfinite(objective) or not finite:
        raise ArithmeticError(
            f"step {state.step}: the objective is {objective} or its gradient not finite; lower "
            "learning_rate, or use a tighter prior: the guide reaches where the density is 0."
        )
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * 3.0**-state.stage
    state.optimizer.step()
    state.step += 1
    state.recent.append(objective)
    for average, parameter in zip(state.averages, parameters, strict=True):
        average += (parameter.detach() - average) / len(state.recent)
    if len(state.recent) == config.window:
        _end_window(state, config)


def finish(state: SviState, target: LogDensity, config: SviConfig) -> Draws:
    """Draws of the guide with its parameters averaged over the last window.

    Args:
        state: state after the last step.
        target: log-density.
        config: options.
    """
    with isolated(), torch.no_grad():
        for average, parameter in zip(state.averages, state.guide.parameters(), strict=True):
            parameter.copy_(average)
        guide = state.guide.get_posterior()
    info: Info = {
        "guide": config.guide,
        "bound": "elbo" if config.renyi is None else f"renyi {config.renyi:g}",
        "steps": state.step,
        "stopped": "converged" if state.stage >= config.stages else "steps",
    }
    drawn = draw_corrected(
        target,
        "svi",
        guide,
        draws=config.draws,
        seed=config.seed,
        correct=config.correct,
        info=info,
        tails=config.guide != "flow",  # Pyro's flow gives its density at its own draws, elsewhere in single precision
    )
    return replace(drawn, history=state.history)


def fit_svi(
    target: LogDensity,
    config: SviConfig,
    *,
    start: Tensor | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
) -> Draws:
    """Fit a guide to a posterior and draw from it.

    Args:
        target: log-density, whose model is called as ``model(*minibatch, total=N)`` and scales a minibatch to N.
        config: options.
        start: centre of a normal guide to begin with, ``(D,)``; None finds a feasible point.
        checkpoint: file for the state; None keeps none.
        resume: continue from the checkpoint if it exists. A run that was interrupted and resumed ends with the bits of
            an unbroken one, on the same machine and thread count.
        identity: names and values that tell this fit from others, beside model, data and options.

    Returns:
        One chain. The info has ``guide``, ``bound``, ``steps``, ``stopped`` ("converged", by the rule, or "steps") and
        what :func:`~probattn.inference.methods.importance.draw_corrected` adds; the history has ``step`` and
        ``objective`` (mean over a window), one number per window.

    Raises:
        InputError: a flow in one dimension, processes that do not divide the shards, a checkpoint of another fit.
        ArithmeticError: the objective or its gradient is not finite, with the step.
        KeyboardInterrupt: after Ctrl-C, once the state has been saved.

    Example:
        >>> from probattn.models import ScalarModel
        >>> target = LogDensity(ScalarModel(4), torch.ones(3, 4, 1).double())
        >>> fit_svi(target, SviConfig(steps=5, draws=8)).z.shape
        torch.Size([1, 8, 2])
    """
    if start is None:
        start = feasible_start(target, 1, config.seed)[0]
    state = init(target, config, start)
    iterate(
        state,
        partial(update, target=target, config=config),
        lambda state: state.step >= config.steps or state.stage >= config.stages,
        save_every=config.window,
        checkpoint=checkpoint,
        resume=resume,
        identity={"method": "svi", **asdict(config), **identify(target.model, target.data), **(identity or {})},
    )
    return finish(state, target, config)


def _sizes(target: LogDensity, config: SviConfig) -> tuple[int, int]:
    """Sequences in a minibatch and parts that it is cut into."""
    size = min(config.batch or target.sequences, target.sequences)
    return size, min(config.shards, size)


def bytes_of_guide(guide: Guide, dim: int, element: int = 8) -> int:
    """Memory of a guide's parameters, with gradients, averages and Adam's moments.

    Args:
        guide: name of the guide.
        dim: number D of parameters that are inferred.
        element: bytes of a number.

    Returns:
        Bytes.

    Example:
        >>> [bytes_of_guide(guide, 1000) // 2**20 for guide in ("mean_field", "full_rank", "flow")]
        [0, 53, 962]
    """
    numbers: int = {
        "mean_field": 2 * dim,
        "low_rank": (2 + max(1, round(dim**0.5))) * dim,
        "full_rank": dim * dim + 2 * dim,  # centre, scales, and a triangle that is kept as a square
        "flow": 18 * dim * dim + 16 * dim + 2,  # two networks with a hidden layer of size 3 D + 1
    }[guide]
    return 7 * numbers * element


def _require_memory(target: LogDensity, config: SviConfig) -> None:
    """Refuse a guide that does not fit."""
    smaller = FEWER if config.guide == "mean_field" else f"use --guide mean_field, or {FEWER}"
    needed = bytes_of_guide(config.guide, target.dim, target.origin.element_size())
    require_memory(target, needed, f"--guide {config.guide}", smaller)


def _end_window(state: SviState, config: SviConfig) -> None:
    """Compare a full window with the best so far; the stage ends where it is not better by two standard errors."""
    count = len(state.recent)
    mean = sum(state.recent) / count
    error = math.sqrt(sum((loss - mean) ** 2 for loss in state.recent) / (count - 1) / count)
    state.recent = []
    for name, number in (("step", float(state.step)), ("objective", mean)):
        state.history.setdefault(name, []).append(number)
    if mean < state.best - 2 * math.hypot(error, state.best_error) or not math.isfinite(state.best):
        state.best, state.best_error = mean, error
    else:
        state.stage += 1
    log_step(_log, f"svi step {state.step}: objective {mean:.4f}", state.step, config.steps, {"objective": mean})


def _build_guide(target: LogDensity, config: SviConfig, start: Tensor) -> AutoContinuous:
    at_start: dict[str, Any] = {"init_loc_fn": init_to_value(values=target.constrain(start)), "init_scale": 0.05}
    kinds: dict[str, Callable[..., AutoContinuous]] = {
        "mean_field": partial(AutoDiagonalNormal, **at_start),
        "low_rank": partial(AutoLowRankMultivariateNormal, rank=max(1, round(target.dim**0.5)), **at_start),
        "full_rank": partial(AutoMultivariateNormal, **at_start),
        "flow": partial(AutoIAFNormal, num_transforms=2),  # its base is the standard normal, wherever one starts
    }
    return kinds[config.guide](target.model)


def _build_bound(config: SviConfig) -> Any:
    options: dict[str, Any] = {
        "num_particles": config.particles,
        "max_plate_nesting": 1,
        "vectorize_particles": config.particles > 1,
    }
    return Trace_ELBO(**options) if config.renyi is None else RenyiELBO(alpha=config.renyi, **options)
