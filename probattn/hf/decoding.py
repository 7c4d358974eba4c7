r"""Margins along decoding: how near each head came to its boundary at each token, while ``generate`` ran.

The blocks are those of a head alone,

.. math:: J_i = I - c\,\mathrm{Cov}_i(v, k),

at every position of the prompt and at each generated token when it takes its turn as a query. The last token of a
sequence never does. With a cache, J_i is computed from the keys and values that the cache holds, and is the same as in
one pass over the finished sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn.barrier import BarrierKind, MarginKind
from probattn.errors import InputError, require_choice
from probattn.hf.hooks import LayerCall, observe
from probattn.penalty import attention_penalty

__all__ = ["DecodedMargins", "Flag", "MarginMonitor", "head_margins", "visible"]

_PENALTY: dict[MarginKind, BarrierKind] = {
    "determinant": "logdet",
    "spectral": "spectral",
    "singular_value": "singular_value",
}


def head_margins(call: LayerCall, kind: MarginKind, positions: Tensor | None = None) -> Tensor:
    """The margins of the heads in one call of an attention layer.

    Args:
        call: as :func:`~probattn.hf.hooks.observe` shows it.
        kind: "determinant", "spectral" or "singular_value".
        positions: which of the T queries, rising, (P,); None: all.

    Returns:
        (batch, H, P); 1 where a query sees one token or none.

    Raises:
        InputError: heads whose values and keys differ in size.
    """
    if call.value.shape[-1] != call.key.shape[-1]:
        raise InputError(
            f"layer {call.layer} has keys of {call.key.shape[-1]} features and values of {call.value.shape[-1]}: a "
            "head alone has no square block there, and no margin; use a model whose keys and values are of one size."
        )
    require_choice("kind", kind, tuple(_PENALTY))
    with torch.no_grad():
        return attention_penalty(
            call.query,
            call.key,
            call.value,
            kind=_PENALTY[kind],
            scale=call.scale,
            window=call.window,
            mask=call.mask,
            softcap=call.softcap,
            positions=positions,
        ).margins


def visible(call: LayerCall) -> Tensor:
    """True for queries that see any token, (batch, T); padding on the left sees none."""
    if call.mask is None:
        return torch.ones(call.query.shape[0], call.query.shape[2], dtype=torch.bool, device=call.query.device)
    mask = call.mask
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.any(-1).any(1).expand(len(call.query), -1)


class Flag(NamedTuple):
    """One head whose margin fell below the threshold at one generated token."""

    sequence: int
    step: int
    layer: int
    head: int
    margin: float


@dataclass(frozen=True)
class DecodedMargins:
    """The margins of N sequences of one call of ``generate``.

    Attributes:
        prompt: at the T tokens of the prompts, (L, N, H, T).
        steps: at the generated tokens, the last one excepted, (L, N, H, S).
        prompt_valid: False on padding, (N, T); the margins there are 1.
        steps_valid: False where a sequence was over, (N, S).
        layers: the numbers of the L layers.
        kind: which margin.
    """

    prompt: Tensor
    steps: Tensor
    prompt_valid: Tensor
    steps_valid: Tensor
    layers: tuple[int, ...]
    kind: MarginKind

    def flags(self, threshold: float) -> list[Flag]:
        """Generated tokens whose margin is below the threshold (or NaN), by sequence and step."""
        low = ~(self.steps >= threshold) & self.steps_valid[:, None]  # (L, N, H, S)
        found = low.permute(1, 3, 0, 2).nonzero().tolist()
        return [
            Flag(sequence, step, self.layers[layer], head, float(self.steps[layer, sequence, head, step]))
            for sequence, step, layer, head in found
        ]


class _Step(NamedTuple):
    """Observations between two choices of a token.

    Attributes:
        margins: at the new positions, (L, R, H, P) for R rows.
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
        model: a ``PreTrainedModel`` whose architecture uses the attention interface. While the monitor is entered its
            attention is torch's fused one, which is also the default.
        kind: which margin, see :func:`~probattn.barrier.stability_margin`.
        threshold: below which :meth:`flags` reports a step.
        end: tokens that end a sequence; None: those of the model's generation config.

    Raises:
        InputError: an unknown kind, a threshold that is no number; on entering, a model that cannot be observed.

    Example:
        >>> with MarginMonitor(model, threshold=0.1) as monitor:  # doctest: +SKIP
        ...     output = model.generate(ids, logits_processor=[monitor.processor()])
        >>> monitor.record(output).steps.amin((0, 2))  # smallest margin of each token, (N, S)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        kind: MarginKind = "singular_value",
        threshold: float | None = None,
        *,
        end: Sequence[int] | None = None,
    ) -> None:
        require_choice("kind", kind, tuple(_PENALTY))
        if threshold is not None and math.isnan(threshold):
            raise InputError(f"threshold is {threshold}; give a number, or None for no flags.")
        self.kind, self.threshold = kind, threshold
        self._model = model
        self._end = _end_tokens(model) if end is None else list(end)
        self._stop: Callable[[], None] | None = None
        self._start()

    def __enter__(self) -> MarginMonitor:
        if self._stop is not None:
            raise InputError("the monitor is entered already; make another one to nest them.")
        self._stop = observe(self._model, self._see)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stop is not None:
            self._stop()
            self._stop = None

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
            found = step.margins[:, _choose(same), :, 0]  # (L, N, H)
            margins.append(torch.where(going[:, None], found, torch.ones_like(found)))
            valid.append(going)
            over = over | torch.isin(token, torch.tensor(self._end, device=token.device, dtype=token.dtype))
        prompt = first.margins[:, row]
        return DecodedMargins(
            prompt,
            torch.stack(margins, -1) if margins else prompt[..., :0],
            first.valid[row],
            torch.stack(valid, -1) if valid else first.valid[row][:, :0],
            self._layers,
            self.kind,
        )

    def flags(self, sequences: Tensor | None = None) -> list[Flag]:
        """The heads and generated tokens whose margin is below the threshold.

        Args:
            sequences: as in :meth:`record`.

        Raises:
            InputError: the monitor has no threshold, and whatever :meth:`record` raises.
        """
        if self.threshold is None:
            raise InputError("the monitor has no threshold; make it with MarginMonitor(model, threshold=...).")
        return self.record(sequences).flags(self.threshold)

    def _start(self) -> None:
        self._pending: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._steps: list[_Step] = []
        self._layers: tuple[int, ...] = ()
        self._prompts: Tensor | None = None
        self._rows: Tensor | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _see(self, call: LayerCall, output: Tensor) -> Tensor:
        if call.causal:
            length = call.query.shape[2]
            # After the prompt one position is new in each pass; without a cache the others are shown again.
            chosen = torch.arange(length - 1 if self._steps else 0, length, device=call.query.device)
            shown = head_margins(call, self.kind, chosen), visible(call)[:, chosen]
            self._pending.setdefault(call.layer, []).append(shown)
        return output

    def _mark(self, ids: Tensor) -> None:
        """Close a step, with the tokens (R, n) that the next one is to follow."""
        if not self._pending:
            raise InputError(
                "a token is chosen that no pass of the observed model came before; call generate inside "
                "`with monitor:`, on the monitor's model, without an assistant."
            )
        layers = tuple(sorted(self._pending))
        parts = [self._pending[layer] for layer in layers]
        self._pending = {}
        margins = [torch.cat([margin for margin, _ in part], -1).to(ids.device) for part in parts]  # L of (R, H, P)
        valid = torch.cat([shown for _, shown in parts[0]], -1).to(ids.device)  # (R, P)
        rows, heads, _ = margins[0].shape
        expected = 1 if self._steps else ids.shape[1]
        for layer, part in zip(layers, margins, strict=True):
            if part.shape != (len(ids), heads, expected):
                raise InputError(
                    f"layer {layer} shows {part.shape[0]} rows, {part.shape[1]} heads and {part.shape[2]} new "
                    f"positions, not {len(ids)}, {heads} and {expected}; assisted decoding, guidance, prompts of "
                    "embeddings, a cache that is filled already and layers of unequal heads are not followed."
                )
        if self._rows is None:
            self._prompts, parent = ids, torch.arange(rows, device=ids.device)
        else:
            parent = _parents(ids, self._rows)
        self._layers, self._rows = layers, ids
        self._steps.append(_Step(torch.stack(margins), valid, parent, ids[:, -1]))


class _Boundary:
    """Called by ``generate`` before each choice of a token."""

    def __init__(self, mark: Callable[[Tensor], None]) -> None:
        self._mark = mark

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._mark(input_ids)
        return scores


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
