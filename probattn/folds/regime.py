"""Regime of a sequence, with the evidence: certified, regular or folded."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from probattn import blocks
from probattn.attention import CausalAttention
from probattn.errors import require_finite
from probattn.folds.line import largest_sensitivity
from probattn.folds.search import find_fold
from probattn.interface import Attention
from probattn.solve.bound import contraction_bound, memory_bound, projection_slack
from probattn.solve.context import Context

__all__ = ["Regime", "regime"]

_LOG = logging.getLogger(__name__)
_STARTS, _STEPS = 64, 60  # of the search after one past
_QUICK = 16_384  # points of the search for a witness where an eigenvalue was seen
_PATIENCE = 1.0  # seconds of searching without a word


@dataclass(frozen=True)
class Regime:
    """Regime of a sequence: is its density a density?

    Attributes:
        name: "certified" (u_i -> e_i is one-to-one at every position, for every u_i: the density is exact), "regular"
            (no fold seen: det J_i > 0 and spectral margin > 0 wherever evaluated, which proves nothing elsewhere) or
            "folded".
        evidence: the numbers behind the name, in words.
        proved: whether the name is proved. False for "regular", and for "folded" where only a negative eigenvalue with
            det J_i > 0 was seen, or a negative determinant under the inclusive mask.
        position: where the evidence is, None for "certified".
        witness: a token u, (p,), with det J(u) < 0 after the tokens before ``position``, where one is known.
    """

    name: Literal["certified", "regular", "folded"]
    evidence: str
    proved: bool
    position: int | None = None
    witness: Tensor | None = None

    def __str__(self) -> str:
        return self.name


def regime(
    attention: Attention, u: Tensor, *, search: bool = False, budget: int = 16_384
) -> Regime | list[Regime] | list[list[Regime]]:
    """Name the regime of a sequence.

    In one dimension under the strict mask the answer is exact up to rounding: the supremum of the sensitivity over
    every next token is enclosed at each position. With a memory radius a contraction below one certifies every past of
    every length, from the parameters alone. In several dimensions the contraction bound certifies, the sequence's
    own blocks are looked at, and with ``search`` tokens with det J < 0 are sought after each past. A search of more
    than a second says so once, as a warning of the logger ``probattn.folds.regime``, and then counts its pasts at level
    INFO.

    Args:
        attention: the attention.
        u: one sequence (T, p) or a batch, finite.
        search: whether to seek folds beyond the tokens of the sequence, see :func:`probattn.folds.search.find_fold`;
            where none is found, the evidence says within which budget.
        budget: largest number of points that the search visits, for each sequence, but at least 240, which are four
            starts after one past; the longest pasts come first. The time grows with it.

    Returns:
        A :class:`Regime`; for a batch a list of them, nested as the batch axes are. ``str()`` gives the name.

    Raises:
        InputError: shapes that do not fit, or u not finite.

    Example:
        >>> past = torch.tensor([[-1.0], [1.0], [0.0]])
        >>> [str(regime(CausalAttention.from_qk_matrix(torch.tensor([[a]])), past)) for a in (0.9, 1.5)]
        ['certified', 'folded']
    """
    require_finite("u", u)
    attention, u = attention.detach(), u.detach()
    core = attention.core(u)
    require_finite("J", core)
    sign, logabs = blocks.logabsdet_one_minus(core)
    spectral = 1 - blocks.largest_real_eigenvalue(core, attention.dim)
    # A batched start does not enter the blocks, but it makes a batch of processes all the same.
    batch = torch.broadcast_shapes(attention.batch_shape, u.shape[:-2])
    parts = (contraction_bound(attention, u), sign, logabs, spectral)
    expanded = [part.expand(*batch, u.shape[-2]) for part in parts]
    whole = attention.expand(batch) if attention.batch_shape else attention
    return _nested(whole, u.expand(*batch, *u.shape[-2:]), expanded, budget if search else 0, _Watch())


class _Watch:
    """Says once that the search takes long, and from then on how far it is."""

    def __init__(self) -> None:
        self._start, self._told = time.monotonic(), False

    def look(self, done: int, most: int) -> None:
        """Say something if it is time to: ``done`` of at most ``most`` pasts have been searched."""
        if not self._told and time.monotonic() - self._start > _PATIENCE:
            self._told = True
            _LOG.warning(
                "searching for folds, %d of at most %d pasts so far; a smaller budget ends it sooner", done, most
            )
        elif self._told:
            _LOG.info("search for folds: %d of %d pasts", done, most, extra={"step": done, "total": most})


def _nested(
    attention: Attention, u: Tensor, parts: list[Tensor], budget: int, watch: _Watch
) -> Regime | list[Regime] | list[list[Regime]]:
    if u.dim() == 2:
        return _classify(attention, u, *parts, budget=budget, watch=watch)
    rows = []
    for k in range(len(u)):
        one = attention.select(k) if isinstance(attention, CausalAttention) and attention.batch_shape else attention
        rows.append(_nested(one, u[k], [part[k] for part in parts], budget, watch))
    return rows  # type: ignore[return-value]


def _classify(
    attention: Attention,
    u: Tensor,
    bound: Tensor,
    sign: Tensor,
    logabs: Tensor,
    spectral: Tensor,
    *,
    budget: int,
    watch: _Watch,
) -> Regime:
    # Signs and logarithms, not determinants: those of large blocks overflow.
    position = int(torch.where(sign < 0, -torch.inf, logabs).argmin())
    smallest = f"smallest det J = {_number(sign[position], logabs[position])} at position {position}"
    strict = attention.mask == "strict"
    if float(sign[position]) < 0:
        if strict:
            seen = f"{smallest}: negative, so some noise has several solutions"
            return Regime("folded", seen, True, position, u[position])
        why = "which proves no fold under the inclusive mask, where u - mu(u) need not have degree one"
        return Regime("folded", f"{smallest}: negative, {why}; a fold is suspected, not proved", False, position)
    if isinstance(attention, CausalAttention) and float(memory_bound(attention)) < 1:
        kappa = f"contraction {float(attention.contraction):.6g} < 1 for every past of every length"
        return Regime("certified", f"{kappa}, proved from the parameters alone", True)
    largest = float(bound.max())
    if largest < 1:
        return Regime("certified", f"contraction bound {largest:.6g} < 1 at every position and for every token", True)
    if strict and attention.dim == 1 and isinstance(attention, CausalAttention):
        found = _on_a_line(attention, u)
        if found is not None:
            return found
    lowest = int(spectral.argmin())
    if float(spectral[lowest]) <= 0:
        there = f"at position {lowest}, where det J = {_number(sign[lowest], logabs[lowest])}"
        seen = f"spectral margin {float(spectral[lowest]):.6g} {there}: a real eigenvalue of J is not positive"
        return _searched(attention, u, budget or _QUICK, watch)[0] or Regime(
            "folded", f"{seen}; a fold is suspected, not proved", False, lowest
        )
    sought = ""
    if budget and strict and isinstance(attention, CausalAttention):
        found, pasts, points = _searched(attention, u, budget, watch)
        if found is not None:
            return found
        sought = f"; no fold found at {points:,} points after {pasts} of {max(0, len(u) - 2)} pasts, the budget"
    margin = f"smallest spectral margin {float(spectral[lowest]):.6g} at position {lowest}"
    seen = f"{smallest}, {margin}; contraction bound {largest:.6g} does not certify{sought}"
    return Regime("regular", seen, False, position)


def _on_a_line(attention: CausalAttention, u: Tensor) -> Regime | None:
    """The exact answer in one dimension, None where it is within rounding of the boundary."""
    wide = attention.to(torch.float64)
    slack = sum(float(part.sum()) for part in projection_slack(wide)) * float(wide.remember(u.double()).abs().max())
    highest, undecided = 0.0, False
    past = Context.of(wide, u[:1].double())
    for i in range(2, len(u)):
        past = past.extend(u[i - 1].double())
        bracket = largest_sensitivity(past)
        # What rounding of the projected past may change, relative to its spread.
        spread = float(torch.stack(past.diameters).clamp(min=1e-300).amin())
        rounding = min(1.0, 1e-12 + slack / spread) if bracket.upper > 0 else 0.0
        if bracket.lower > 1 + rounding:
            witness = torch.tensor([bracket.at], dtype=u.dtype, device=u.device)
            where = f"at u = {bracket.at:.6g} after {i} tokens"
            seen = f"det J = {1 - bracket.lower:.6g} < 0 {where}: several solutions for some noise"
            return Regime("folded", seen, True, i, witness)
        undecided = undecided or bracket.upper * (1 + rounding) >= 1
        highest = max(highest, bracket.upper)
    if undecided:
        return None
    seen = f"1 - det J is at most {highest:.6g} < 1 for every next token at every position (enclosed, one dimension)"
    return Regime("certified", seen, True)


def _searched(attention: Attention, u: Tensor, budget: int, watch: _Watch) -> tuple[Regime | None, int, int]:
    """A witness after one of the pasts, the longest first, or None; the numbers of pasts and of points searched."""
    if attention.mask != "strict" or not isinstance(attention, CausalAttention):
        return None, 0, 0
    whole, lengths = Context.of(attention, u), range(len(u) - 1, 1, -1)
    # As many starts for each past as the budget has, and fewer pasts rather than fewer than four starts.
    starts = min(_STARTS, max(4, budget // (_STEPS * max(1, len(lengths)))))
    affordable = max(1, budget // (_STEPS * starts))
    for done, i in enumerate(lengths[:affordable], start=1):
        witness = find_fold(whole.first(i), starts=starts, steps=_STEPS)
        if witness is not None:
            at = ", ".join(f"{float(x):.4g}" for x in witness)
            seen = f"det J < 0 at u = ({at}) after {i} tokens, found by search"
            return Regime("folded", seen, True, i, witness), done, done * starts * _STEPS
        watch.look(done, min(affordable, len(lengths)))
    searched = min(affordable, len(lengths))
    return None, searched, searched * starts * _STEPS


def _number(sign: Tensor, logabs: Tensor) -> str:
    """A determinant in words, also where it overflows."""
    value = float(sign) * math.exp(float(logabs)) if float(logabs) < 700 else math.inf
    return f"{value:.6g}" if math.isfinite(value) else f"{'-' if float(sign) < 0 else ''}exp({float(logabs):.6g})"
