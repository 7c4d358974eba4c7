"""One question, one call: the posterior of attention parameters given sequences, with diagnostics and figures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from probattn.attention import Mask
from probattn.errors import InputError
from probattn.inference.methods.cost import announce
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.laplace import LaplaceConfig, fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.map import MapConfig, fit_map
from probattn.inference.methods.nuts import NutsConfig, fit_nuts
from probattn.inference.methods.svi import SviConfig, fit_svi
from probattn.inference.problem import pose
from probattn.inference.reports.fit import write_comparison, write_fit
from probattn.inference.results.comparison import AS_ASKED, LEAST_DRAWS, Compared, compare, variants
from probattn.inference.results.contraction import logit_spread, scale_words
from probattn.inference.results.diagnosis import Diagnosis, diagnose
from probattn.inference.results.fit_file import Fit
from probattn.inference.results.posterior import assemble
from probattn.inference.runtime.distributed import process_group, rank, world_size
from probattn.inference.runtime.environment import describe, select_device
from probattn.inference.runtime.files import prepare_folder
from probattn.inference.runtime.lock import sole_run
from probattn.models.embedding import EmbeddingModel
from probattn.models.layer_options import StreamOptions
from probattn.models.options import Device, Dtype, Range, Seed, as_plain, check_options

if TYPE_CHECKING:
    from probattn.models.layer import LayerModel

__all__ = [
    "METHODS",
    "FitOptions",
    "LaplaceConfig",
    "MapConfig",
    "Method",
    "NutsConfig",
    "StreamOptions",
    "SviConfig",
    "TextOptions",
    "fit",
]

Method = NutsConfig | SviConfig | LaplaceConfig | MapConfig
#: Options of the methods by name.
METHODS: Mapping[str, type[Method]] = {
    "nuts": NutsConfig,
    "svi": SviConfig,
    "laplace": LaplaceConfig,
    "map": MapConfig,
}
_FIT: Mapping[type[Method], Callable[..., Draws]] = {
    NutsConfig: fit_nuts,
    SviConfig: fit_svi,
    LaplaceConfig: fit_laplace,
    MapConfig: fit_map,
}
_ALONE = ("nuts", "laplace")
_OF_DATA = ("array", "standardise", "project", "rank", "value_dim", "prior_scale")
_NOT_OF_LAYERS = (*_OF_DATA, "heads", "mask", "memory_radius", "contraction")
# What can be compared, by input.
_COMPARED = {"data": ("jacobian", "mask", "heads"), "layer": ("jacobian", "temperature", "update", "noise")}
_TYPICAL = 15  # gradients of a transition of NUTS: trajectories of four doublings
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextOptions:
    """Language model behind a corpus.

    Attributes:
        context: number of characters in a window, at least 3: with fewer no token has a past that varies.
        dim: size of the embeddings.
        stage_rank: size of queries and keys in the attention stage whose posterior is inferred.
        language_steps: largest number of optimiser steps for the language model.
    """

    context: Annotated[int, Range(least=3)] = 64
    dim: Annotated[int, Range(least=1)] = 32
    # NUTS moves through 2 * rank * dim parameters: the rank of `verify`, 8, would be 512 of them.
    stage_rank: Annotated[int, Range(least=1)] = 2
    language_steps: Annotated[int, Range(least=1)] = 2000

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class FitOptions:
    """Options of ``probattn fit``.

    Attributes:
        data: hidden states (sequences, T, p): .npy, .npz or .safetensors.
        corpus: text instead of hidden states: python-docs, the path of a UTF-8 file, or hf:NAME[:CONFIG]; the posterior
            is that of the attention stage of a language model fitted to it.
        array: name of the array in the file of data.
        sequences: largest number of sequences, from the beginning; 0 takes all, or 32 windows of a text.
        project: number of coordinates to which hidden states are projected first, those in which they vary most.
        standardise: subtract the mean of the data and divide by their standard deviation, one number each.
        method: method of inference.
        heads: number H of heads.
        rank: size r of the factors W_Q and W_K; without it the QK matrix itself is inferred.
        value_dim: size of the factors W_V and W_O, which are then inferred too; without it both are the identity.
        mask: tokens that each token sees: those before it, or itself as well.
        prior_scale: scale s of the prior; entries of the QK matrix have standard deviation s / sqrt(p).
        memory_radius: radius of the ball on which keys and values see tokens; without it tokens are seen as they are.
        contraction: limit, below 1, of the contraction that holds for every past; needs a memory radius.
        jacobian: keep the Jacobian in the likelihood; without it the fit is the naive one, to see what it gets wrong.
        compare: variants that are fitted too and compared by leaving out one sequence at a time: of data jacobian,
            mask and heads, of a layer jacobian, temperature, update and noise.
        text: language model behind a corpus.
        stream: layer of a language model whose heads are inferred, behind the residual streams of a text.
        out: output folder.
        seed: random seed of everything; the method's own gives way to it.
        device: where to compute; auto takes a GPU where there is one.
        dtype: precision.
        resume: go on from the checkpoint in the output folder.
    """

    data: Path | None = None
    corpus: str | None = None
    array: str | None = None
    sequences: Annotated[int, Range(least=0)] = 0
    standardise: bool = False
    project: Annotated[int | None, Range(least=1)] = None
    method: Method = field(default_factory=NutsConfig, metadata={"choices": METHODS})
    heads: Annotated[int, Range(least=1)] = 1
    rank: Annotated[int | None, Range(least=1)] = None
    value_dim: Annotated[int | None, Range(least=1)] = None
    mask: Mask = "strict"
    prior_scale: Annotated[float, Range(above=0)] = 1.0
    memory_radius: Annotated[float | None, Range(above=0)] = None
    contraction: Annotated[float | None, Range(above=0, below=1)] = None
    jacobian: bool = True
    compare: tuple[Literal["jacobian", "mask", "heads", "temperature", "update", "noise"], ...] = ()
    text: TextOptions = field(default_factory=TextOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    out: Path = Path("runs/fit")
    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = "float64"
    resume: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        object.__setattr__(self, "method", replace(self.method, seed=self.seed))
        if (self.data is not None) + (self.corpus is not None) + self.stream.asked != 1:
            raise InputError(
                "give either data (hidden states) or corpus (a text), or a layer with a text (the streams in a "
                "language model): one of the three, and one only."
            )
        if self.contraction is not None and self.memory_radius is None:
            raise InputError(f"contraction is {self.contraction}, which needs memory_radius; give one.")
        if self.compare and self.method_name == "map":
            raise InputError("compare needs draws; use the method nuts, svi or laplace.")
        if self.compare and self._draws < LEAST_DRAWS:
            raise InputError(f"compare needs {LEAST_DRAWS} draws in all, and {self._draws} are asked for; raise draws.")
        self._require_useful()

    def _require_useful(self) -> None:
        """Refuse options that the kind of input has no use for."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        read = "data" if self.data is not None else "corpus" if self.corpus is not None else "layer"
        for respect in self.compare:
            if respect not in _COMPARED.get(read, ()):
                kinds = [kind for kind, names in _COMPARED.items() if respect in names]
                raise InputError(
                    f"comparing {respect} goes with {' or '.join(kinds)}, and {read} is given; leave it out."
                )
        of_others = {"data": (), "corpus": _OF_DATA, "layer": _NOT_OF_LAYERS}[read]
        useless = {name: "data" for name in of_others if getattr(self, name) != defaults[name]}
        if read != "corpus":
            useless |= {entry.name: "corpus" for entry in fields(self.text) if _given(self.text, entry.name)}
        if read != "layer":
            useless |= {entry.name: "layer" for entry in fields(self.stream) if _given(self.stream, entry.name)}
        for name, other in useless.items():
            raise InputError(f"{name} goes with {other}, and {read} is given; leave it out.")

    @property
    def _draws(self) -> int:
        method = self.method
        return 1 if isinstance(method, MapConfig) else method.draws * getattr(method, "chains", 1)

    @property
    def method_name(self) -> str:
        """The name of the method in :data:`METHODS`."""
        return next(name for name, kind in METHODS.items() if type(self.method) is kind)


