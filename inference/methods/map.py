r"""MAP by Pyro's AutoDelta and Trace_ELBO, optimised with torch, resumable bit for bit.

AutoDelta puts a point mass on every latent site, so that the ELBO is the log-joint and its maximum the posterior mode
*in the constrained space of the sites*. The plate scales a minibatch to the whole data set; the objective is reported
per observed token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_value
from torch import Tensor, nn

from probattn.errors import InputError, require_at_least, require_positive
from probattn.inference.methods.minibatch import minibatch
from probattn.inference.runtime.checkpoint import identify, load_checkpoint
from probattn.inference.runtime.distributed import my_shards, rank, shard, sum_over_processes
from probattn.inference.runtime.files import write_atomically
from probattn.inference.runtime.interrupt import deferred_interrupt
from probattn.inference.runtime.isolation import isolated, require_local_parameters

__all__ = ["MapConfig", "MapResult", "fit_map"]

Metrics = dict[str, float]


@dataclass(frozen=True)
class MapConfig:
    """How to optimise.

    Attributes:
        steps: at most so many optimiser steps; the learning rate falls to zero over them by a cosine.
        batch: sequences in a minibatch.
        learning_rate: of Adam, at its highest.
        clip: largest norm of the gradient of the objective per token.
        evaluate_every: steps between two evaluations.
        patience: stop after so many evaluations in a row without improvement of the mean objective; 0 never stops
            early.
        tolerance: relative improvement that counts.
        checkpoint_every: steps between two checkpoints.
        shards: parts of a minibatch that processes share; the result does not depend on how many processes there are.
        seed: of the order of the minibatches and of Pyro's draws.
    """

    steps: int = 1000
    batch: int = 32
    learning_rate: float = 3e-3
    clip: float = 1.0
    evaluate_every: int = 50
    patience: int = 5
    tolerance: float = 1e-3
    checkpoint_every: int = 50
    shards: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every", "checkpoint_every", "shards"):
            require_at_least(name, getattr(self, name))
        for name in ("learning_rate", "clip"):
            require_positive(name, getattr(self, name))


@dataclass(frozen=True)
class MapResult:
    """A posterior mode.

    Attributes:
        values: every latent site at the mode, detached.
        history: by name, one number an evaluation: ``step``, ``objective`` (minus log-joint per token), and what
            ``evaluate`` gave.
        steps: optimiser steps taken.
        stopped: "converged" (early stop) or "steps".
    """

    values: dict[str, Tensor]
    history: dict[str, list[float]]
    steps: int
    stopped: str


def fit_map(
    model: nn.Module,
    data: tuple[Tensor, ...],
    config: MapConfig,
    *,
    initial_values: Mapping[str, Tensor],
    evaluate: Callable[[dict[str, Tensor]], Metrics] | None = None,
    identity: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    report: Callable[[int, Metrics], None] | None = None,
) -> MapResult:
    """Maximise the log-joint of a model over all its latent sites.

    Args:
        model: a Pyro module called as ``model(*minibatch, total=N)``, with a plate that scales the minibatch to N. Its
            parameters must be module-local (construct it under ``pyro.settings.context(module_local_params=True)``; the
            models of this package are).
        data: tensors whose first axis is the N sequences, on the device of the model; tokens are counted on the last
            one's second.
        config: how to optimise.
        initial_values: a start for each site.
        evaluate: metrics at the current values, recorded beside the objective.
        identity: names and values that tell this fit from others; a checkpoint with other ones is refused.
        checkpoint: where to keep the state; None keeps none.
        resume: continue from the checkpoint if it is there.
        report: called after each evaluation with the step and the metrics.

    Returns:
        :class:`MapResult`. With a checkpoint, an interrupted and resumed run ends with the same bits as an unbroken one
        on the same machine and thread count.

    Raises:
        InputError: no data, a checkpoint of another model or one that cannot be read.
        ArithmeticError: the objective is not finite (with the step).
        KeyboardInterrupt: after Ctrl-C, once the state has been saved.
    """
    require_local_parameters(model)
    if not data or len(data[0]) == 0:
        raise InputError("there are no sequences to fit; give at least one.")
    total, tokens = len(data[0]), data[-1].shape[0] * data[-1].shape[1]
    size = min(config.batch, total)
    shards = min(config.shards, size)
    my_shards(shards)  # refuses a number of processes that cannot share them
    described = {**asdict(config), **identify(model, data), **dict(identity or {})}
    with isolated(data[0].device), deferred_interrupt() as interrupted:
        # Copies: AutoDelta makes parameters of the very tensors it is given, which the optimiser then changes in place.
        start = {name: value.detach().clone() for name, value in initial_values.items()}
        guide = AutoDelta(model, init_loc_fn=init_to_value(values=start))
        elbo = Trace_ELBO()(model, guide)
        elbo(
            *minibatch(data, size, 0, config.seed), total=total
        )  # the guide's parameters exist only after a first call
        optimizer = torch.optim.Adam(elbo.parameters(), lr=config.learning_rate)
        state = _State()
        torch.manual_seed(config.seed)
        if resume and checkpoint is not None and checkpoint.exists():
            state = _restore(checkpoint, described, elbo, optimizer)
        while not state.finished(config):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * state.step / config.steps))
            optimizer.zero_grad()
            value = _accumulate(elbo, minibatch(data, size, state.step, config.seed), total, tokens, shards)
            if not math.isfinite(value):
                raise ArithmeticError(
                    f"step {state.step}: the objective is {value}; lower the learning rate, start elsewhere, or "
                    "choose a penalty that is finite on this side of the boundary."
                )
            norm = float(nn.utils.clip_grad_norm_(elbo.parameters(), config.clip))
            if not math.isfinite(norm):
                raise ArithmeticError(
                    f"step {state.step}: the objective is {value:.6g} but its gradient has norm {norm}; start "
                    "elsewhere, or choose a penalty that is smooth there. The last checkpoint is from before this step."
                )
            optimizer.step()
            state.step += 1
            state.recent.append(value)
            last = state.step == config.steps
            if last or state.step % config.evaluate_every == 0:
                metrics = state.evaluate(config, {} if evaluate is None else evaluate(_values(guide)))
                if report is not None:
                    report(state.step, metrics)
            stop = interrupted.is_set()
            if checkpoint is not None and rank() == 0 and (last or stop or state.step % config.checkpoint_every == 0):
                _save(checkpoint, described, state, elbo, optimizer)
            if stop:
                raise KeyboardInterrupt
        values = _values(guide)
    stopped = "steps" if state.step == config.steps else "converged"
    return MapResult(values, state.history, state.step, stopped)


def _accumulate(elbo: nn.Module, batch: tuple[Tensor, ...], total: int, tokens: int, shards: int) -> float:
    """The objective of a step; its gradient is left in the parameters, summed over shards and processes."""
    value = torch.zeros((), dtype=torch.float64, device=batch[0].device)
    for number in my_shards(shards):
        part = shard(batch, number, shards)
        objective = len(part[0]) / len(batch[0]) * elbo(*part, total=total) / tokens
        objective.backward()
        value += objective.detach()
    sum_over_processes([value, *(parameter.grad for parameter in elbo.parameters() if parameter.grad is not None)])
    return float(value)


class _State:
    """What an optimisation carries besides parameters and optimiser."""

    def __init__(self) -> None:
        self.step = 0
        self.stale = 0
        self.best = math.inf
        self.recent: list[float] = []
        self.history: dict[str, list[float]] = {}

    def finished(self, config: MapConfig) -> bool:
        return self.step >= config.steps or 0 < config.patience <= self.stale

    def evaluate(self, config: MapConfig, metrics: Metrics) -> Metrics:
        objective = sum(self.recent) / len(self.recent)
        self.recent = []
        improved = objective < self.best - config.tolerance * abs(objective)
        self.stale = 0 if improved else self.stale + 1
        self.best = min(self.best, objective)
        metrics = {"objective": objective, **metrics}
        for name, number in {"step": float(self.step), **metrics}.items():
            self.history.setdefault(name, []).append(number)
        return metrics


def _values(guide: AutoDelta) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in guide.median().items()}


def _save(
    path: Path, described: Mapping[str, Any], state: _State, elbo: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    content = {
        "schema": 1,
        "identity": dict(described),
        "state": vars(state),
        "elbo": elbo.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    write_atomically(path, partial(torch.save, content))


def _restore(path: Path, described: Mapping[str, Any], elbo: nn.Module, optimizer: torch.optim.Optimizer) -> _State:
    content = load_checkpoint(path)
    saved = content["identity"]
    for name in sorted(set(saved) | set(described), key=lambda name: (name != "model", name)):
        if saved.get(name) != described.get(name):
            raise InputError(
                f"checkpoint {path}: of another fit: {name} is {saved.get(name)!r} there and {described.get(name)!r} "
                "here; use the same options, another --out, or leave --resume away."
            )
    try:
        elbo.load_state_dict(content["elbo"])
        optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"checkpoint {path}: does not fit the model ({str(error).splitlines()[0]}).") from None
    torch.set_rng_state(content["rng"].cpu())
    state = _State()
    vars(state).update(content["state"])
    return state
