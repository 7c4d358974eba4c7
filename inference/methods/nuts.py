r"""The No-U-Turn sampler, by a chain method that is chosen and recorded, never silently changed.

"vectorised" runs all chains in one tensor program, see :mod:`probattn.inference.methods.trajectory`; "sequential" and
"process" run Pyro's own sampler. Sources: Hoffman and Gelman (2014, arXiv 1111.4246); Betancourt (2017, arXiv
1701.02434); Phan, Pradhan and Jankowiak (2019, arXiv 1912.11554).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.inference.methods.adaptation import StepSize, window_covariance, window_ends
from probattn.inference.methods.cost import FEWER
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.pyro_chains import run_pyro_chains
from probattn.inference.methods.starts import curvature_guess, feasible_start
from probattn.inference.methods.trajectory import Metric, Point, transition
from probattn.inference.runtime.checkpoint import identify, iterate
from probattn.inference.runtime.progress import log_step
from probattn.models.options import Range, Seed, check_options

__all__ = ["ChainMethod", "NutsConfig", "NutsState", "bytes_per_chain", "finish", "fit_nuts", "init", "update"]

ChainMethod = Literal["vectorised", "sequential", "process"]
_log = logging.getLogger(__name__)
_EARLY_DEPTH = 5  # doublings at most while the mass matrix is still learnt: a tiny step would hold up all chains
_LINES = 20  # log records of a run


@dataclass(frozen=True)
class NutsConfig:
    """Options of NUTS.

    Attributes:
        chains: number of chains.
        chain_method: all chains in one tensor program, or Pyro's NUTS with one chain after the other or one process per
            chain (through joblib, whose backend may be a cluster's).
        warmup: number of transitions of adaptation, which are discarded.
        draws: number of draws kept per chain.
        target_accept: mean acceptance statistic that the step size aims at.
        max_depth: largest number of doublings of a trajectory.
        memory: memory that all chains together may take, in GiB.
        checkpoint_every: number of transitions between two checkpoints.
        seed: random seed.
    """

    chains: Annotated[int, Range(least=1)] = 4
    chain_method: ChainMethod = "vectorised"
    warmup: Annotated[int, Range(least=20)] = 500
    draws: Annotated[int, Range(least=4)] = 500
    target_accept: Annotated[float, Range(above=0, below=1)] = 0.8
    max_depth: Annotated[int, Range(least=1)] = 10
    memory: Annotated[float, Range(above=0)] = 8.0
    checkpoint_every: Annotated[int, Range(least=1)] = 100
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class NutsState:
    """State of C chains.

    Attributes:
        point: present points of the chains.
        step_size: step sizes of the next transition, ``(C,)``.
        metric: inverse mass matrices.
        adaptation: dual averaging that learns the step sizes.
        generator: source of everything random.
        chains_per_metric: number of neighbouring chains that learn one mass matrix together.
        step: number of transitions made, warm-up included.
        window: positions since the mass matrix was learnt last, ``(C, D)`` each.
        draws: positions kept, ``(C, D)`` each.
        statistics: statistics of the transitions that led there, ``(C,)`` each by name.
    """

    point: Point
    step_size: Tensor
    metric: Metric
    adaptation: StepSize
    generator: torch.Generator
    chains_per_metric: int
    step: int = 0
    window: list[Tensor] = field(default_factory=list)
    draws: list[Tensor] = field(default_factory=list)
    statistics: list[dict[str, Tensor]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next transition depends on."""
        stacked = {name: torch.stack(rows) for name in ("window", "draws") if (rows := getattr(self, name))}
        return {
            **stacked,
            "statistics": _stack(self.statistics),
            "step": self.step,
            "point": tuple(self.point),
            "step_size": self.step_size,
            "covariance": self.metric.covariance,
            "adaptation": self.adaptation.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.step, self.step_size = content["step"], content["step_size"]
        self.point, self.metric = Point(*content["point"]), Metric(content["covariance"])
        self.window, self.draws = list(content.get("window", ())), list(content.get("draws", ()))
        columns = content["statistics"]
        self.statistics = [{name: column[k] for name, column in columns.items()} for k in range(len(self.draws))]
        self.adaptation.load_state_dict(content["adaptation"])
        self.generator.set_state(content["generator"].cpu())


def init(
    target: LogDensity, config: NutsConfig, start: Tensor, *, covariance: Tensor, chains_per_metric: int = 1
) -> NutsState:
    """State before the first transition.

    Args:
        target: log-density; only its ``value_and_gradient`` is called.
        config: options.
        start: feasible points to begin at, one per chain, ``(C, D)``.
        covariance: first guess of the posterior's covariance, from which the mass matrices start and to which the
            windows shrink, ``(C, D, D)``.
        chains_per_metric: number of neighbouring chains, of one posterior, that learn one mass matrix together.

    Raises:
        InputError: an infeasible start (with the chain), or chains that cannot be divided so.
    """
    chains = len(start)
    if chains % chains_per_metric:
        raise InputError(f"chains_per_metric is {chains_per_metric}, which does not divide the {chains} chains.")
    value, gradient = target.value_and_gradient(start, torch.arange(chains, device=start.device))
    infeasible = ~(torch.isfinite(value) & torch.isfinite(gradient).all(-1))
    if bool(infeasible.any()):
        where = int(infeasible.nonzero()[0])
        raise InputError(
            f"chain {where} starts where the log-density is {float(value[where])}; start it at a feasible point."
        )
    step_size = torch.full_like(value, 0.25)
    return NutsState(
        Point(start.clone(), torch.zeros_like(start), value, gradient),
        step_size,
        Metric(covariance),
        StepSize(step_size, config.target_accept),
        torch.Generator(device=start.device).manual_seed(config.seed),
        chains_per_metric,
    )


def update(state: NutsState, target: LogDensity, config: NutsConfig) -> None:
    """One transition of every chain, of the warm-up or after it.

    Args:
        state: state, changed in place.
        target: log-density; only its ``value_and_gradient`` is called.
        config: options.
    """
    ends = window_ends(config.warmup)
    depth = min(_EARLY_DEPTH, config.max_depth) if state.step < ends[-1] else config.max_depth
    state.point, row = transition(
        target.value_and_gradient, state.point, state.step_size, state.metric, state.generator, depth
    )
    if state.step < config.warmup:
        _adapt(state, config, row["acceptance_rate"], ends)
    else:
        state.draws.append(state.point.z)
        state.statistics.append({**row, "step_size": state.step_size})
    state.step += 1
    total = config.warmup + config.draws
    if state.step % max(1, total // _LINES) == 0 or state.step == total:
        log_step(_log, f"nuts transition {state.step} of {total}", state.step, total)


def finish(state: NutsState, target: LogDensity, config: NutsConfig) -> Draws:
    """The positions kept, by chain.

    Args:
        state: state after the last transition.
        target: log-density.
        config: options.
    """
    statistics = {name: column.T for name, column in _stack(state.statistics).items()}
    info = {"chain_method": config.chain_method, "chains": len(state.step_size)}
    return Draws("nuts", torch.stack(state.draws, dim=1), statistics, info)


def fit_nuts(
    target: LogDensity,
    config: NutsConfig,
    *,
    start: Tensor | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
) -> Draws:
    """Sample a posterior.

    Args:
        target: log-density. Where each point has its own data there is one chain for each data set.
        config: options.
        start: feasible points to begin at, one per chain, ``(C, D)``; None finds such.
        checkpoint: file for the state, or with the number of the chain appended for each finished chain of Pyro's;
            None keeps none.
        resume: continue from the checkpoint if it exists. A run that was interrupted and resumed ends with the bits of
            an unbroken one, on the same machine and thread count.
        identity: names and values that tell this run from others, beside model, data and options.

    Returns:
        One chain for each of C. The info has ``chain_method`` and ``chains``; the statistics ``acceptance_rate``,
        ``diverging``, ``lp``, ``step_size``, and with "vectorised" also ``energy``, ``n_steps`` and ``tree_depth``,
        which Pyro does not give.

    Raises:
        InputError: more chains than the memory allows, no feasible start, a checkpoint of another run.
        KeyboardInterrupt: after Ctrl-C, once the state has been saved.

    Example:
        >>> from probattn.models import ScalarModel
        >>> target = LogDensity(ScalarModel(4), torch.ones(3, 4, 1).double())
        >>> fit_nuts(target, NutsConfig(chains=2, warmup=20, draws=5)).z.shape
        torch.Size([2, 5, 2])
    """
    _require_data_sets(target, config)
    _require_memory(target, config)
    if start is None:
        start = feasible_start(target, config.chains, config.seed)
    named = {"method": "nuts", **asdict(config), **identify(target.model, target.data), **(identity or {})}
    del named["memory"]
    if config.chain_method != "vectorised":
        z, statistics = run_pyro_chains(
            target,
            start,
            warmup=config.warmup,
            draws=config.draws,
            target_accept=config.target_accept,
            max_depth=config.max_depth,
            seed=config.seed,
            processes=config.chains if config.chain_method == "process" else 1,
            checkpoint=checkpoint,
            resume=resume,
            identity=named,
        )
        return Draws("nuts", z, statistics, {"chain_method": config.chain_method, "chains": config.chains})
    state = init(
        target,
        config,
        start,
        covariance=curvature_guess(target, start),
        chains_per_metric=1 if target.data_sets else config.chains,
    )
    iterate(
        state,
        partial(update, target=target, config=config),
        lambda state: state.step >= config.warmup + config.draws,
        save_every=config.checkpoint_every,
        checkpoint=checkpoint,
        resume=resume,
        identity=named,
    )
    return finish(state, target, config)


def bytes_per_chain(target: LogDensity, config: NutsConfig) -> int:
    """Memory that one chain takes: a gradient, matrices of size D x D, and draws until they are written.

    Args:
        target: log-density.
        config: options.

    Returns:
        Bytes, measured for the gradient and counted for the rest.
    """
    size, dim = target.origin.element_size(), target.dim
    matrices = 6 * dim**2  # metric and factor, the guess, the estimate of a window, and two in passing
    kept = 2 * config.draws * (dim + 8) + config.warmup * dim  # a list, and stacked
    return target.bytes_per_point + size * (matrices + kept)


def _require_data_sets(target: LogDensity, config: NutsConfig) -> None:
    if target.data_sets is not None and (target.data_sets, "vectorised") != (config.chains, config.chain_method):
        raise InputError(
            f"chains is {config.chains} ({config.chain_method}) for {target.data_sets} data sets; each data set needs "
            "one chain, vectorised."
        )


def _require_memory(target: LogDensity, config: NutsConfig) -> None:
    together = 1 if config.chain_method == "sequential" else config.chains
    each, allowed = bytes_per_chain(target, config), int(config.memory * 2**30)
    if each > allowed:
        raise InputError(
            f"one chain takes about {each / 2**30:,.1f} GiB for {target.dim:,} parameters, {config.memory:g} allowed; "
            f"{FEWER}, use --method svi --guide mean_field or --method map, or raise --memory."
        )
    if together * each > allowed:
        raise InputError(
            f"chains is {config.chains}: about {together * each / 2**30:.1f} GiB at once, {config.memory:g} allowed; "
            f"use at most {max(1, allowed // each)}, or --chain-method sequential."
        )


def _adapt(state: NutsState, config: NutsConfig, acceptance: Tensor, ends: list[int]) -> None:
    """Learn from a transition of the warm-up."""
    done = state.step + 1
    state.step_size = state.adaptation.update(acceptance)
    if ends[0] <= state.step < ends[-1]:
        state.window.append(state.point.z)
    if done in ends[1:]:
        window = torch.stack(state.window)
        state.metric = Metric(window_covariance(window, state.chains_per_metric, state.metric.covariance))
        state.adaptation = StepSize(state.step_size, config.target_accept)
        state.window = []
    if done == config.warmup:
        state.step_size = state.adaptation.final()


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}