@sole_run
def fit(options: FitOptions) -> tuple[Fit, Diagnosis]:
    """Infer, judge and write ``fit.nc``, ``diagnosis.json``, ``summary.csv``, ``config.json`` and ``figures/*.png``.

    Progress is logged to the loggers below ``probattn.inference``.

    Args:
        options: data, model, method and where to write.

    Returns:
        The fit and its diagnosis. Under ``torchrun`` all processes return the same and the first one writes.

    Raises:
        InputError: input that cannot be used, or an output folder that another run holds.
    """
    with process_group():
        if world_size() > 1 and options.method_name in _ALONE:
            raise InputError(
                f"--method {options.method_name} runs in one process and {world_size()} were started; use svi or map, "
                "or start it plainly (nuts with --chain-method process takes several cores)."
            )
        if options.stream.asked:
            return _fit_layer(options)
        model, u, facts = pose(options)
        target = LogDensity(model, u)
        others = variants(model, options.compare)  # refused before the work, not after it
        _warn_of_scale(options, target)
        _announce(options.method, target)
        draws = _infer(options, target)
        record = _record(options, model, u, facts, draws)
        found = assemble(target, draws, seed=options.seed, attributes=_attributes(options, model, record))
        diagnosis = diagnose(found)
        compared = _compare(options, others, draws, u) if options.compare else []
        if rank() == 0:
            write_fit(options.out, found, diagnosis, record)
            if compared:
                write_comparison(options.out, compared)
    return found, diagnosis


