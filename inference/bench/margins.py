"""Margins of SmolLM2-135M in units of its own forward pass, against automatic differentiation, and their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.gguf import load_gguf
from probattn.hf.layers import attention_layer
from probattn.hf.margins import margins
from probattn.hf.spectra import Kind, block_margins
from probattn.hf.streams import residual_streams
from probattn.inference.bench.harness import Row, Timing, race
from probattn.inference.bench.memory import growth_of_memory, peak_of

__all__ = ["against_forward", "against_jacrev", "language_model", "margin_memory", "margin_peak"]

_LENGTH = 512
_LAYERS = (4, 25)  # measured; the rows speak of all, by their number
_SHARE = 0.05
_RANK = 8  # of the estimate: an error of 0.6 % of the spread of log|det|, see probattn.hf.layers.low_rank
_WITH_EIGENVALUES: tuple[Kind, ...] = ("logabsdet", "sigma_min", "spectral", "complex")
_WITHOUT: tuple[Kind, ...] = ("logabsdet", "sigma_min")
_AUTOGRAD = 30.0  # goal: times faster than torch.func.jacrev of a layer
_LENGTHS = (1024, 2048, 4096)
_AT = (100, 300)  # positions at which the dense Jacobian is formed


def language_model(device: torch.device, length: int = _LENGTH) -> tuple[Any, Tensor]:
    """Load SmolLM2-135M-Instruct and a text of the Python language reference.

    Args:
        device: device of the model.
        length: number of tokens T.

    Returns:
        The model and token ids, ``(1, T)``.

    Raises:
        InputError: the model is not installed; the message says how to get it.
    """
    from pydoc_data.topics import topics

    loaded = load_gguf()
    text = "\n".join(list(topics.values())[:20])
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"][:length]])
    return loaded.model.to(device), ids.to(device)


def against_forward(
    device: torch.device, rounds: int, *, model: Any = None, ids: Tensor | None = None, layers: Sequence[int] = _LAYERS
) -> list[Row]:
    """Race the margins of every token against a forward pass, and those of a share of the tokens.

    Args:
        device: device to measure on.
        rounds: rounds of the race; one is taken, as it lasts minutes.
        model: a causal model; None: SmolLM2-135M.
        ids: token ids, ``(1, T)``, that belong to it.
        layers: layers to measure, from which the rows extrapolate to all.

    Returns:
        Four rows; one that says why where the model is missing.
    """
    name = "log|det| and sigma_min"
    if model is None or ids is None:
        try:
            model, ids = language_model(device)
        except InputError as error:
            return [Row(f"{name} of SmolLM2", "a forward pass", None, faster=False, notes={"not measured": str(error)})]
    count = int(model.config.num_hidden_layers)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids, use_cache=False)

    def measured(kinds: tuple[Kind, ...], **options: Any) -> None:
        margins(model, ids, kinds, maps=("generator",), **options)

    seconds = race(
        {
            "forward": forward,
            "exact": lambda: measured(_WITHOUT, layers=layers),
            "eigenvalues": lambda: measured(_WITH_EIGENVALUES, layers=layers),
            "estimate": lambda: measured(("logabsdet",), layers=layers, rank=_RANK),
            "share": lambda: measured(_WITHOUT, positions=_SHARE),
        },
        rounds=min(rounds, 1),
        budget=240.0,
    )
    least = seconds["forward"].least

    def whole(timing: Timing) -> float:
        """Cost of all layers in forward passes: one pass for the streams, and the layers by their number."""
        return 1 + max(timing.least - least, 0.0) * count / len(layers) / least

    size = f"T = {ids.shape[1]}, every token and layer"
    notes = {
        "extrapolated": f"from layers {', '.join(map(str, layers))} to all {count}",
        "map": "generator; the update map takes the same again, but for eigenvalues, which come with it",
    }
    parts = (
        ("exact", f"{name}, {size}", 45.0),
        ("eigenvalues", f"all four margins, {size}", 80.0),
        ("estimate", f"estimate of log|det| of rank {_RANK}, {size}", 15.0),
    )
    rows = [
        Row(
            work,
            "a forward pass",
            whole(seconds[key]),
            faster=False,
            goal=goal,
            seconds={"forward": seconds["forward"], key: seconds[key]},
            notes=notes,
        )
        for key, work, goal in parts
    ]
    share = Row(
        f"{name}, {_SHARE:.0%} of the tokens, every layer",
        "a forward pass",
        seconds["share"].least / least,
        faster=False,
        goal=4.0,
        seconds={"forward": seconds["forward"], "share": seconds["share"]},
    )
    return [*rows, share]


def against_jacrev(
    device: torch.device, rounds: int, *, model: Any = None, ids: Tensor | None = None, at: Sequence[int] = _AT
) -> list[Row]:
    """Race log|det| of one layer against ``torch.func.jacrev`` of the layer in a token and ``slogdet``.

    Args:
        device: device to measure on.
        rounds: rounds of the race; two at most are taken.
        model: a causal model; None: SmolLM2-135M.
        ids: token ids, ``(1, T)``, that belong to it.
        at: positions at which the Jacobian is formed; the row is about one position.

    Returns:
        One row.
    """
    work, other = "log|det| of a layer, per token", "torch.func.jacrev of the layer and slogdet"
    if model is None or ids is None:
        try:
            model, ids = language_model(device)
        except InputError as error:
            return [Row(work, other, None, faster=False, notes={"not measured": str(error)})]
    number = int(model.config.num_hidden_layers) // 2
    layer = attention_layer(model, number).detach()
    u = residual_streams(model, ids)[0][number][0].to(layer.like)
    rows = torch.arange(len(u), device=u.device)

    @torch.no_grad()
    def exact() -> None:
        factors = layer.mean_and_factors(u, rows[:64]).factors
        for part in torch.arange(64, device=u.device).split(16):
            block_margins(factors.of_tokens(part), ("logabsdet",), ("generator",))

    def dense() -> None:
        for position in at:
            before, token = u[:position], u[position]

            def residual(x: Tensor, before: Tensor = before) -> Tensor:
                return layer.residual(torch.cat([before, x.unsqueeze(0)]))[-1]

            torch.linalg.slogdet(torch.func.jacrev(residual, chunk_size=64)(token))

    seconds = race({"exact": exact, "jacrev": dense}, rounds=min(rounds, 2), budget=60.0)
    ratio = (seconds["jacrev"].least / len(at)) / (seconds["exact"].least / 64)
    notes = {"measured": f"the Jacobian at positions {', '.join(map(str, at))}, log|det| of 64 tokens together"}
    return [Row(work, other, ratio, faster=True, goal=_AUTOGRAD, seconds=seconds, notes=notes)]


def margin_memory(lengths: Sequence[int] = _LENGTHS) -> list[Row]:
    """Measure the peak memory of all margins of a small model as T doubles.

    Args:
        lengths: lengths T, each twice the one before.

    Returns:
        One row, with the largest growth from one length to the next: 2 if memory is linear.
    """
    return [growth_of_memory(margin_peak, lengths, "margins of every token", "two layers of p = 64")]


def margin_peak(length: int) -> int:
    """Measure the bytes that the margins of a text take at their peak, beyond what the process held (Linux only).

    Args:
        length: length T of the text.

    Returns:
        Bytes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    ids = torch.randint(64, (1, length))
    kinds: tuple[Kind, ...] = ("logabsdet", "sigma_min")
    margins(model, ids[:, :32], kinds)  # libraries
    return peak_of(lambda: margins(model, ids, kinds, memory=1 << 22))
