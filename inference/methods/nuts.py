r"""The No-U-Turn sampler over many chains in one tensor program.

Multinomial sampling along the trajectory and the generalised U-turn criterion of Betancourt (1701.02434), the tree
built leaf by leaf so that all chains take the same step at the same time (Phan, Pradhan and Jankowiak, 1912.11554), and
Stan's windows of adaptation. Chains differ in their numbers only: no global random state, no handlers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from probattn.errors import InputError, require_at_least, require_choice, require_positive
from probattn.inference.runtime.checkpoint import load_checkpoint
from probattn.inference.runtime.files import write_atomically

__all__ = ["ChainMethod", "NutsConfig", "NutsRun", "run_nuts"]

ChainMethod = Literal["vectorised", "sequential", "process"]
ValueAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_DIVERGENCE = 1000.0
_EARLY_DEPTH = 5  # doublings at most while the mass matrix is still learnt: a tiny step would hold up all chains


@dataclass(frozen=True)
class NutsConfig:
    """Options of NUTS.

    Attributes:
        chains: number of chains.
        chain_method: "vectorised" (all chains in one tensor program), "sequential" (Pyro's NUTS, one after the other)
            or "process" (Pyro's NUTS, one process per chain, through joblib, whose backend may be a cluster's).
        warmup: transitions of adaptation, discarded.
        draws: transitions kept, per chain.
        target_accept: mean acceptance statistic that the step size aims at.
        max_depth: largest number of doublings of a trajectory.
        memory: GiB that all chains together may take.
        checkpoint_every: kept draws between two checkpoints.
        seed: random seed.
    """

    chains: int = 4
    chain_method: ChainMethod = "vectorised"
    warmup: int = 500
    draws: int = 500
    target_accept: float = 0.8
    max_depth: int = 10
    memory: float = 8.0
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("chain_method", self.chain_method, get_args(ChainMethod))
        least = {"chains": 1, "warmup": 20, "draws": 4, "max_depth": 1, "checkpoint_every": 1}
        for name, smallest in least.items():
            require_at_least(name, getattr(self, name), smallest)
        require_positive("memory", self.memory)
        if not 0 < self.target_accept < 1:
            raise InputError(f"target_accept is {self.target_accept}; it must lie between 0 and 1.")


class NutsRun(NamedTuple):
    """Kept draws.

    Attributes:
        z: (draws, C, D).
        stats: by ArviZ name, (draws, C) each.
    """

    z: Tensor
    stats: dict[str, Tensor]


class _Point(NamedTuple):
    """Position, momentum, log-density and gradient of every chain."""

    z: Tensor
    r: Tensor
    value: Tensor
    gradient: Tensor

    def where(self, chosen: Tensor, other: _Point) -> _Point:
        """This point for the chosen chains, another for the rest."""
        return _Point(*(_where(chosen, a, b) for a, b in zip(self, other, strict=True)))

    def at(self, rows: Tensor) -> _Point:
        """Some of the chains, (K,)."""
        return _Point(*(part[rows] for part in self))

    def put(self, rows: Tensor, new: _Point) -> _Point:
        """This point with some of the chains, (K,), replaced."""
        return _Point(*(old.index_put((rows,), part) for old, part in zip(self, new, strict=True)))


class _Metric:
    """An inverse mass matrix a chain, (C, D, D), and what it does to momenta."""

    def __init__(self, covariance: Tensor) -> None:
        self.covariance = covariance
        self.factor = torch.linalg.cholesky(covariance)

    def draw(self, generator: torch.Generator) -> Tensor:
        noise = torch.randn(
            self.factor.shape[:-1], generator=generator, dtype=self.factor.dtype, device=self.factor.device
        )
        momenta: Tensor = torch.linalg.solve_triangular(self.factor.mT, noise.unsqueeze(-1), upper=True)
        return momenta.squeeze(-1)

    def velocity(self, r: Tensor) -> Tensor:
        return (self.covariance @ r.unsqueeze(-1)).squeeze(-1)

    def kinetic(self, r: Tensor) -> Tensor:
        return 0.5 * (r * self.velocity(r)).sum(-1)

    def at(self, rows: Tensor) -> _Metric:
        """Some of the chains, (K,)."""
        chosen = _Metric.__new__(_Metric)
        chosen.covariance, chosen.factor = self.covariance[rows], self.factor[rows]
        return chosen

    def turning(self, left: Tensor, right: Tensor, total: Tensor) -> Tensor:
        inner = total - 0.5 * (left + right)
        return ((self.velocity(left) * inner).sum(-1) <= 0) | ((self.velocity(right) * inner).sum(-1) <= 0)


class _StepSize:
    """Dual averaging (Hoffman and Gelman, 2014), a chain at a time."""

    def __init__(self, step: Tensor, target: float) -> None:
        self.target, self.count = target, 0
        self.centre = (2 * step).log()
        self.log_step, self.average, self.error = step.log(), step.log(), torch.zeros_like(step)

    def update(self, acceptance: Tensor) -> Tensor:
        self.count += 1
        rate = 1 / (self.count + 10)
        self.error = (1 - rate) * self.error + rate * (self.target - acceptance)
        self.log_step = self.centre - math.sqrt(self.count) / 0.05 * self.error
        decay = self.count**-0.75
        self.average = decay * self.log_step + (1 - decay) * self.average
        return self.log_step.exp()


def run_nuts(
    value_and_gradient: ValueAndGradient,
    start: Tensor,
    config: NutsConfig,
    *,
    covariance: Tensor | None = None,
    pool: int = 1,
    checkpoint: Path | None = None,
    resume: bool = False,
    identity: str = "",
    report: Callable[[int, int], None] | None = None,
) -> NutsRun:
    """Sample C chains at once.

    Args:
        value_and_gradient: log-density, (K,), and its gradient, (K, D), at points (K, D) of the chains whose numbers,
            (K,), are its second argument. Only chains whose trajectory still grows are asked for.
        start: where the chains begin, (C, D); the log-density there must be finite.
        config: how to sample.
        covariance: a first guess of the posterior's, (C, D, D), from which the mass matrices start and to which the
            short windows shrink; None: 0.001 times the identity.
        pool: neighbouring chains that learn one mass matrix together (chains of the same target); divides C.
        checkpoint: where kept draws are saved; a run killed in its warm-up begins anew, which gives the same numbers.
        resume: go on from the checkpoint if it is there.
        identity: tells this run from others; a checkpoint with another is refused.
        report: called after each transition with its number and the number of all.

    Returns:
        :class:`NutsRun`. A resumed run gives the bits of an unbroken one on the same machine and thread count.

    Raises:
        InputError: an infeasible start (with the chain), a pool that does not divide C, a checkpoint of another run.

    Example:
        >>> def normal(z, chains):
        ...     return -0.5 * z.square().sum(-1), -z
        >>> run = run_nuts(normal, torch.zeros(3, 2).double(), NutsConfig(warmup=50, draws=20))
        >>> run.z.shape
        torch.Size([20, 3, 2])
    """
    chains, dim = start.shape
    if chains % pool:
        raise InputError(f"pool is {pool}, which does not divide the {chains} chains.")
    value, gradient = value_and_gradient(start, torch.arange(chains, device=start.device))
    bad = ~(torch.isfinite(value) & torch.isfinite(gradient).all(-1))
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise InputError(
            f"chain {where} starts where the log-density is {float(value[where])}; start it at a feasible point."
        )
    described = f"{identity} {sorted(asdict(config).items())} {tuple(start.shape)} pool {pool}"
    generator = torch.Generator(device=start.device).manual_seed(config.seed)
    point = _Point(start.clone(), torch.zeros_like(start), value, gradient)
    saved = (
        load_checkpoint(checkpoint, described) if resume and checkpoint is not None and checkpoint.exists() else None
    )
    total = config.warmup + config.draws
    kept: list[Tensor] = []
    rows: list[dict[str, Tensor]] = []
    if saved is None:
        eye = torch.eye(dim, dtype=start.dtype, device=start.device)
        guess = 1e-3 * eye.expand(chains, dim, dim) if covariance is None else covariance
        point, step, metric = _warm_up(value_and_gradient, point, _Metric(guess), config, generator, pool, report)
    else:
        step, metric = saved["step"], _Metric(saved["covariance"])
        point = _Point(saved["z"][-1], torch.zeros_like(start), saved["value"], saved["gradient"])
        kept = list(saved["z"])
        rows = [{name: column[k] for name, column in saved["stats"].items()} for k in range(len(kept))]
        generator.set_state(saved["generator"])
    while len(kept) < config.draws:
        point, row = _transition(value_and_gradient, point, step, metric, generator, config.max_depth)
        kept.append(point.z)
        rows.append({**row, "step_size": step})
        if checkpoint is not None and (len(kept) % config.checkpoint_every == 0 or len(kept) == config.draws):
            content = {
                "schema": 1,
                "identity": described,
                "step": step,
                "covariance": metric.covariance,
                "z": torch.stack(kept),
                "value": point.value,
                "gradient": point.gradient,
                "stats": _stack(rows),
                "generator": generator.get_state(),
            }
            write_atomically(checkpoint, partial(torch.save, content))
        if report is not None:
            report(config.warmup + len(kept), total)
    return NutsRun(torch.stack(kept), _stack(rows))


def _warm_up(
    value_and_gradient: ValueAndGradient,
    point: _Point,
    metric: _Metric,
    config: NutsConfig,
    generator: torch.Generator,
    pool: int,
    report: Callable[[int, int], None] | None,
) -> tuple[_Point, Tensor, _Metric]:
    step = torch.full_like(point.value, 0.25)
    adaptation = _StepSize(step, config.target_accept)
    ends = _windows(config.warmup)
    window: list[Tensor] = []
    for k in range(config.warmup):
        depth = min(_EARLY_DEPTH, config.max_depth) if k < ends[-1] else config.max_depth
        point, row = _transition(value_and_gradient, point, step, metric, generator, depth)
        step = adaptation.update(row["acceptance_rate"])
        if ends[0] <= k < ends[-1]:
            window.append(point.z)
        if k + 1 in ends[1:]:
            metric = _Metric(_covariance(torch.stack(window), pool, metric.covariance))
            adaptation = _StepSize(step, config.target_accept)
            window = []
        if report is not None:
            report(k + 1, config.warmup + config.draws)
    return point, adaptation.average.exp(), metric


def _windows(warmup: int) -> list[int]:
    """Ends of a first stretch for the step size, of windows that double for the mass matrix, and before a last one."""
    first, last = math.ceil(0.15 * warmup), warmup - math.ceil(0.1 * warmup)
    ends, width = [first], max(10, math.ceil(0.05 * warmup))
    while ends[-1] < last:
        end = ends[-1] + width
        width *= 2
        ends.append(last if end + width > last else end)
    return ends


def _covariance(window: Tensor, pool: int, before: Tensor) -> Tensor:
    """Covariance of a window (W, C, D), pooled over neighbouring chains, shrunk towards the one before, (C, D, D)."""
    count, chains, dim = window.shape
    pooled = window.reshape(count, chains // pool, pool, dim).transpose(0, 1).reshape(chains // pool, -1, dim)
    centred = pooled - pooled.mean(1, keepdim=True)
    size = pooled.shape[1]
    covariance = centred.mT @ centred / (size - 1)
    return (size * covariance.repeat_interleave(pool, dim=0) + 5 * before) / (size + 5)


def _transition(
    value_and_gradient: ValueAndGradient,
    origin: _Point,
    step: Tensor,
    metric: _Metric,
    generator: torch.Generator,
    max_depth: int,
) -> tuple[_Point, dict[str, Tensor]]:
    chains = len(step)
    options: dict[str, Any] = {"dtype": step.dtype, "device": step.device}

    def uniform() -> Tensor:
        return torch.rand(chains, generator=generator, **options)

    origin = origin._replace(r=metric.draw(generator))
    energy = metric.kinetic(origin.r) - origin.value
    left = right = proposal = origin
    momenta, weight = origin.r, torch.zeros(chains, **options)
    accepted, leaves, depth = torch.zeros(chains, **options), torch.zeros(chains, **options), torch.zeros_like(step)
    diverging = torch.zeros(chains, dtype=torch.bool, device=step.device)
    growing = ~diverging
    for level in range(max_depth):
        if not bool(growing.any()):
            break
        forward = uniform() < 0.5
        end = right.where(forward, left)
        signed = torch.where(forward, step, -step)
        inside = growing.clone()  # chains whose subtree still grows
        sub, sub_weight = end, torch.full((chains,), -math.inf, **options)
        sub_momenta = torch.zeros_like(origin.r)
        marks: dict[int, tuple[Tensor, Tensor]] = {}
        for n in range(2**level):
            if not bool(inside.any()):
                break
            rows = inside.nonzero().squeeze(-1)
            end = end.put(rows, _leapfrog(value_and_gradient, end.at(rows), signed[rows], metric.at(rows), rows))
            change = (metric.kinetic(end.r) - end.value - energy).nan_to_num(nan=math.inf)
            leaf_weight = torch.where(inside, -change, -math.inf)
            accepted = accepted + torch.where(inside, (-change).clamp(max=0).exp(), 0.0)
            leaves = leaves + inside
            outside = inside & (change > _DIVERGENCE)
            grown = torch.logaddexp(sub_weight, leaf_weight)
            chosen = inside & (uniform().log() < leaf_weight - grown)
            sub, sub_weight = end.where(chosen, sub), grown
            sub_momenta = sub_momenta + torch.where(inside.unsqueeze(-1), end.r, 0.0)
            turned = torch.zeros_like(inside)
            last = (n >> 1).bit_count()
            if n % 2 == 0:
                marks[last] = (end.r, sub_momenta)
            else:  # every subtree that this leaf completes
                trailing = (~n & (n + 1)).bit_length() - 1
                for mark in range(last, last - trailing, -1):
                    begin, before = marks[mark]
                    turned |= metric.turning(begin, end.r, sub_momenta - before + begin)
            diverging = diverging | outside
            inside = inside & ~outside & ~turned
        complete = growing & inside
        chosen = complete & (uniform().log() < sub_weight - weight)
        proposal = sub.where(chosen, proposal)
        right, left = end.where(complete & forward, right), end.where(complete & ~forward, left)
        momenta = torch.where(complete.unsqueeze(-1), momenta + sub_momenta, momenta)
        weight = torch.where(complete, torch.logaddexp(weight, sub_weight), weight)
        depth = depth + growing
        growing = complete & ~metric.turning(left.r, right.r, momenta)
    row = {
        "acceptance_rate": accepted / leaves.clamp(min=1),
        "diverging": diverging,
        "energy": energy,
        "lp": proposal.value,
        "n_steps": leaves,
        "tree_depth": depth,
    }
    return proposal, row


def _leapfrog(
    value_and_gradient: ValueAndGradient, point: _Point, step: Tensor, metric: _Metric, rows: Tensor
) -> _Point:
    half = 0.5 * step.unsqueeze(-1)
    r = point.r + half * point.gradient
    z = point.z + step.unsqueeze(-1) * metric.velocity(r)
    value, gradient = value_and_gradient(z, rows)
    return _Point(z, r + half * gradient, value, gradient)


def _where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(chosen if a.dim() == 1 else chosen.unsqueeze(-1), a, b)


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
