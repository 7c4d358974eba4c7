r"""Margins of every token in every layer of a language model, on the residual stream.

For each attention sublayer with mean mu and blocks :math:`M_i = \partial \mu_i / \partial u_i` two maps are looked at,

.. math:: \text{generator: } u - \mu(u), \quad J_i = I - M_i; \qquad \text{update: } u + \mu(u), \quad J_i = I + M_i,

the map whose determinant makes the density, and what the network itself does. A small margin is not bad and a large one
is not good: a head that attends to one token alone, or to all of them alike, has a covariance near zero and J near the
identity, so that a large margin is also what a dead head looks like.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from probattn import blocks
from probattn.errors import InputError, require_choice
from probattn.hf.layers import AttentionLayer, attention_layer
from probattn.hf.layers.past import average
from probattn.hf.layers.sublayer import Sublayer, project
from probattn.numerics.random import isolated_seed

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["Control", "Kind", "Map", "margins", "residual_streams"]

Kind = Literal["logabsdet", "sigma_min", "spectral", "complex"]
Map = Literal["generator", "update"]
Control = Literal["none", "random_weights", "turned_output"]

_TOKENS = 16  # positions whose blocks exist at a time


@torch.no_grad()
def margins(
    model: Any,
    input_ids: Tensor,
    kinds: Sequence[Kind] = ("logabsdet", "sigma_min", "spectral", "complex"),
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    maps: Sequence[Map] = ("generator", "update"),
    attribution: bool = False,
    control: Control = "none",
    seed: int = 0,
) -> Dataset:
    """Measure the margins of tokens in the layers of a causal language model.

    Args:
        model: a causal model of ``transformers`` whose layers :func:`~probattn.hf.layers.attention_layer` covers.
        input_ids: token ids, ``(sequences, T)`` or ``(T,)``.
        kinds: quantities to compute: "logabsdet" (with its sign), "sigma_min", "spectral" and "complex", see
            :func:`probattn.stability_margin`.
        layers: numbers of the layers; None: all.
        positions: positions of the tokens, increasing; None: all.
        attention_mask: 0 on padding, on either side, as the model takes it; padding has NaN everywhere.
        maps: "generator" (I - M) and "update" (I + M); variables of the second begin with ``update_``.
        attribution: whether to add the heads' contributions -tr(J^-1 M^h) to the generator's volume.
        control: "random_weights" measures a copy of the model with weights drawn anew; "turned_output" turns each
            layer's output map by a random rotation of the stream, the stream itself being that of the model.
        seed: random seed of the controls.

    Returns:
        A dataset with dimensions (sequence, layer, token) and, with ``attribution``, head: the quantities asked for,
        ``rms`` of the stream, ``sink`` (attention of a token to the first one, mean over heads) and, without layer,
        ``surprisal`` of a token given those before it and ``entropy`` of the prediction after it, in nats. Attributes
        record model, digest of its weights, precision, control and versions. Opens as a data frame with
        ``.to_dataframe()`` and is saved with ``.to_netcdf(path, engine="h5netcdf")``.

    Raises:
        InputError: ids that are no whole numbers or too many for the model, an unknown kind, map or control, a layer or
            position that is not there, a model that is not covered.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> found = margins(LlamaForCausalLM(config), torch.tensor([[1, 2, 3]]), kinds=("logabsdet",))
        >>> dict(found.sizes), bool((found.sign > 0).all())
        ({'sequence': 1, 'layer': 2, 'token': 3}, True)
    """
    from xarray import Dataset

    ids, mask = _checked_ids(model, input_ids, attention_mask)
    for kind in kinds:
        require_choice("kinds", kind, get_args(Kind))
    for one in maps:
        require_choice("maps", one, get_args(Map))
    require_choice("control", control, get_args(Control))
    if control == "random_weights":
        model = _redrawn(model, seed)
    streams, logits = residual_streams(model, ids, mask)
    numbers = list(range(len(streams))) if layers is None else list(layers)
    where = list(range(ids.shape[1])) if positions is None else list(positions)
    for name, asked, count in (("layers", numbers, len(streams)), ("positions", where, ids.shape[1])):
        if not asked or sorted(set(asked)) != asked or not 0 <= asked[0] <= asked[-1] < count:
            raise InputError(f"{name} is {asked}; it must hold increasing whole numbers from 0 to {count - 1}.")
    rows = torch.tensor(where)
    found: dict[str, list[Tensor]] = {}
    for number in numbers:
        layer = attention_layer(model, number).detach()
        if control == "turned_output":
            layer = _turned(layer, seed + number)
        u = streams[number].to(layer.dtype)
        seen = _of_layer(_with_mask(layer, mask), u, rows, kinds, maps, attribution)
        for name, values in seen.items():
            found.setdefault(name, []).append(values.masked_fill(_hidden(mask, rows, values), torch.nan))
    content: dict[str, Any] = {}
    for name, parts in found.items():
        axes = ("sequence", "layer", "token", "head") if name == "attribution" else ("sequence", "layer", "token")
        content[name] = (axes, torch.stack(parts, 1).cpu().numpy())
    for name, values in _predictions(logits, ids, mask).items():
        content[name] = (("sequence", "token"), values[:, rows].cpu().numpy())
    content["input_ids"] = (("sequence", "token"), ids[:, rows].cpu().numpy())
    coordinates = {"layer": np.array(numbers), "token": np.array(where)}
    return Dataset(content, coords=coordinates, attrs=_attributes(model, control, seed))


@torch.no_grad()
def residual_streams(model: Any, ids: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """Run a model and keep the residual stream in front of each layer.

    Args:
        model: a causal model.
        ids: token ids, ``(sequences, T)``.
        mask: 0 on padding, ``(sequences, T)``.

    Returns:
        The streams, ``(sequences, T, p)`` each, and the logits, ``(sequences, T, vocabulary)``.
    """
    training = model.training
    model.eval()
    try:
        arguments = {} if mask is None else {"attention_mask": mask, "position_ids": _positions(mask)}
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False, **arguments)
    finally:
        model.train(training)
    return list(output.hidden_states[:-1]), output.logits.float()


def _of_layer(
    layer: AttentionLayer, u: Tensor, rows: Tensor, kinds: Sequence[Kind], maps: Sequence[Map], attribution: bool
) -> dict[str, Tensor]:
    """All quantities of one layer at some positions, ``(sequences, P)`` each."""
    parts: dict[str, list[Tensor]] = {}
    for chunk in rows.split(max(1, _TOKENS // len(u))):
        change = layer.mean_jacobian(u, chunk) if "sigma_min" in kinds else None
        core = layer.core(u, chunk)
        for name in maps:
            sign, prefix = (1, "") if name == "generator" else (-1, "update_")
            for key, values in _quantities(core, change, sign, layer.dim, kinds).items():
                parts.setdefault(prefix + key, []).append(values)
        if attribution:
            parts.setdefault("attribution", []).append(layer.head_attribution(u, chunk))
    found = {name: torch.cat(pieces, 1) for name, pieces in parts.items()}
    found["rms"] = u[:, rows].square().mean(-1).sqrt()
    found["sink"] = _sink(layer, u, rows)
    return found


def _quantities(core: Tensor, change: Tensor | None, sign: int, dim: int, kinds: Sequence[Kind]) -> dict[str, Tensor]:
    """The margins of one map, with blocks I - s M, from a core K and from M itself, ``(sequences, P)`` each."""
    found: dict[str, Tensor] = {}
    if "logabsdet" in kinds:
        found["sign"], found["logabsdet"] = blocks.logabsdet_one_minus(sign * core)
    if change is not None:
        found["sigma_min"] = blocks.smallest_singular_value_one_minus(sign * change)
    if "spectral" in kinds:
        found["spectral"] = 1 - blocks.largest_real_eigenvalue(sign * core, dim)
    if "complex" in kinds:
        found["complex"] = 1 - blocks.spectral_abscissa(sign * core, dim)
    return found


def _sink(layer: AttentionLayer, u: Tensor, rows: Tensor) -> Tensor:
    """Attention of tokens to the first one, mean over heads, ``(sequences, P)``."""
    sublayer, length = layer.sublayer, u.shape[1]
    positions = torch.arange(length).unsqueeze(0) if layer.positions is None else layer.positions
    tokens = project(sublayer, u, positions)
    first = torch.zeros_like(tokens.value[..., :1])  # a value that is one for the first token: its mean is the weight
    first[:, :, 0] = 1.0
    mask = None if layer.visible is None else layer.visible.unsqueeze(1)
    return average(sublayer, tokens._replace(value=first), rows, mask)[..., 0].mean(-1)


def _checked_ids(model: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Ids and mask, ``(sequences, T)``, the mask None where nothing is padding."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"input_ids is {kind}; it must be a tensor of whole numbers, as a tokeniser returns.")
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if ids.dim() != 2 or not ids.numel():
        raise InputError(f"input_ids has shape {tuple(ids.shape)}; it must be (sequences, T) with at least one token.")
    words = model.get_input_embeddings().weight.shape[0]
    if not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise InputError(
            f"input_ids go from {int(ids.min())} to {int(ids.max())}; the model has {words} tokens. "
            "Use its own tokeniser."
        )
    longest = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    if longest is not None and ids.shape[1] > longest:
        raise InputError(f"input_ids has {ids.shape[1]} tokens; the model takes {longest}. Cut the text into windows.")
    if mask is None or bool((mask != 0).all()):
        return ids, None
    if mask.shape != ids.shape or not bool((mask != 0).any(1).all()):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be {tuple(ids.shape)} with a token in "
            "each sequence."
        )
    return ids, mask


def _positions(mask: Tensor) -> Tensor:
    """Positions of the tokens, counted without padding."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _with_mask(layer: AttentionLayer, mask: Tensor | None) -> AttentionLayer:
    """The layer as it sees a batch with padding."""
    if mask is None:
        return layer
    length = mask.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    window = layer.sublayer.window
    if window is not None:
        visible = visible.triu(1 - window)
    itself = torch.eye(length, dtype=torch.bool)  # so that padding sees something; its numbers are not shown
    return layer.at(_positions(mask)).seeing((visible & (mask != 0).unsqueeze(1)) | itself)


