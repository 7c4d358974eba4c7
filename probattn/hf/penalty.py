r"""The barrier of one layer on the residual stream, at some positions: exact, or from random probes.

.. math::
    b_i = \text{a penalty of } J_i = I - M_i, \qquad M_i = \partial \mu_i / \partial u_i,

with mu the whole attention sublayer of a language model (:class:`~probattn.hf.layers.AttentionLayer`): gradients run
through its norms, biases, rotation, cap, window and the stream itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from probattn.barrier import BarrierKind, penalty_and_margin
from probattn.errors import InputError, require_at_least
from probattn.hf.directional import TokenMap, token_map
from probattn.hf.layers import AttentionLayer
from probattn.hf.layers.factors import LayerFactors, build_factors
from probattn.hf.layers.past import attend
from probattn.hf.layers.sublayer import Projected, Sublayer, averages_to_mean, project
from probattn.hf.probes import TOLERANCE, Probed, probe_signs, probed_logabsdet
from probattn.hf.stream import Stream
from probattn.numerics import linalg
from probattn.penalty import Penalty

__all__ = ["require_probes", "residual_penalty"]

_STEPS = 6, 24  # of the Lanczos process; a compiled graph takes the larger number and does not ask
_NUMBERS = 1 << 26  # how many numbers the square matrices of a chunk of tokens may hold


def residual_penalty(
    layer: AttentionLayer, stream: Stream, rows: Tensor, kind: BarrierKind = "one_sided", probes: int | None = None
) -> Penalty:
    r"""Penalty of a layer's blocks at some positions of a batch.

    Args:
        layer: the layer; its positions and mask are those of the stream.
        stream: what the layer is about to work on.
        rows: positions to evaluate, ``(P,)``, increasing.
        kind: see :func:`~probattn.barrier.log_barrier`.
        probes: number of random probes per token that stand in for the determinant (``logdet`` alone); None: exact.

    Returns:
        A :class:`~probattn.penalty.Penalty`, differentiable in the stream and in the parameters of the layer. With
        probes its margins are singular values instead of determinants: sigma_min from above. Time per position:
        exact, a factorisation of size m = min(p, H dv), O(m^3), and its covariances, O(H T r dv); with n probes and k
        steps of the Lanczos process O(n k H (T + p) (r + dv)). Matrices beyond a chunk are formed again in the
        backward pass.
    """
    with torch.autocast(stream.tokens.device.type, enabled=False):
        sublayer = stream.turned(layer.sublayer)
        u = stream.tokens.to(layer.dtype)
        mask = stream.visible
        positions = torch.arange(u.shape[1], device=u.device).unsqueeze(0)
        tokens = project(sublayer, u, positions, rows)
        if probes is None:
            values, margins = _exact(sublayer, u, tokens, rows, mask, kind)
        else:
            values, margins = _probed(token_map(sublayer, u, tokens, rows, mask), probes)
        length = u.shape[1]
        if stream.padding is None:
            valid = torch.ones(values.shape, dtype=torch.bool, device=u.device)
            count = torch.tensor(len(u) * length, device=u.device)
        else:
            valid, count = stream.padding[:, rows].expand(values.shape), stream.padding.sum()
        return Penalty(values, margins.detach(), rows, valid, length, count)


def require_probes(kind: BarrierKind, probes: int | None) -> None:
    """Refuse probes that would be biased.

    Args:
        kind: the kind of penalty.
        probes: number of probes; None: exact.

    Raises:
        InputError: fewer than one, or a kind that is no linear function of the log-determinant.
    """
    if probes is None:
        return
    require_at_least("probes", probes)
    if kind != "logdet":
        raise InputError(
            f"probes is {probes} and kind {kind!r}: probes estimate log|det J| without bias, and a non-linear function "
            "of an unbiased estimate is biased; use kind='logdet', or probes=None for the exact penalty."
        )


def _exact(
    sublayer: Sublayer, u: Tensor, tokens: Projected, rows: Tensor, mask: Tensor | None, kind: BarrierKind
) -> tuple[Tensor, Tensor]:
    # The layer's functions take queries of all tokens; those outside the rows are not read.
    whole = tokens._replace(
        query=_spread(tokens.query, rows, u.shape[1]), raw_query=_spread(tokens.raw_query, rows, u.shape[1])
    )
    attended = attend(sublayer, whole, rows, mask)
    before = averages_to_mean(sublayer, attended.average)[1]
    factors = build_factors(sublayer, u, whole, attended, before, rows)
    dim, size = sublayer.dim, min(sublayer.dim, factors.size)
    size = dim if kind == "singular_value" else size
    step = max(1, _NUMBERS // (size * size))
    count = len(u) * len(rows)

    def part(start: int) -> tuple[Tensor, Tensor]:
        some = _chunk(factors, start, min(start + step, count))
        matrix = some.mean_jacobian() if kind == "singular_value" else some.sylvester_core()
        return penalty_and_margin(matrix, dim, kind)

    if step >= count:
        values, margins = part(0)
    else:
        found = [checkpoint(part, start, use_reentrant=False) for start in range(0, count, step)]
        values, margins = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values.view(len(u), -1), margins.view(len(u), -1)


def _probed(block: TokenMap, count: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        batch, _, rows = block.average.shape[:3]
        z = probe_signs((batch, rows, count, block.sublayer.dim), block.average)
        found = _run(block.detach(), z)
    # Its gradient is that of log|det J| on average over z, and its value is not asked for.
    carrier = -(found.solution * block.product(z)).sum(-1)  # (B, P, n)
    values = found.logabsdet + carrier - carrier.detach()
    return -values.mean(-1), found.smallest


def _run(block: TokenMap, z: Tensor) -> Probed:
    """The Lanczos process in a few steps, then in more where these were too few, then a factorisation."""
    if torch.compiler.is_compiling():
        return _lanczos(block, z, _STEPS[-1])
    found = _lanczos(block, z, _STEPS[0])
    for steps in (_STEPS[1], None):
        index = (found.residual > TOLERANCE[z.dtype]).any(-1).any(0).nonzero().squeeze(-1)
        if not len(index):
            break
        some, rest = block.at(index), z[:, index]
        again = _factorised(some, rest, found.smallest[:, index]) if steps is None else _lanczos(some, rest, steps)
        parts = zip(found, again, strict=True)
        found = Probed(*(part.index_copy(1, index, more) for part, more in parts))
    return found


def _factorised(block: TokenMap, z: Tensor, smallest: Tensor) -> Probed:
    """Exact log-determinants and solutions, one position at a time; near a singular block the process would not end."""
    identity = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    values, solutions = [], []
    for place in range(z.shape[1]):
        one = torch.tensor([place], device=z.device)
        transposed = identity - block.at(one).product(identity.expand(len(z), 1, -1, -1))  # J^T, (B, 1, p, p)
        values.append(linalg.slogdet(transposed)[1].unsqueeze(-1).expand(-1, -1, z.shape[2]))
        solutions.append(linalg.solve(transposed, z[:, one].mT, check=False).mT)
    residual = torch.zeros(z.shape[:3], dtype=z.dtype, device=z.device)
    return Probed(torch.cat(values, 1), torch.cat(solutions, 1), smallest, residual)


def _lanczos(block: TokenMap, z: Tensor, steps: int) -> Probed:
    return probed_logabsdet(lambda x: x - block.product(x), lambda x: x - block.transposed_product(x), z, steps=steps)


def _spread(part: Tensor, rows: Tensor, length: int) -> Tensor:
    """Queries of the rows, ``(B, K, P, g, r)``, at their places among all tokens, ``(B, K, T, g, r)``."""
    empty = part.new_zeros(*part.shape[:2], length, *part.shape[3:])
    return empty.index_copy(2, rows, part)


def _chunk(factors: LayerFactors, start: int, end: int) -> LayerFactors:
    """The factors of some of the N tokens, one axis of tokens."""
    parts = {name: getattr(factors, name)[start:end] for name in ("covariance", "own_weight", "own_value", "own_key")}
    norms = {}
    for name in ("norm", "output_norm"):
        norm = getattr(factors, name)
        norms[name] = norm and norm._replace(scale=norm.scale[start:end], directions=norm.directions[start:end])
    return factors._replace(**parts, **norms, tokens=torch.Size((end - start,)))
