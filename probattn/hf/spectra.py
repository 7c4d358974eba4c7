r"""Margins of the blocks at some tokens of a layer, exact and fast: one factorisation of the core for several uses.

With :math:`M = O' (B N')`, the core :math:`K = B N' O'` and its LU,

.. math::
    \det(I - M) = \det(I - K), \qquad (I - M)^{-1} = I + O' (I - K)^{-1} B N' ,

the second by Woodbury, so that block Lanczos on :math:`J^{-1} J^{-T}` for the smallest singular value costs products
with the factors and triangular solutions; and eigenvalues come from Arnoldi's method with products
:math:`M x = O' (B N' x)` alone (:mod:`probattn.numerics.krylov`). What these do not decide with certainty is decided by
dense singular values or eigenvalues. Where the heads have more features than the stream the core is M itself. The maps
I - M and I + M share the Krylov space of the eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from probattn import blocks
from probattn.hf.layers.factors import LayerFactors
from probattn.hf.layers.low_rank import low_rank_logabsdet
from probattn.numerics.krylov import Rightmost, rightmost_eigenvalues, smallest_singular_values
from probattn.numerics.lu import Factored, factor

__all__ = ["DENSE", "EIGENVALUE_TOLERANCE", "SINGULAR_TOLERANCE", "Kind", "Map", "Spectra", "block_margins"]

Kind = Literal["logabsdet", "sigma_min", "spectral", "complex"]
Map = Literal["generator", "update"]

DENSE = 96
"""Largest number of features p for which singular values and eigenvalues are those of dense matrices from the start."""

SINGULAR_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest relative error of sigma_min that the iteration may have, by precision."""

EIGENVALUE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest absolute error of an eigenvalue that Arnoldi's method may have, by precision."""

_WIDTH = 4  # columns of block Lanczos
_SEED = 0  # of the columns that the iterations begin with
_SIGN: dict[Map, int] = {"generator": 1, "update": -1}


class Spectra(NamedTuple):
    """Quantities of N tokens.

    Attributes:
        values: by name, ``(N,)`` each, and "attribution", ``(N, H)``.
        dense: how many singular values and eigenvalues were left to dense matrices, by name of the quantity.
        start: columns near to those of the smallest singular values, ``(p, b)`` by map, to begin the next tokens with.
    """

    values: dict[str, Tensor]
    dense: dict[str, int]
    start: dict[Map, Tensor]


def block_margins(
    factors: LayerFactors,
    kinds: Sequence[Kind],
    maps: Sequence[Map] = ("generator", "update"),
    *,
    attribution: bool = False,
    start: dict[Map, Tensor] | None = None,
    rank: int | None = None,
) -> Spectra:
    """Margins of the blocks I - M and I + M from their factors, without derivatives.

    Args:
        factors: of N tokens.
        kinds: quantities.
        maps: "generator" and "update".
        attribution: whether to add the heads' contributions -tr(J^-1 M^h) of the generator.
        start: of the tokens before, from :class:`Spectra`.
        rank: directions of each head's covariance that an estimate of log|det| keeps; None: exact.

    Returns:
        :class:`Spectra`. The names of the update map begin with ``update_``. Time O(m^2 r + m^3) per token.
    """
    factors = factors._replace(tokens=torch.Size([len(factors.own_weight)]))
    values: dict[str, Tensor] = {}
    dense: dict[str, int] = {}
    starts = dict(start or {})
    wide = factors.size > len(factors.output)  # the core is M itself
    whole = factors.mean_jacobian() if wide or ("sigma_min" in kinds and len(factors.output) <= DENSE) else None
    if {"logabsdet", "sigma_min"} & set(kinds) or attribution:
        for name in maps:
            sign, prefix = _SIGN[name], _prefix(name)
            if "logabsdet" in kinds and rank is not None:
                found = low_rank_logabsdet(factors, rank, sign)
                values[f"{prefix}sign"], values[f"{prefix}logabsdet"] = found
                if "sigma_min" not in kinds and not attribution:
                    continue
            factored = _factored(factors, whole if wide else None, sign)
            if "logabsdet" in kinds and rank is None:
                values[f"{prefix}sign"], values[f"{prefix}logabsdet"] = factored.logabsdet()
            if "sigma_min" in kinds:
                if whole is not None and len(factors.output) <= DENSE:
                    smallest = blocks.smallest_singular_value_one_minus(sign * whole)
                else:
                    smallest, dense[f"{prefix}sigma_min"], starts[name] = _smallest(
                        factors, factored, sign, wide, starts.get(name)
                    )
                values[f"{prefix}sigma_min"] = smallest
            if attribution and name == "generator":
                heads = _factored(factors, None, 1) if wide else factored
                values["attribution"] = _attribution(heads, factors)
        if attribution and "generator" not in maps:
            values["attribution"] = _attribution(_factored(factors, None, 1), factors)
    if "spectral" in kinds or "complex" in kinds:
        for quantity, (margin, left) in _eigenvalues(factors, kinds, maps).items():
            values[quantity] = margin
            if left is not None:
                dense[quantity] = left
    return Spectra(values, dense, starts)