def _fit_layer(options: FitOptions) -> tuple[Fit, Diagnosis]:
    """The fit of a language model's layer."""
    # Imported here: what stands behind them takes seconds, and most fits are of something else.
    from probattn.inference.layer.comparison import compare_layers, layer_variants
    from probattn.inference.layer.cost import require_update_memory
    from probattn.inference.layer.findings import diagnose_layer
    from probattn.inference.layer.problem import pose_layer
    from probattn.inference.layer.report import write_layer_fit
    from probattn.inference.layer.result import assemble_layer
    from probattn.inference.layer.start import layer_start

    prepare_folder(options.out)
    problem = pose_layer(
        options.stream,
        sequences=options.sequences,
        jacobian=options.jacobian,
        seed=options.seed,
        device=select_device(options.device),
        dtype=getattr(torch, options.dtype),
    )
    others = layer_variants(problem.model, options.compare)  # refused before the work, not after it
    target = LogDensity(problem.model, problem.u)
    if problem.model.update is not None:
        require_update_memory(target, options.method)
    _announce(options.method, target)
    chains = options.method.chains if isinstance(options.method, NutsConfig) else 1

    def infer(name: str, target: LogDensity) -> Draws:
        start = layer_start(target, chains, options.seed)
        variant = "" if name == AS_ASKED else name.replace(" ", "-")
        return _infer(options, target, variant, start if isinstance(options.method, NutsConfig) else start[0])

    draws = infer(AS_ASKED, target)
    record = _record(options, problem.model, problem.u, problem.facts, draws)
    attributes = {**_attributes(options, problem.model, record), "signed": int(problem.model.signed)}
    found = assemble_layer(target, draws, seed=options.seed, attributes=attributes)
    diagnosis = diagnose_layer(found)
    compared: list[Compared] = []
    if options.compare:
        compared = compare_layers(others, problem.u, _reusing(draws, infer))
        _say(compared)
    if rank() == 0:
        write_layer_fit(options.out, found, diagnosis, record)
        if compared:
            write_comparison(options.out, compared)
    return found, diagnosis


def _record(
    options: FitOptions, model: EmbeddingModel | LayerModel, u: Tensor, facts: Mapping[str, Any], draws: Draws
) -> dict[str, Any]:
    """Record of how a fit was made."""
    return {
        "schema": 1,
        "environment": describe(select_device(options.device), u.dtype, options.seed),
        "processes": world_size(),
        "data": facts,
        "model": {
            name: value
            for name, value in vars(model).items()
            if isinstance(value, (int, float, str)) and not name.startswith("_")
        },
        "options": as_plain(options),
        "method": {"name": draws.method, **draws.info},
    }


