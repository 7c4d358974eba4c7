"""The data and the model of a fit: sequences from a file, or the attention stage of a language model fitted to text."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.inference.language import LanguageFit, fit_language
from probattn.inference.methods.map import MapConfig
from probattn.inference.methods.svi import SviConfig
from probattn.inference.runtime.environment import select_device
from probattn.inference.runtime.files import prepare_folder, write_bytes
from probattn.models.corpus import load_corpus
from probattn.models.embedding import EmbeddingModel
from probattn.models.hidden_states import load_hidden_states
from probattn.models.language import LanguageConfig, LanguageModel
from probattn.models.projection import Projection, fit_projection

if TYPE_CHECKING:
    from probattn.inference.fit import FitOptions

__all__ = ["Problem", "pose"]

_LOG = logging.getLogger(__name__)
_WINDOWS = 32  # of a text; their likelihood is raised to the power that makes them stand for all


class Problem(NamedTuple):
    """Model, data and facts about the data.

    Attributes:
        model: model of the sequences.
        u: sequences, ``(N, T, p)``.
        facts: what a result must say of them, plain JSON values by name.
    """

    model: EmbeddingModel
    u: Tensor
    facts: Mapping[str, Any]


def pose(options: FitOptions) -> Problem:
    """Read the input of a fit and make the output folder.

    Args:
        options: options of the fit.

    Raises:
        InputError: input that cannot be used, or a folder that cannot be written.
    """
    if options.data is not None:
        return _from_file(options, options.data)
    return _from_text(options, str(options.corpus))


def _from_file(options: FitOptions, data: Path) -> Problem:
    u = load_hidden_states(data, array=options.array)[: options.sequences or None]
    facts: dict[str, Any] = {"name": data.name, "shape": list(u.shape), "rms": float(u.square().mean().sqrt())}
    projection = None
    if options.project is not None:
        projection = fit_projection(u, options.project)
        u = projection(u)
        facts |= {"projected_from": facts["shape"][-1], "variance_kept": projection.kept, "shape": list(u.shape)}
        _LOG.info(
            "projected from %d to %d coordinates, with %.1f %% of the variance; the first has standard deviation 1",
            *(facts["projected_from"], options.project, 100 * projection.kept),
        )
    if options.standardise:
        centre, scale = float(u.mean()), float(u.std())
        if scale == 0:
            raise InputError(f"data {data}: all numbers are equal; there is nothing to infer.")
        u = (u - centre) / scale
        facts |= {"subtracted": centre, "divided_by": scale}
    prepare_folder(options.out)
    if projection is not None:
        _save_projection(options.out / "projection.npz", projection)
    model = EmbeddingModel(
        u.shape[1],
        u.shape[2],
        heads=options.heads,
        rank=options.rank,
        value_dim=options.value_dim,
        prior_scale=options.prior_scale,
        mask=options.mask,
        parameters="qk_matrix" if options.rank is None and options.value_dim is None else "factors",
        jacobian=options.jacobian,
        memory_radius=options.memory_radius,
        contraction=options.contraction,
    )
    device, dtype = select_device(options.device), getattr(torch, options.dtype)
    return Problem(model.to(device, dtype), u.to(device, dtype), facts)


def _save_projection(path: Path, projection: Projection) -> None:
    """Write mean, directions and scale, by which new states are brought to the coordinates of the fit."""
    content = io.BytesIO()
    parts = {name: getattr(projection, name).numpy() for name in ("mean", "directions", "scale")}
    np.savez(content, **parts)
    write_bytes(path, content.getvalue())


def _from_text(options: FitOptions, corpus_name: str) -> Problem:
    """The attention stage of a language model at the mode, as a model of its embeddings with a tempered likelihood."""
    device, dtype = select_device(options.device), getattr(torch, options.dtype)
    corpus, text = load_corpus(corpus_name), options.text
    config = LanguageConfig(
        len(corpus.vocabulary),
        context=text.context,
        dim=text.dim,
        stage_rank=text.stage_rank,
        stage_heads=options.heads,
        stage_radius=options.memory_radius,
        stage_contraction=options.contraction,
        mask=options.mask,
    )
    windows = corpus.windows(config.context)
    prepare_folder(options.out)
    language = LanguageModel(config).to(device, dtype)
    # Processes that share the steps of the fit behind share these too.
    shards = options.method.shards if isinstance(options.method, (SviConfig, MapConfig)) else 1
    _LOG.info("the language model first")
    values, _ = fit_language(
        language,
        tuple(part.to(device) for part in windows),
        LanguageFit(steps=text.language_steps, shards=shards, seed=options.seed),
        checkpoint=options.out / "language.pt",
        resume=options.resume,
        identity={"corpus": corpus.digest, "dtype": options.dtype, "device": device.type},
    )
    with torch.no_grad():
        u = language.embed(values, windows.inputs[: options.sequences or _WINDOWS].to(device))
    model = EmbeddingModel(
        config.context,
        config.dim,
        heads=config.stage_heads,
        rank=config.stage_rank,
        prior_scale=config.prior_scale * config.dim**0.5,
        mask=config.mask,
        noise_scale=config.noise_scale,
        power=config.weight * len(windows.inputs) / len(u),
        jacobian=options.jacobian,
        memory_radius=options.memory_radius,
        contraction=options.contraction,
    )
    facts = {"name": corpus.name, "sha256": corpus.digest, "shape": list(u.shape), "windows": len(windows.inputs)}
    return Problem(model.to(device, dtype), u, facts)