def _prefix(name: Map) -> str:
    return "" if name == "generator" else "update_"


def _factored(factors: LayerFactors, whole: Tensor | None, sign: int) -> Factored:
    if whole is None:
        return factor(factors.identity_less_core(sign), overwrite=True)
    return factor(torch.eye(whole.shape[-1], dtype=whole.dtype, device=whole.device) - sign * whole, overwrite=True)


def _attribution(factored: Factored, factors: LayerFactors) -> Tensor:
    """-tr(J^-1 M^h) = r_v - tr_h (I - K)^-1, ``(N, H)``."""
    size = factors.output.shape[2]
    traces: Tensor = factored.inverse_diagonal().unflatten(-1, (-1, size)).sum(-1)
    return size - traces


def _smallest(
    factors: LayerFactors, factored: Factored, sign: int, wide: bool, start: Tensor | None
) -> tuple[Tensor, int, Tensor]:
    """sigma_min of I - s M, how many were left to dense matrices, and columns to begin the next tokens with."""
    count, size = len(factors.own_weight), len(factors.output)
    like = factors.covariance
    columns = _random((size, _WIDTH), like)
    if start is not None:
        columns[:, : start.shape[1]] = start
    part_of = _parts(factors)

    def solve(right: Tensor, rows: Tensor) -> Tensor:
        if wide:
            return factored.solve(right, rows)
        part = part_of(rows)
        return right + sign * part.to_stream(factored.solve(part.to_heads(right), rows))

    def solve_transposed(right: Tensor, rows: Tensor) -> Tensor:
        if wide:
            return factored.solve(right, rows, transposed=True)
        part = part_of(rows)
        inner = factored.solve(part.to_stream_transposed(right), rows, transposed=True)
        return right + sign * part.to_heads_transposed(inner)

    tolerance = SINGULAR_TOLERANCE[like.dtype]
    found = smallest_singular_values(solve, solve_transposed, columns.expand(count, -1, -1), tolerance)
    left = (~found.converged).nonzero().squeeze(-1)
    value = found.value
    for row in left.split(1):
        value[row] = blocks.smallest_singular_value_one_minus(sign * factors.of_tokens(row).mean_jacobian())
    known = found.vector[found.converged]
    kept = torch.linalg.svd(known, full_matrices=False)[2][: _WIDTH - 1].mT if len(known) else columns[:, :0]
    return value, len(left), kept


def _eigenvalues(
    factors: LayerFactors, kinds: Sequence[Kind], maps: Sequence[Map]
) -> dict[str, tuple[Tensor, int | None]]:
    """Spectral and complex margins by name, with how many were left to dense matrices; None: all were dense."""
    count, size = len(factors.own_weight), len(factors.output)
    like = factors.covariance
    found: dict[int, Rightmost] | None = None
    if size > DENSE:
        part_of = _parts(factors)

        def product(vectors: Tensor, rows: Tensor) -> Tensor:
            return part_of(rows).product(vectors.unsqueeze(-1)).squeeze(-1)

        found = rightmost_eigenvalues(
            product,
            _random((size,), like).expand(count, -1),
            EIGENVALUE_TOLERANCE[like.dtype],
            [_SIGN[name] for name in maps],
            need_real="spectral" in kinds,
            need_abscissa="complex" in kinds,
        )
    margins: dict[str, tuple[Tensor, int | None]] = {}
    for name in maps:
        sign = _SIGN[name]
        for kind, dense in (("spectral", blocks.largest_real_eigenvalue), ("complex", blocks.spectral_abscissa)):
            if kind not in kinds:
                continue
            if found is None:
                value: Tensor = dense(sign * factors.sylvester_core(), size)
                margins[_prefix(name) + kind] = (1 - value, None)
                continue
            one = found[sign]
            value, certain = (
                (one.real, one.real_certain) if kind == "spectral" else (one.abscissa, one.abscissa_certain)
            )
            value = value if factors.size >= size else value.clamp(min=0.0)
            left = (~certain).nonzero().squeeze(-1)
            for row in left.split(1):
                value[row] = dense(sign * factors.of_tokens(row).sylvester_core(), size).to(value.dtype)
            margins[_prefix(name) + kind] = ((1 - value).to(like.dtype), len(left))
    return margins


def _parts(factors: LayerFactors) -> Callable[[Tensor], LayerFactors]:
    """A function that gives the factors of some tokens, and keeps the last that it gave."""
    last = (torch.arange(len(factors.own_weight), device=factors.own_weight.device), factors)

    def part_of(rows: Tensor) -> LayerFactors:
        nonlocal last
        if len(rows) != len(last[0]) or not bool((rows == last[0]).all()):
            last = (rows, factors.of_tokens(rows))
        return last[1]

    return part_of


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)