def _hidden(mask: Tensor | None, rows: Tensor, values: Tensor) -> Tensor:
    """True on padding, broadcast to values, ``(sequences, P, ...)``."""
    if mask is None:
        return torch.zeros(values.shape, dtype=torch.bool)
    hidden = mask[:, rows] == 0
    return hidden.view(*hidden.shape, *[1] * (values.dim() - 2)).expand(values.shape)


def _predictions(logits: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Surprisal of each token, NaN for the first, and entropy of the prediction behind it, ``(sequences, T)`` each."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    surprisal = torch.full_like(entropy, torch.nan)
    surprisal[:, 1:] = -log_p[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    if mask is not None:
        hidden = mask == 0
        entropy = entropy.masked_fill(hidden, torch.nan)
        after = torch.cat([hidden[:, :1], hidden[:, :-1]], 1)  # what follows padding has no past
        surprisal = surprisal.masked_fill(hidden | after, torch.nan)
    return {"surprisal": surprisal, "entropy": entropy}


def _redrawn(model: Any, seed: int) -> Any:
    """A model of the same kind with weights as it would begin its training."""
    with isolated_seed(seed):
        fresh = type(model)(model.config)
    return fresh.to(next(model.parameters()).dtype).eval()


def _turned(layer: AttentionLayer, seed: int) -> AttentionLayer:
    """The layer with its output map turned by a random rotation of the stream."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(layer.dim, layer.dim, generator=generator, dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(square)
    turn = (orthogonal * upper.diagonal().sign()).to(layer.dtype)  # uniform over the orthogonal group (Mezzadri 2007)
    own = layer.sublayer
    bias = None if own.output_bias is None else turn @ own.output_bias
    turned: Sublayer = own._replace(output=torch.einsum("ij,jhd->ihd", turn, own.output), output_bias=bias)
    return replace(layer, read=lambda: turned)


def _attributes(model: Any, control: Control, seed: int) -> dict[str, Any]:
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total.update(name.encode())
        total.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return {
        "model": str(getattr(model.config, "name_or_path", "") or model.config.model_type),
        "model_type": str(model.config.model_type),
        "weights_sha256": total.hexdigest()[:16],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "control": control,
        "seed": seed,
        **{f"version_{name}": version(name) for name in ("probattn", "torch", "transformers")},
    }
