"""NUTS with several chains, by a chain method that is chosen and recorded, never silently changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

from probattn.errors import InputError
from probattn.inference.methods.draws import Draws, curvature_guess, feasible_start
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.nuts import NutsConfig, run_nuts
from probattn.inference.runtime.checkpoint import load_checkpoint
from probattn.inference.runtime.files import write_atomically
from probattn.inference.runtime.isolation import isolated

__all__ = ["fit_nuts"]


def fit_nuts(
    target: LogDensity,
    config: NutsConfig,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    identity: str = "",
    report: Callable[[int, int], None] | None = None,
) -> Draws:
    """Sample a posterior.

    Args:
        target: the posterior.
        config: chains and how they run.
        checkpoint: where to keep finished draws (vectorised) or, with the chain's number appended, finished chains.
        resume: go on from there.
        identity: tells this run from others.
        report: called with transitions done and to do, where the method can tell.

    Returns:
        Draws with acceptance, divergences, step size and log-joint; energy, tree depth and steps with "vectorised",
        which stock Pyro does not give.

    Raises:
        InputError: more chains than the memory allows, no feasible start, a checkpoint of another run.
    """
    _require_memory(target, config)
    start = feasible_start(target, config.chains, config.seed)
    notes: dict[str, str | int | float] = {"chain_method": config.chain_method, "chains": config.chains}
    if config.chain_method == "vectorised":
        run = run_nuts(
            target.value_and_gradient,
            start,
            config,
            covariance=curvature_guess(target, start),
            pool=config.chains,
            checkpoint=checkpoint,
            resume=resume,
            identity=identity,
            report=report,
        )
        stats = {name: column.T for name, column in run.stats.items()}
        return Draws("nuts", run.z.transpose(0, 1), stats, notes)
    described = f"{identity} {sorted(asdict(config).items())}"
    paths = [None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.{k}") for k in range(len(start))]
    jobs = [
        joblib.delayed(_stock_chain)(target.model, target.data, start[k], config, k, paths[k], resume, described)
        for k in range(config.chains)
    ]
    workers = config.chains if config.chain_method == "process" else 1
    chains = joblib.Parallel(n_jobs=workers, max_nbytes=None)(jobs)
    z = torch.stack([chain["z"] for chain in chains])
    return Draws(
        "nuts", z, {name: torch.stack([c["stats"][name] for c in chains]) for name in chains[0]["stats"]}, notes
    )


def _require_memory(target: LogDensity, config: NutsConfig) -> None:
    together = 1 if config.chain_method == "sequential" else config.chains
    data = target.data[0]
    # Weights and logits of every position against every other, forward and backward.
    each = 8 * data.shape[-3] * data.shape[-2] ** 2 * 8 if data.dim() >= 3 else 8 * data.numel() * data.shape[-1] * 8
    kept = 8 * config.draws * target.dim  # every draw stays in memory until it is written
    each = each + kept
    allowed = int(config.memory * 2**30)
    if together * each > allowed:
        raise InputError(
            f"chains is {config.chains}: about {together * each / 2**30:.1f} GiB at once, {config.memory:g} allowed; "
            f"use at most {max(1, allowed // each)}, or --chain-method sequential."
        )


def _stock_chain(
    model: nn.Module,
    data: tuple[Tensor, ...],
    start: Tensor,
    config: NutsConfig,
    chain: int,
    path: Path | None,
    resume: bool,
    identity: str,
) -> dict[str, Any]:
    """One chain of Pyro's own NUTS; a finished one is kept on disk."""
    if resume and path is not None and path.exists():
        return load_checkpoint(path, identity)
    target = LogDensity(model, *data)
    columns: dict[str, list[float]] = {"lp": [], "step_size": [], "acceptance_rate": []}

    def keep(kernel: Any, _: Any, stage: str, __: int) -> None:
        if stage.startswith("Sample"):
            columns["lp"].append(-float(kernel._potential_energy_last))
            columns["step_size"].append(float(kernel.step_size))
            columns["acceptance_rate"].append(float(kernel._mean_accept_prob))

    with isolated(start.device, seed=config.seed * 1009 + chain):
        kernel = NUTS(
            potential_fn=lambda z: -target.log_density(z["z"].unsqueeze(0)).squeeze(0),
            target_accept_prob=config.target_accept,
            max_tree_depth=config.max_depth,
            full_mass=True,
        )
        mcmc = MCMC(
            kernel,
            num_samples=config.draws,
            warmup_steps=config.warmup,
            initial_params={"z": start.clone()},
            hook_fn=keep,
            disable_progbar=True,
        )
        mcmc.run()
        z = mcmc.get_samples()["z"].detach()
        diverging = torch.zeros(config.draws, dtype=torch.bool)
        diverging[list(mcmc.diagnostics()["divergences"]["chain 0"])] = True
    stats = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    content = {"schema": 1, "identity": identity, "z": z, "stats": {**stats, "diverging": diverging}}
    if path is not None:
        write_atomically(path, partial(torch.save, content))
    return content
