r"""MAP by Pyro's AutoDelta and Trace_ELBO, optimised with torch, resumable bit for bit.

AutoDelta puts a point mass on every latent site, so that the ELBO is the log-joint and its maximum the posterior mode
*in the constrained space of the sites*,

.. math:: \hat\theta = \arg\max_\theta \log p(\theta) + \sum_n \log p(u^{(n)} | \theta) .

The plate scales a minibatch to the whole data set; the objective, minus the log-joint, is reported per observed token.
Sources: Kingma and Ba (2015, arXiv 1412.6980) for Adam, Loshchilov and Hutter (2017, arXiv 1608.03983) for the cosine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_value
from torch import Tensor, nn

from probattn.inference.methods.draws import Draws, Info
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.minibatch import minibatch, sharded_gradient
from probattn.inference.methods.starts import feasible_start
from probattn.inference.runtime.checkpoint import identify, iterate
from probattn.inference.runtime.isolation import isolated
from probattn.inference.runtime.progress import log_step
from probattn.inference.runtime.seeds import derived_seed
from probattn.models.options import Range, Seed, check_options

__all__ = ["Evaluate", "MapConfig", "MapState", "finish", "fit_map", "init", "update"]

Evaluate = Callable[[dict[str, Tensor]], dict[str, float]]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MapConfig:
    """Options of MAP.

    Attributes:
        steps: largest number of optimiser steps, over which a cosine takes the learning rate to zero.
        batch: number of sequences in a minibatch; 0 takes all.
        learning_rate: learning rate of Adam at its highest.
        clip: largest norm of the gradient of the objective per token.
        evaluate_every: number of steps between two evaluations.
        patience: number of evaluations in a row without improvement that end the fit; 0 never ends it early.
        tolerance: relative improvement of the mean objective that counts.
        checkpoint_every: number of steps between two checkpoints.
        shards: number of parts of a minibatch; processes share them, and the result does not depend on how many
            processes there are.
        seed: random seed.
    """

    steps: Annotated[int, Range(least=1)] = 5000
    batch: Annotated[int, Range(least=0)] = 0
    learning_rate: Annotated[float, Range(above=0)] = 0.03
    clip: Annotated[float, Range(above=0)] = 1.0
    evaluate_every: Annotated[int, Range(least=1)] = 50
    patience: Annotated[int, Range(least=0)] = 10
    tolerance: Annotated[float, Range(least=0)] = 1e-6
    checkpoint_every: Annotated[int, Range(least=1)] = 50
    shards: Annotated[int, Range(least=1)] = 2
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class MapState:
    """State of an optimisation.

    Attributes:
        elbo: model and guide as one module.
        guide: point mass on every latent site.
        optimizer: Adam on the guide's parameters.
        step: number of steps taken.
        stale: number of evaluations since the last improvement.
        best: smallest mean objective of the evaluations.
        recent: objectives since the last evaluation.
        history: numbers of each evaluation, by name.
    """

    elbo: nn.Module
    guide: AutoDelta
    optimizer: torch.optim.Adam
    step: int = 0
    stale: int = 0
    best: float = math.inf
    recent: list[float] = field(default_factory=list)
    history: dict[str, list[float]] = field(default_factory=dict)

    def values(self) -> dict[str, Tensor]:
        """Values of the latent sites, detached, by name."""
        with isolated():
            return {name: value.detach().clone() for name, value in self.guide.median().items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {**plain, "elbo": self.elbo.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.elbo.load_state_dict(content["elbo"])
        self.optimizer.load_state_dict(content["optimizer"])
        for name in _PLAIN:
            setattr(self, name, content[name])


_PLAIN = ("step", "stale", "best", "recent", "history")


def init(target: LogDensity, config: MapConfig, start: Tensor) -> MapState:
    """State before the first step.

    Args:
        target: log-density; its model is called as ``model(*minibatch, total=N)``, with a plate that scales the
            minibatch to N.
        config: options.
        start: point to begin at, ``(D,)``.
    """
    size = min(config.batch or target.sequences, target.sequences)
    # Copies: AutoDelta makes parameters of the very tensors it is given, which the optimiser then changes in place.
    values = {name: value.detach().clone() for name, value in target.constrain(start).items()}
    with isolated(target.data[0].device):
        guide = AutoDelta(target.model, init_loc_fn=init_to_value(values=values))
        elbo = Trace_ELBO()(target.model, guide)
        # The guide's parameters exist only after a first call.
        elbo(*minibatch(target.data, size, 0, config.seed), total=target.sequences)
    return MapState(elbo, guide, torch.optim.Adam(elbo.parameters(), lr=config.learning_rate))


def update(state: MapState, target: LogDensity, config: MapConfig, evaluate: Evaluate | None = None) -> None:
    """One step of Adam on one minibatch, and now and then an evaluation.

    Args:
        state: state, changed in place.
        target: log-density.
        config: options.
        evaluate: see :func:`fit_map`.

    Raises:
        InputError: the processes do not divide the shards.
        ArithmeticError: the objective or its gradient is not finite; the state is as before the step.
    """
    total, tokens = target.sequences, target.data[-1].shape[0] * target.data[-1].shape[1]
    size = min(config.batch or total, total)
    parameters = list(state.elbo.parameters())

    def backward(part: tuple[Tensor, ...]) -> Tensor:
        objective: Tensor = state.elbo(*part, total=total) / tokens
        objective.backward()
        return objective.detach()

    batch = minibatch(target.data, size, state.step, config.seed)
    seed = derived_seed(config.seed, state.step)
    with isolated(target.data[0].device):
        objective = sharded_gradient(backward, parameters, batch, min(config.shards, size), seed)
    if not math.isfinite(objective):
        raise ArithmeticError(
            f"step {state.step}: the objective is {objective}; lower the learning rate, start elsewhere, or "
            "choose a penalty that is finite on this side of the boundary."
        )
    norm = float(nn.utils.clip_grad_norm_(parameters, config.clip))
    if not math.isfinite(norm):
        raise ArithmeticError(
            f"step {state.step}: the objective is {objective:.6g} but its gradient has norm {norm}; start "
            "elsewhere, or choose a penalty that is smooth there. The last checkpoint is from before this step."
        )
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * state.step / config.steps))
    state.optimizer.step()
    state.step += 1
    state.recent.append(objective)
    if state.step == config.steps or state.step % config.evaluate_every == 0:
        _evaluate(state, config, {} if evaluate is None else evaluate(state.values()))


def finish(state: MapState, target: LogDensity, config: MapConfig) -> Draws:
    """The mode as one chain of one draw.

    Args:
        state: state after the last step.
        target: log-density.
        config: options.
    """
    info: Info = {"steps": state.step, "stopped": "steps" if state.step == config.steps else "converged"}
    return Draws("map", target.unconstrain(state.values())[None, None], info=info, history=state.history)


def fit_map(
    target: LogDensity,
    config: MapConfig,
    *,
    start: Tensor | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
) -> Draws:
    """Maximise the log-joint of a model over all its latent sites.

    Args:
        target: log-density, whose model is called as ``model(*minibatch, total=N)`` and scales a minibatch to N.
        config: options.
        start: point to begin at, ``(D,)``; None finds a feasible one.
        checkpoint: file for the state; None keeps none.
        resume: continue from the checkpoint if it exists. A run that was interrupted and resumed ends with the bits of
            an unbroken one, on the same machine and thread count.
        identity: names and values that tell this fit from others, beside model, data and options.
        evaluate: metrics of the values of the sites, recorded beside the objective.

    Returns:
        One chain of one draw. The info has ``steps`` and ``stopped`` ("converged" or "steps"), the history ``step``,
        ``objective`` (minus the log-joint per token, mean over the steps since the last evaluation) and the metrics.

    Raises:
        InputError: a checkpoint of another fit or one that cannot be read, processes that do not divide the shards.
        ArithmeticError: the objective or its gradient is not finite, with the step.
        KeyboardInterrupt: after Ctrl-C, once the state has been saved.

    Example:
        >>> from probattn.models import ScalarModel
        >>> target = LogDensity(ScalarModel(4), torch.ones(3, 4, 1).double())
        >>> fit_map(target, MapConfig(steps=5)).z.shape
        torch.Size([1, 1, 2])
    """
    if start is None:
        start = feasible_start(target, 1, config.seed)[0]
    state = init(target, config, start)
    iterate(
        state,
        partial(update, target=target, config=config, evaluate=evaluate),
        lambda state: state.step >= config.steps or 0 < config.patience <= state.stale,
        save_every=config.checkpoint_every,
        checkpoint=checkpoint,
        resume=resume,
        identity={"method": "map", **asdict(config), **identify(target.model, target.data), **(identity or {})},
    )
    return finish(state, target, config)


def _evaluate(state: MapState, config: MapConfig, metrics: dict[str, float]) -> None:
    objective = sum(state.recent) / len(state.recent)
    state.recent = []
    improved = objective < state.best - config.tolerance * abs(objective)
    state.stale = 0 if improved else state.stale + 1
    state.best = min(state.best, objective)
    metrics = {"objective": objective, **metrics}
    for name, number in {"step": float(state.step), **metrics}.items():
        state.history.setdefault(name, []).append(number)
    log_step(_log, f"map step {state.step}: objective {objective:.6f}", state.step, config.steps, metrics)
