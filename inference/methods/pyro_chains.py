"""Chains of Pyro's own NUTS on the same log-density, one after the other or one process each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import joblib
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

from probattn.errors import InputError
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.runtime.checkpoint import load_checkpoint, previous_checkpoint, save_checkpoint
from probattn.inference.runtime.checksum import DamagedFileError
from probattn.inference.runtime.isolation import isolated
from probattn.inference.runtime.seeds import derived_seed

__all__ = ["run_pyro_chains"]

_LOG = logging.getLogger(__name__)


def run_pyro_chains(
    target: LogDensity,
    start: Tensor,
    *,
    warmup: int,
    draws: int,
    target_accept: float,
    max_depth: int,
    seed: int,
    processes: int,
    checkpoint: Path | None,
    resume: bool,
    identity: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sample chain after chain; the draws do not depend on the number of processes.

    Args:
        target: log-density.
        start: feasible points to begin at, one per chain, ``(C, D)``.
        warmup: transitions of adaptation, discarded.
        draws: transitions kept, per chain.
        target_accept: mean acceptance statistic that the step size aims at.
        max_depth: largest number of doublings of a trajectory.
        seed: random seed.
        processes: number of workers, through joblib, whose backend may be a cluster's.
        checkpoint: file for each finished chain, with its number appended; None keeps none.
        resume: take finished chains from their files.
        identity: names and values that tell this run from others.

    Returns:
        Draws in unconstrained space, ``(C, draws, D)``, and statistics by name, ``(C, draws)`` each.

    Raises:
        InputError: a file of another run.
    """
    options = {"num_samples": draws, "warmup_steps": warmup}
    kernel = {"target_accept_prob": target_accept, "max_tree_depth": max_depth, "full_mass": True}
    jobs = [
        joblib.delayed(_chain)(
            target.model,
            target.data,
            start[k],
            kernel,
            options,
            derived_seed(seed, k),
            None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.{k}"),
            resume,
            {**identity, "chain": k},
        )
        for k in range(len(start))
    ]
    chains = joblib.Parallel(n_jobs=processes, max_nbytes=None)(jobs)
    names = chains[0]["statistics"]
    statistics = {name: torch.stack([chain["statistics"][name] for chain in chains]) for name in names}
    return torch.stack([chain["z"] for chain in chains]), statistics


def _finished(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finished chain from its file, or from the one before where that is damaged; None: it has to be run."""
    if not path.exists():
        return None
    try:
        return load_checkpoint(path, identity)
    except DamagedFileError as damage:
        _LOG.debug("%s", damage)
    before = previous_checkpoint(path)
    with suppress(InputError):  # no such file, damaged too, or of another run
        kept = load_checkpoint(before, identity)
        _LOG.warning("checkpoint %s is damaged; going on from the one before, %s", path, before.name)
        return kept
    _LOG.warning("checkpoint %s is damaged; chain %s is run again", path, identity["chain"])
    return None


def _chain(
    model: nn.Module,
    data: tuple[Tensor, ...],
    start: Tensor,
    kernel_options: dict[str, Any],
    options: dict[str, Any],
    seed: int,
    path: Path | None,
    resume: bool,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """One chain; a finished one is kept on disk."""
    if resume and path is not None and (kept := _finished(path, identity)) is not None:
        return kept
    target = LogDensity(model, *data)
    columns: dict[str, list[float]] = {"lp": [], "step_size": [], "acceptance_rate": []}

    def note(kernel: Any, _: Any, stage: str, __: int) -> None:
        if stage.startswith("Sample"):
            columns["lp"].append(-float(kernel._potential_energy_last))
            columns["step_size"].append(float(kernel.step_size))
            columns["acceptance_rate"].append(float(kernel._mean_accept_prob))

    with isolated(start.device, seed=seed):
        kernel = NUTS(potential_fn=lambda z: -target.log_density(z["z"].unsqueeze(0)).squeeze(0), **kernel_options)
        mcmc = MCMC(kernel, initial_params={"z": start.clone()}, hook_fn=note, disable_progbar=True, **options)
        mcmc.run()
        z = mcmc.get_samples()["z"].detach()
        diverging = torch.zeros(len(z), dtype=torch.bool)
        diverging[list(mcmc.diagnostics()["divergences"]["chain 0"])] = True
    statistics = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    content = {"z": z, "statistics": {**statistics, "diverging": diverging}}
    if path is not None:
        save_checkpoint(path, identity, content)
    return content
