"""Stochastic variational inference with Pyro's own guides and objectives, stopped by a rule, not by a step count."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

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

from probattn.errors import InputError, require_at_least, require_choice, require_positive
from probattn.inference.methods.draws import Draws, approximation, feasible_start
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.minibatch import minibatch
from probattn.inference.runtime.checkpoint import load_checkpoint
from probattn.inference.runtime.distributed import my_shards, rank, shard, sum_over_processes
from probattn.inference.runtime.files import write_atomically
from probattn.inference.runtime.isolation import isolated

__all__ = ["Guide", "SviConfig", "fit_svi"]

Guide = Literal["mean_field", "low_rank", "full_rank", "flow"]


@dataclass(frozen=True)
class SviConfig:
    """How to fit the guide.

    Attributes:
        guide: normal in unconstrained space with a diagonal, a low-rank or a full covariance, or an inverse
            autoregressive flow.
        particles: draws of the guide in a shard's gradient.
        renyi: alpha of the Renyi bound; None for the ELBO.
        shards: parts of a minibatch, each with its own draws. Processes share them, and the result does not depend on
            how many processes there are.
        batch: sequences in a minibatch; 0 takes all.
        learning_rate: of Adam, at first.
        window: steps whose mean objective is compared with the best so far.
        stages: learning rates, each a third of the last. A stage ends when a window's mean is not better than the best
            by more than two standard errors of the difference; the fit has converged when the last stage ends.
        steps: at most so many.
        draws: of the fitted guide.
        seed: of start, minibatches and draws.
        correct: resample by importance weights, see :func:`~probattn.inference.methods.draws.approximation`.
    """

    guide: Guide = "full_rank"
    particles: int = 8
    renyi: float | None = None
    shards: int = 2
    batch: int = 0
    learning_rate: float = 0.05
    window: int = 100
    stages: int = 4
    steps: int = 20_000
    draws: int = 2000
    seed: int = 0
    correct: bool = True

    def __post_init__(self) -> None:
        require_choice("guide", self.guide, get_args(Guide))
        least = {"particles": 1, "shards": 1, "batch": 0, "window": 2, "stages": 1, "steps": 1, "draws": 4}
        for name, smallest in least.items():
            require_at_least(name, getattr(self, name), smallest)
        require_positive("learning_rate", self.learning_rate)
        if self.renyi is not None and (self.renyi == 1 or not math.isfinite(self.renyi) or self.particles < 2):
            raise InputError(
                f"renyi is {self.renyi} with {self.particles} particles; alpha must be finite and not 1 (that is the "
                "ELBO: leave it away), and at least two particles are needed."
            )


@dataclass
class _Progress:
    """What a fit carries besides the guide and the optimiser."""

    step: int = 0
    stage: int = 0
    best: float = math.inf
    best_error: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[float] = field(default_factory=list)

    def end_window(self) -> bool:
        """Take in a full window; whether the stage is over."""
        count = len(self.losses)
        mean = sum(self.losses) / count
        error = math.sqrt(sum((loss - mean) ** 2 for loss in self.losses) / max(1, count - 1) / count)
        self.history.append(mean)
        self.losses = []
        improved = mean < self.best - 2 * math.hypot(error, self.best_error)
        if improved or not math.isfinite(self.best):
            self.best, self.best_error = mean, error
            return False
        return True


def fit_svi(
    target: LogDensity,
    config: SviConfig,
    *,
    start: Tensor | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    identity: str = "",
    report: Callable[[int, float], None] | None = None,
) -> Draws:
    """Fit a guide to a posterior and draw from it.

    Args:
        target: the posterior; its model takes ``total=N`` for the size of the whole data set.
        config: how to fit.
        start: centre of a normal guide to begin with, (D,); None finds a feasible point.
        checkpoint: where the state is kept after each window.
        resume: go on from there.
        identity: tells this fit from others.
        report: called after each window with the step and the mean objective.

    Returns:
        Draws, one chain; the notes say whether the rule or the step limit ended
        the fit. The guide is the mean of its parameters over the last window.

    Raises:
        InputError: a flow in one dimension, processes that do not divide the shards, a checkpoint of another fit.
        ArithmeticError: the objective is not finite (with the step).
    """
    if config.guide == "flow" and target.dim < 2:
        raise InputError("a flow needs at least two parameters; use --guide full_rank.")
    total = target.data[0].shape[-3] if target.data[0].dim() > 2 else len(target.data[0])
    size = min(config.batch or total, total)
    shards = min(config.shards, size)
    own = my_shards(shards)
    described = f"{identity} {sorted(asdict(config).items())}"
    if start is None:
        start = feasible_start(target, 1, config.seed)[0]
    with isolated(start.device, seed=config.seed):
        guide = _make_guide(target, config, start)
        example = shard(minibatch(target.data, size, 0, config.seed), 0, shards)
        guide(*example, total=total)  # its parameters exist only after a first call,
        guide.to(start)  # and a flow's are single precision
        parameters = list(guide.parameters())
        optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, 0.99))
        elbo = _make_elbo(config)
        progress = _Progress()
        averages = [torch.zeros_like(parameter) for parameter in parameters]
        if resume and checkpoint is not None and checkpoint.exists():
            progress, averages = _restore(checkpoint, described, guide, optimizer)
        while progress.step < config.steps and progress.stage < config.stages:
            batch = minibatch(target.data, size, progress.step, config.seed)
            loss = torch.zeros((), dtype=start.dtype, device=start.device)
            gradients = [torch.zeros_like(parameter) for parameter in parameters]
            for number in own:
                part = shard(batch, number, shards)
                share = len(part[0]) / size
                optimizer.zero_grad()
                torch.manual_seed((config.seed * 1_000_003 + progress.step) * 4099 + number)
                loss += share * elbo.loss_and_grads(target.model, guide, *part, total=total)
                for gradient, parameter in zip(gradients, parameters, strict=True):
                    if parameter.grad is not None:
                        gradient += share * parameter.grad
            sum_over_processes([loss, *gradients])
            if not bool(torch.isfinite(loss)) or not all(bool(torch.isfinite(g).all()) for g in gradients):
                raise ArithmeticError(
                    f"step {progress.step}: the objective is {float(loss)} or its gradient not finite; lower "
                    "learning_rate, or use a tighter prior: the guide reaches where the density is 0."
                )
            for gradient, parameter in zip(gradients, parameters, strict=True):
                parameter.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * 3.0**-progress.stage
            optimizer.step()
            progress.step += 1
            progress.losses.append(float(loss))
            count = len(progress.losses)
            for average, parameter in zip(averages, parameters, strict=True):
                average += (parameter.detach() - average) / count
            if count == config.window:
                progress.stage += progress.end_window()
                if checkpoint is not None and rank() == 0:
                    _save(checkpoint, described, progress, averages, guide, optimizer)
                if report is not None:
                    report(progress.step, progress.history[-1])
        with torch.no_grad():
            for average, parameter in zip(averages, parameters, strict=True):
                parameter.copy_(average)
            law = guide.get_posterior()
        notes: dict[str, str | int | float] = {
            "guide": config.guide,
            "objective": "elbo" if config.renyi is None else f"renyi {config.renyi:g}",
            "steps": progress.step,
            "stopped": "converged" if progress.stage >= config.stages else "steps",
            "loss": progress.history[-1] if progress.history else math.nan,
        }
        return approximation(
            target,
            "svi",
            law,
            draws=config.draws,
            seed=config.seed,
            correct=config.correct,
            notes=notes,
            tails=config.guide
            != "flow",  # Pyro's flow gives its density at its own draws, elsewhere in single precision
        )


def _make_guide(target: LogDensity, config: SviConfig, start: Tensor) -> AutoContinuous:
    at_start: dict[str, Any] = {"init_loc_fn": init_to_value(values=target.constrain(start)), "init_scale": 0.05}
    kinds: dict[str, Callable[..., AutoContinuous]] = {
        "mean_field": partial(AutoDiagonalNormal, **at_start),
        "low_rank": partial(AutoLowRankMultivariateNormal, rank=max(1, round(target.dim**0.5)), **at_start),
        "full_rank": partial(AutoMultivariateNormal, **at_start),
        "flow": partial(AutoIAFNormal, num_transforms=2),  # its base is the standard normal, wherever one starts
    }
    return kinds[config.guide](target.model)


def _make_elbo(config: SviConfig) -> Any:
    options: dict[str, Any] = {
        "num_particles": config.particles,
        "max_plate_nesting": 1,
        "vectorize_particles": config.particles > 1,
    }
    return Trace_ELBO(**options) if config.renyi is None else RenyiELBO(alpha=config.renyi, **options)


def _save(
    path: Path,
    described: str,
    progress: _Progress,
    averages: list[Tensor],
    guide: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    content = {
        "schema": 1,
        "identity": described,
        "progress": asdict(progress),
        "averages": averages,
        "guide": guide.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write_atomically(path, partial(torch.save, content))


def _restore(
    path: Path, described: str, guide: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[_Progress, list[Tensor]]:
    content = load_checkpoint(path, described)
    guide.load_state_dict(content["guide"])
    optimizer.load_state_dict(content["optimizer"])
    return _Progress(**content["progress"]), content["averages"]