def _warn_of_scale(options: FitOptions, target: LogDensity) -> None:
    """Say before the work that the data are on a scale where they can say little."""
    model, u = target.model, target.data[0]
    assert isinstance(model, EmbeddingModel)
    prior = model.attention_of(target.prior_draws(64, options.seed)).qk_matrix
    spread = logit_spread(prior.double().cpu().numpy(), u[:8].double().cpu().numpy())
    rms = float(u.double().square().mean().sqrt())
    words = scale_words(spread, rms, standardise=options.data is not None and not options.standardise)
    if words:
        _LOG.warning("scale of the data: %s", words)


def _announce(method: Method, target: LogDensity) -> None:
    """Say before the work how long it may take, where that is long."""
    share = min(1.0, (getattr(method, "batch", 0) or target.sequences) / target.sequences)
    if isinstance(method, NutsConfig):
        count = method.warmup + method.draws
        words = f"{count:,} transitions of {_TYPICAL} gradients (of {2**method.max_depth:,} at worst)"
        announce(target, f"nuts, {words}", count * _TYPICAL + 2 * target.dim, method.chains)
    elif isinstance(method, LaplaceConfig):
        # A Hessian is 2 D gradients, and Newton's steps take up to three more of them.
        announce(target, f"laplace, a Hessian of {target.dim:,} columns", method.steps + 8 * target.dim)
    elif isinstance(method, SviConfig):
        announce(target, f"svi, at most {method.steps:,} steps", method.steps * method.particles * share)
    else:
        announce(target, f"map, at most {method.steps:,} steps", method.steps * share)


def _infer(options: FitOptions, target: LogDensity, variant: str = "", start: Tensor | None = None) -> Draws:
    name = "-".join(filter(None, (options.method_name, variant)))
    return _FIT[type(options.method)](
        target,
        options.method,
        start=start,
        checkpoint=options.out / f"{name}.pt",
        resume=options.resume,
        identity={"device": target.data[0].device.type},
    )


def _compare(options: FitOptions, models: Mapping[str, EmbeddingModel], own: Draws, u: Tensor) -> list[Compared]:
    def infer(name: str, target: LogDensity) -> Draws:
        return _infer(options, target, name.replace(" ", "-"))

    compared = compare(models, u, _reusing(own, infer))
    _say(compared)
    return compared


def _reusing(own: Draws, infer: Callable[[str, LogDensity], Draws]) -> Callable[[str, LogDensity], Draws]:
    """Inference that does not repeat the fit that was asked for."""

    def again(name: str, target: LogDensity) -> Draws:
        if name == AS_ASKED:
            return own
        _LOG.info("fitting %s", name)
        return infer(name, target)

    return again


def _say(compared: list[Compared]) -> None:
    for entry in compared:
        _LOG.info("compared  %s", entry)


def _attributes(options: FitOptions, model: EmbeddingModel | LayerModel, record: Mapping[str, Any]) -> dict[str, Any]:
    environment = record["environment"]
    deepest = {"max_depth": options.method.max_depth} if isinstance(options.method, NutsConfig) else {}
    return {
        "data": str(record["data"]["name"]),
        "mask": model.mask,
        "power": model.power,
        "jacobian": int(model.jacobian),
        "source": "layer" if options.stream.asked else "text" if options.data is None else "file",
        "standardised": int(options.standardise),
        **deepest,
        "seed": options.seed,
        "command": environment["command"],
        "date": environment["date"],
        "dtype": environment["dtype"],
        "hardware": f"{environment['processor']}; {environment['device']}",
        **{f"version_{name}": version for name, version in environment["versions"].items()},
    }


def _given(options: Any, name: str) -> bool:
    return bool(getattr(options, name) != getattr(type(options)(), name))
