"""Run the study of margins on a language model, job by job, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probattn.hf.margins import margins
from probattn.inference.runtime.files import prepare_folder
from probattn.inference.runtime.progress import log_step
from probattn.inference.runtime.seeds import derived_seed
from probattn.inference.studies.language.growth import grow
from probattn.inference.studies.language.heads import head_alone
from probattn.inference.studies.language.noise import Form, noise_sensitivity, root_mean_square
from probattn.inference.studies.language.plan import Job, Plan
from probattn.inference.studies.language.tables import append, done, read_tables, write_table
from probattn.models.corpus import Corpus

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["LOCAL", "MEASURED", "IncompleteStudyError", "measure"]

_LOG = logging.getLogger(__name__)

#: Forms and levels of the noise that is predicted, by name of the variable.
MEASURED: Mapping[str, tuple[Form, float]] = {
    "kl_all_0.1": ("all", 0.1),
    "kl_all_0.3": ("all", 0.3),
    "kl_last_0.1": ("last", 0.1),
}
#: Small noise with draws of its own, for the local sensitivity, which is the positive control.
LOCAL: Mapping[str, tuple[Form, float]] = {"local_all": ("all", 0.02), "local_last": ("last", 0.02)}


class IncompleteStudyError(RuntimeError):
    """Some jobs of a study failed; the tables of all others are saved, and a further run tries them again."""


def measure(
    model: Any,
    ids: Tensor,
    plan: Plan,
    *,
    corpus: Corpus | None = None,
    folder: Path | None = None,
    tables: Mapping[str, Dataset] | None = None,
    minutes: float = 0,
    only: tuple[str, ...] = (),
) -> dict[str, Dataset]:
    """Measure margins, controls and sensitivities, the most important first.

    Args:
        model: causal model of ``transformers``, on the device where everything is computed.
        ids: tokens of the texts, ``(N, T)``, at least as many as the plan has windows.
        plan: sizes.
        corpus: text that models of our own are trained on; None trains none.
        folder: folder of the tables, each written as soon as one of its jobs is done; None writes none.
        tables: tables that exist; None reads those of the folder.
        minutes: time after which no further job is begun; 0 for no limit.
        only: names of the tables to work on; none stands for all.

    Returns:
        Tables by name, as far as they were measured.

    Raises:
        IncompleteStudyError: jobs failed, after all others are done.
    """
    begin, device = time.monotonic(), next(model.parameters()).device
    if folder is not None:
        prepare_folder(folder)
    found = dict(tables if tables is not None else read_tables(folder) if folder is not None else {})
    ids = ids[: plan.windows].to(device)
    jobs = [job for job in plan.jobs() if (not only or job.table in only) and (job.what != "growth" or corpus)]
    failed: dict[str, str] = {}
    scale = root_mean_square(model, ids)
    for number, job in enumerate(jobs, 1):
        if job.table in failed or done(job.table, found.get(job.table)) >= job.first + job.count:
            continue
        if minutes and time.monotonic() - begin > 60 * minutes:
            _LOG.warning("%g minutes are over: %d of %d jobs are not done", minutes, len(jobs) - number + 1, len(jobs))
            break
        start = time.monotonic()
        try:
            part = _run(job, model, ids, plan, scale, corpus)
        except Exception as error:  # one control that a model cannot have must not cost the others
            _LOG.exception("%s failed", job.table)
            failed[job.table] = str(error) or type(error).__name__
            continue
        found[job.table] = append(job.table, found.get(job.table), part)
        if folder is not None:
            write_table(folder, job.table, found[job.table])
        log_step(_LOG, f"{job.table}: {done(job.table, found[job.table])} done, {time.monotonic() - start:.1f} s",
                 number, len(jobs))  # fmt: skip
    if failed:
        raise IncompleteStudyError("; ".join(f"{name}: {words}" for name, words in failed.items()))
    return found


def _run(job: Job, model: Any, ids: Tensor, plan: Plan, scale: float, corpus: Corpus | None) -> Dataset:
    numbers = np.arange(job.first, min(job.first + job.count, len(ids)))
    if job.what == "growth" and corpus is not None:
        _, table = grow(plan.growth, corpus, derived_seed(plan.seed, job.first), ids.device)
        return table.expand_dims(run=[job.first])
    chosen = ids[job.first : job.first + job.count]
    if job.what == "noise":
        return _noise(model, chosen, plan, scale).assign_coords(sequence=numbers)
    positions = list(range(0, ids.shape[1], job.stride))
    control: str = job.control
    seed = derived_seed(plan.seed, job.first) if control == "shuffled_text" else plan.seed
    table = margins(model, chosen, job.kinds, positions=positions, maps=job.maps, control=job.control, seed=seed)
    table.attrs = {name: str(value) for name, value in table.attrs.items()}
    return table.assign_coords(sequence=numbers)


def _noise(model: Any, ids: Tensor, plan: Plan, scale: float) -> Dataset:
    from xarray import Dataset

    content: dict[str, Tensor] = {}
    for name, (form, level) in (*MEASURED.items(), *LOCAL.items()):
        seed = derived_seed(plan.seed, 1 if name in MEASURED else 2)  # draws of their own for the control
        content[name] = noise_sensitivity(model, ids, form=form, level=level, draws=plan.draws, seed=seed, scale=scale)
    with torch.no_grad():
        content["norm"] = model.get_input_embeddings()(ids).norm(dim=-1).cpu()
    for prefix, turned in (("head_alone", None), ("turned_head_alone", plan.seed)):
        for name, values in head_alone(model, ids, seed=turned).items():
            content[f"{prefix}_{name}"] = values
    table = {name: (("sequence", "token"), values.numpy()) for name, values in content.items()}
    return Dataset(table, coords={"token": np.arange(ids.shape[1])}, attrs={"embedding_rms": scale})
