r"""Margins along decoding: distance of each new token from the boundary, in each layer, while ``generate`` runs.

The blocks are those of the residual stream,

.. math:: J_i = I - \partial \mu_i / \partial u_i ,

at each generated token when it takes its turn as a query, and at the prompt if asked for. The last token of a sequence
never does. Keys and values of the past are kept here, beside those of the model's cache, so that J_i is that of one
pass over the finished sequence, whatever cache the model has, or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from probattn import blocks
from probattn.barrier import MarginKind
from probattn.errors import InputError, require_choice
from probattn.hf.discovery import residual_layers
from probattn.hf.layers import AttentionLayer, LayerContext
from probattn.hf.stream import Arguments, sees_any

__all__ = ["DecodedMargins", "Flag", "MarginMonitor"]


class Flag(NamedTuple):
    """One layer whose margin fell below the threshold at one generated token."""

    sequence: int
    step: int
    layer: int
    margin: float


@dataclass(frozen=True)
class DecodedMargins:
    """The margins of N sequences of one call of ``generate``.

    Attributes:
        prompt: at the T tokens of the prompts, (L, N, T); None if they were not asked for.
        steps: at the generated tokens, the last one excepted, (L, N, S).
        prompt_valid: False on padding, (N, T); the margins there are 1.
        steps_valid: False where a sequence was over, (N, S); the margins there are 1.
        layers: the numbers of the L layers.
        kind: which margin.
    """

    prompt: Tensor | None
    steps: Tensor
    prompt_valid: Tensor
    steps_valid: Tensor
    layers: tuple[int, ...]
    kind: MarginKind

    def flags(self, threshold: float) -> list[Flag]:
        """Generated tokens whose margin is below the threshold (or NaN), by sequence and step."""
        low = ~(self.steps >= threshold) & self.steps_valid  # (L, N, S)
        found = low.permute(1, 2, 0).nonzero().tolist()
        return [
            Flag(sequence, step, self.layers[layer], float(self.steps[layer, sequence, step]))
            for sequence, step, layer in found
        ]


class _Step(NamedTuple):
    """Observations between two choices of a token.

    Attributes:
        margins: at the new positions, (L, R, P) for R rows.
        valid: (R, P).
        parent: the row of the step before that each row continues, (R,).
        token: the last token of each row, (R,).
    """

    margins: Tensor
    valid: Tensor
    parent: Tensor
    token: Tensor


class MarginMonitor:
    """Records margins while a model generates; the tokens that it generates stay the same.

    Greedy decoding, sampling and beam search are followed, with or without a cache (dynamic, sliding or static), in
    batches padded on the left, with chunked prompts. Not assisted decoding, guidance, or a cache that is already filled
    when ``generate`` is called.

    Args:
        model: a model of ``transformers`` whose layers :func:`~probattn.hf.layers.attention_layer` covers.
        kind: which margin, see :func:`~probattn.barrier.stability_margin`. "determinant" costs one factorisation per
            layer and token, the others a decomposition.
        threshold: below which :meth:`flags` reports a step.
        layers: numbers of the layers to watch; None: all.
        prompt: True to record the tokens of the prompt too, at a block for each.
        end: tokens that end a sequence; None: those of the model's generation config.

    Raises:
        InputError: an unknown kind, a threshold that is no number, a layer that is not there; on entering, a model that
            is not covered.

    Example:
        >>> with MarginMonitor(model, threshold=0.1) as monitor:  # doctest: +SKIP
        ...     output = model.generate(ids, logits_processor=[monitor.processor()])
        >>> monitor.record(output).steps.amin(0)  # smallest margin of each token, (N, S)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        kind: MarginKind = "singular_value",
        threshold: float | None = None,
        *,
        layers: Sequence[int] | None = None,
        prompt: bool = False,
        end: Sequence[int] | None = None,
    ) -> None:
        require_choice("kind", kind, get_args(MarginKind))
        if threshold is not None and math.isnan(threshold):
            raise InputError(f"threshold is {threshold}; give a number, or None for no flags.")
        self.kind, self.threshold, self.prompt = kind, threshold, prompt
        self._model = model
        self._wanted = None if layers is None else sorted(set(layers))
        self._end = _end_tokens(model) if end is None else list(end)
        self._hooks: list[Any] = []
        self._attentions: dict[int, AttentionLayer] = {}
        self._start()

    def __enter__(self) -> MarginMonitor:
        if self._hooks:
            raise InputError("the monitor is entered already; make another one to nest them.")
        found = residual_layers(self._model)
        known = [one.site.number for one in found]
        wanted = known if self._wanted is None else self._wanted
        if not set(wanted) <= set(known) or not wanted:
            raise InputError(f"layers is {wanted}; the model has {known[0]} to {known[-1]}.")
        # Here and not about the method: naming the compiler imports it, a second that most who import this never need.
        opaque = torch.compiler.disable(self._see)
        for one in found:
            if one.site.number in wanted:
                self._attentions[one.site.number] = one.layer.detach()
                see = partial(opaque, one.site.number, Arguments(one.site.block))
                self._hooks.append(one.site.block.register_forward_pre_hook(see, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def processor(self) -> Callable[[Tensor, Tensor], Tensor]:
        """A logits processor that tells the monitor where a step ends; one for each call of ``generate``.

        Whatever was recorded before is forgotten. The scores pass unchanged.
        """
        self._start()
        return _Boundary(self._mark)

    def record(self, sequences: Tensor | None = None) -> DecodedMargins:
        """The margins of the sequences that ``generate`` returned.

        Args:
            sequences: what it returned, (N, length): needed after beam search, which drops and reorders its rows. Two
                prompts of a batch with the same tokens and different padding are one to a beam search's record. None:
                the rows as they were when the last token was chosen.

        Returns:
            :class:`DecodedMargins`.

        Raises:
            InputError: nothing was recorded, or sequences that do not continue the prompts that were.
        """
        if not self._steps:
            raise InputError(
                "no step was recorded; inside `with monitor:` call generate(logits_processor=[monitor.processor()])."
            )
        assert self._prompts is not None
        assert self._rows is not None
        sequences = self._rows if sequences is None else sequences.to(self._rows.device)
        length = self._prompts.shape[1]
        if sequences.dim() != 2 or sequences.shape[1] < length:
            raise InputError(f"sequences have shape {tuple(sequences.shape)}; they must be (N, {length} or more).")
        same = (sequences[:, None, :length] == self._prompts).all(-1)  # (N, R)
        if not bool(same.any(1).all()):
            number = int((~same.any(1)).nonzero()[0])
            raise InputError(f"sequences[{number}] does not begin with a prompt of this call; give what it returned.")
        first, *later = self._steps
        row = _choose(same)
        margins, valid = [], []
        over = torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)
        for step, token in zip(later, sequences[:, length:].unbind(1), strict=False):
            same = same[:, step.parent] & (step.token == token[:, None])
            going = same.any(1) & ~over
            found = step.margins[:, _choose(same), 0]  # (L, N)
            margins.append(torch.where(going, found, torch.ones_like(found)))
            valid.append(going)
            over = over | torch.isin(token, torch.tensor(self._end, device=token.device, dtype=token.dtype))
        return DecodedMargins(
            first.margins[:, row] if self.prompt else None,
            torch.stack(margins, -1) if margins else first.margins[:, row, :0],
            first.valid[row],
            torch.stack(valid, -1) if valid else first.valid[row][:, :0],
            self._layers,
            self.kind,
        )

    def flags(self, sequences: Tensor | None = None) -> list[Flag]:
        """The layers and generated tokens whose margin is below the threshold.

        Args:
            sequences: as in :meth:`record`.

        Raises:
            InputError: the monitor has no threshold, and whatever :meth:`record` raises.
        """
        if self.threshold is None:
            raise InputError("the monitor has no threshold; make it with MarginMonitor(model, threshold=...).")
        return self.record(sequences).flags(self.threshold)

    def _start(self) -> None:
        self._pending: dict[int, list[Tensor]] = {}  # streams by layer, (R, t, p) each
        self._valid: list[Tensor] = []  # (R, t) each
        self._contexts: dict[int, list[LayerContext]] = {}  # by layer, one for each row
        self._steps: list[_Step] = []
        self._layers: tuple[int, ...] = ()
        self._prompts: Tensor | None = None
        self._rows: Tensor | None = None

    def _see(
        self, number: int, names: Arguments, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        u = names.first(args, kwargs).detach()
        if number == min(self._attentions):
            self._valid.append(sees_any(names.bind(args, kwargs).get("attention_mask"), u))
        self._pending.setdefault(number, []).append(u)

    @torch.no_grad()
    def _mark(self, ids: Tensor) -> None:
        """Close a step, with the tokens (R, n) that the next one is to follow."""
        if not self._pending:
            raise InputError(
                "a token is chosen that no pass of the observed model came before; call generate inside "
                "`with monitor:`, on the monitor's model, without an assistant."
            )
        streams = {number: torch.cat(parts, 1) for number, parts in sorted(self._pending.items())}
        valid = torch.cat(self._valid, 1)
        self._pending, self._valid = {}, []
        if self._steps and valid.shape[1] == ids.shape[1]:  # no cache: what is known is shown again
            streams = {number: u[:, -1:] for number, u in streams.items()}
            valid = valid[:, -1:]
        expected = (len(ids), 1 if self._steps else ids.shape[1])
        for number, u in streams.items():
            if u.shape[:2] != expected or valid.shape != expected:
                raise InputError(
                    f"layer {number} shows {u.shape[0]} rows and {u.shape[1]} new positions, not {expected[0]} and "
                    f"{expected[1]}; assisted decoding, guidance, prompts of embeddings, a cache that is filled "
                    "already and layers that run twice are not followed."
                )
        if self._rows is None:
            self._prompts, parent = ids, torch.arange(len(ids), device=ids.device)
            found = [self._read_prompt(number, u, valid) for number, u in streams.items()]
        else:
            parent = _parents(ids, self._rows)
            found = [self._read_token(number, u[:, 0], parent) for number, u in streams.items()]
        self._layers, self._rows = tuple(streams), ids
        self._steps.append(_Step(torch.stack(found).to(ids.device), valid.to(ids.device), parent, ids[:, -1]))

    def _read_prompt(self, number: int, streams: Tensor, valid: Tensor) -> Tensor:
        """Contexts of the prompts, each without its padding, and their margins, (R, T)."""
        attention = self._attentions[number]
        margins = torch.ones(valid.shape, dtype=attention.dtype, device=streams.device)
        self._contexts[number] = []
        for row, (u, kept) in enumerate(zip(streams.to(attention.dtype), valid, strict=True)):
            tokens = u[kept]  # (n, p)
            self._contexts[number].append(attention.context(tokens))
            if self.prompt and len(tokens):
                margins[row, kept] = torch.cat(
                    [
                        _margin(attention.mean_jacobian(tokens, part), self.kind)
                        for part in torch.arange(len(tokens), device=u.device).split(16)
                    ]
                )
        return margins

    def _read_token(self, number: int, streams: Tensor, parent: Tensor) -> Tensor:
        """Margins of one new token per row, (R, 1); the contexts then hold it."""
        attention, before = self._attentions[number], self._contexts[number]
        margins, after = [], []
        for u, row in zip(streams.to(attention.dtype), parent.tolist(), strict=True):
            block = before[row].mean_and_jacobian(u)[1]
            identity = torch.eye(len(block), dtype=block.dtype, device=block.device)
            margins.append(_margin(identity - block, self.kind))
            after.append(before[row].extend(u))
        self._contexts[number] = after
        return torch.stack(margins).unsqueeze(1)


class _Boundary:
    """Called by ``generate`` before each choice of a token."""

    def __init__(self, mark: Callable[[Tensor], None]) -> None:
        self._mark = mark

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._mark(input_ids)
        return scores


def _margin(change: Tensor, kind: MarginKind) -> Tensor:
    """Margins of the blocks I - M, from M, ``(*tokens, p, p)``."""
    if kind == "determinant":
        sign, logabs = blocks.logabsdet_one_minus(change)
        return sign * logabs.exp()
    if kind == "singular_value":
        return blocks.smallest_singular_value_one_minus(change)
    largest = blocks.largest_real_eigenvalue if kind == "spectral" else blocks.spectral_abscissa
    return 1 - largest(change, change.shape[-1])


def _parents(ids: Tensor, before: Tensor) -> Tensor:
    """Row of the step before that each row continues, (R,)."""
    known = ids[:, :-1]
    if torch.equal(known, before):
        return torch.arange(len(ids), device=ids.device)
    same = (known[:, None] == before).all(-1) if known.shape[1] == before.shape[1] else known.new_zeros(len(ids), 1)
    if not bool(same.any(1).all()):
        raise InputError(
            "the tokens do not continue those of the step before; make a new monitor.processor() for each generate."
        )
    return _choose(same)


def _choose(same: Tensor) -> Tensor:
    """A column that is True in each row, the row's own where possible, (N,); from (N, R)."""
    first = same.int().argmax(1)
    if same.shape[0] != same.shape[1]:
        return first
    return torch.where(same.diagonal(), torch.arange(len(same), device=same.device), first)


def _end_tokens(model: Any) -> list[int]:
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        return []
    return [int(token) for token in found] if isinstance(found, (list, tuple)) else [int(found)]
