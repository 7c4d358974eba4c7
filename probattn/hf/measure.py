"""All quantities of one layer at some positions, in chunks of bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probattn.hf.controls import Control
from probattn.hf.layers import AttentionLayer
from probattn.hf.layers.past import average
from probattn.hf.layers.sublayer import project
from probattn.hf.spectra import Kind, Map, Spectra, block_margins

__all__ = ["Request", "halved", "measure_layer"]

_LOG = logging.getLogger(__name__)
_CPU_BYTES = 1 << 26  # of the matrices of a chunk: what a processor's cache nearly holds
_GPU_BYTES = 1 << 32
_LOGITS = 1 << 20  # logits that exist at a time
_FACTORS = 8  # chunks of matrices for which factors are made together


class Request(NamedTuple):
    """Quantities to measure at each position.

    Attributes:
        kinds: quantities.
        maps: "generator" and "update".
        attribution: whether to add the heads' contributions.
        dtype: float32 or float64.
        control: name of the control.
        seed: random seed of the control.
        memory: bytes for the matrices of a chunk; None: what suits the device.
        rank: directions of each head's covariance that an estimate of log|det| keeps; None: exact.
    """

    kinds: Sequence[Kind]
    maps: Sequence[Map]
    attribution: bool
    dtype: torch.dtype
    control: Control
    seed: int
    memory: int | None
    rank: int | None = None


def measure_layer(
    layer: AttentionLayer, u: Tensor, rows: Tensor, request: Request, counts: dict[str, int]
) -> dict[str, Tensor]:
    """Measure one layer at some positions.

    Args:
        layer: the layer, with the positions and the mask of the text.
        u: streams, ``(B, T, p)``.
        rows: positions, ``(P,)``, increasing.
        request: quantities, maps and memory.
        counts: numbers left to dense matrices by quantity, added to in place.

    Returns:
        By name, ``(B, P)`` each, and "attribution", ``(B, P, H)``.
    """
    step = _chunk(layer, u, request)
    together = min(_FACTORS * step, max(step, _LOGITS // (layer.heads * u.shape[1])))
    start: dict[Map, Tensor] = {}

    def measure(sequence: int, part: Tensor) -> dict[str, Tensor]:
        one = _sequence_of(layer, sequence)
        factors = one.mean_and_factors(u[sequence], part).factors
        pieces: list[Spectra] = []
        for index in torch.arange(len(part), device=u.device).split(step):
            found = block_margins(
                factors.of_tokens(index),
                request.kinds,
                request.maps,
                attribution=request.attribution,
                start=start,
                rank=request.rank,
            )
            start.update(found.start)
            pieces.append(found)
        for name in pieces[0].dense:
            counts[name] = counts.get(name, 0) + sum(piece.dense[name] for piece in pieces)
        return {name: torch.cat([piece.values[name] for piece in pieces]) for name in pieces[0].values}

    sequences = []
    for sequence in range(len(u)):
        parts = [halved(measure, sequence, part) for part in rows.split(together)]
        sequences.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    result = {name: torch.stack([one[name] for one in sequences]) for name in sequences[0]}
    result["rms"] = u[:, rows].square().mean(-1).sqrt()
    result["sink"] = _sink(layer, u, rows)
    return result


def halved(measure: Callable[[int, Tensor], dict[str, Tensor]], sequence: int, part: Tensor) -> dict[str, Tensor]:
    """Measure positions together, or in halves where the device has no memory for all of them.

    Args:
        measure: a function of a sequence's number and its positions.
        sequence: that number.
        part: the positions, ``(P,)``.

    Raises:
        torch.OutOfMemoryError: one position alone does not fit.
    """
    try:
        return measure(sequence, part)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error) or len(part) == 1:
            raise
    # Outside of the except clause, so that nothing of the failed attempt is kept alive by its traceback.
    if part.device.type == "cuda":
        torch.cuda.empty_cache()
    _LOG.info("out of memory with %d tokens together; going on with half of them", len(part))
    found = [halved(measure, sequence, half) for half in part.chunk(2)]
    return {name: torch.cat([piece[name] for piece in found]) for name in found[0]}


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)


def _sequence_of(layer: AttentionLayer, number: int) -> AttentionLayer:
    """The layer as it sees one sequence of a batch."""
    if layer.positions is not None:
        layer = layer.at(layer.positions[number])
    return layer if layer.visible is None else layer.seeing(layer.visible[number])


def _chunk(layer: AttentionLayer, u: Tensor, request: Request) -> int:
    """Number of tokens whose matrices fit into the memory that is allowed."""
    memory = request.memory
    if memory is None and u.device.type == "cuda":
        memory = min(_GPU_BYTES, torch.cuda.mem_get_info(u.device)[0] // 4)
    memory = memory or _CPU_BYTES
    sublayer = layer.sublayer
    size, dim = sublayer.heads * sublayer.output.shape[2], sublayer.dim
    # The core and its factorisation; covariances; the basis of a Krylov space.
    numbers = 2.5 * max(size, dim) ** 2 + 4 * size * sublayer.query.weight.shape[1] + 100 * dim
    return max(1, int(memory / (numbers * u.element_size())))


def _sink(layer: AttentionLayer, u: Tensor, rows: Tensor) -> Tensor:
    """Attention of tokens to the first one, mean over heads, ``(B, P)``."""
    sublayer, length = layer.sublayer, u.shape[1]
    positions = layer.positions
    positions = torch.arange(length, device=u.device).unsqueeze(0) if positions is None else positions.to(u.device)
    tokens = project(sublayer, u, positions)
    first = torch.zeros_like(tokens.value[..., :1])  # a value that is one for the first token: its mean is the weight
    first[:, :, 0] = 1.0
    mask = None if layer.visible is None else layer.visible.unsqueeze(1)
    tokens = tokens._replace(value=first)
    step = max(1, _LOGITS // (len(u) * sublayer.heads * length))
    found = [average(sublayer, tokens, part, mask)[..., 0].mean(-1) for part in rows.split(step)]
    return torch.cat(found, 1)
