"""Claim: the closed-form blocks are the Jacobian, and the Jacobian is causal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch import Tensor

from probattn import blocks
from probattn.attention import CausalAttention, Mask
from probattn.inference.claims.claim import Claim, Subject, judge, worst
from probattn.numerics import linalg

__all__ = ["dense_jacobian", "jacobian_claim"]

BOUND = {"max_abs_error": 1e-10, "max_logdet_error": 1e-10, "wrong_signs": 0.0, "above_diagonal": 0.0}


def dense_jacobian(attention: CausalAttention, u: Tensor) -> Tensor:
    """Compute the Jacobian de/du of one sequence by automatic differentiation, (T, p, T, p): the reference."""
    jacobian: Tensor = torch.autograd.functional.jacobian(attention.residual, u)
    return jacobian


def jacobian_claim(
    subject: Subject,
    *,
    blocks: Callable[[CausalAttention, Tensor], Tensor] = CausalAttention.jacobian,
    logabsdet: Callable[[CausalAttention, Tensor], tuple[Tensor, Tensor]] = CausalAttention.logabsdet,
) -> Claim:
    """Compare blocks, log-determinants, signs and the causal pattern with automatic differentiation.

    Args:
        subject: the fitted model, whose attention is compared on real text under both masks.
        blocks: the function under test for the blocks, (attention, u) -> (T, p, p).
        logabsdet: the function under test for signs and log-determinants, (attention, u) -> (T,) each.
    """
    measured = dict.fromkeys(BOUND, 0.0)
    count, control = 0, 0.0
    for attention, u in _cases(subject):
        dense = dense_jacobian(attention, u)
        positions = torch.arange(u.shape[0])
        reference = dense.movedim(2, 1)[positions, positions]  # (T, p, p)
        sign, value = linalg.slogdet(reference)
        own_sign, own_value = logabsdet(attention, u)
        above = positions[:, None] < positions[None, :]
        upper = dense.movedim(2, 1)[above]  # (pairs, p, p)
        # The logarithm loses digits in inverse proportion to the smallest singular value.
        conditioning = torch.linalg.svdvals(reference)[..., -1].clamp(max=1.0)
        numbers = {
            "max_abs_error": float((blocks(attention, u) - reference).abs().max()),
            "max_logdet_error": float(((own_value - value).abs() * conditioning).max()),
            "wrong_signs": float((sign != own_sign).sum()),
            "above_diagonal": float(upper.abs().max()) if upper.numel() else 0.0,
        }
        measured = {name: worst(measured[name], number) for name, number in numbers.items()}
        count += u.shape[0]
        if attention.mask == "inclusive":
            control = worst(control, float((_strict_formula(attention, u) - reference).abs().max()))
    holds = judge(measured, BOUND) and control > BOUND["max_abs_error"]
    return Claim(
        "jacobian",
        "The diagonal blocks of de/du and their log-determinants have the stated closed form under both masks, and "
        "the blocks above the diagonal are exactly zero.",
        "identity",
        "supported" if holds else "not_supported",
        {**measured, "blocks_compared": float(count), "control_error": control},
        BOUND,
        formula="J_i = I − Σ_h W_O [ Cov_i(v, k) c W_Q + α_ii (W_V + (v_i − v̄_i)(c W_Kᵀ q_i)ᵀ) ], the terms with α_ii "
        "under the inclusive mask only",
        control="Under the inclusive mask the formula of the strict one gives blocks that are wrong by up to "
        f"{control:.2g}.",
    )


def _strict_formula(attention: CausalAttention, u: Tensor) -> Tensor:
    """Return the blocks without the terms of the token's own weight, which are right under the strict mask alone."""
    change = blocks.mean_jacobian(attention.mean_and_factors(u).factors._replace(own=None))
    return torch.eye(u.shape[-1], dtype=u.dtype) - change


def _cases(subject: Subject) -> Iterator[tuple[CausalAttention, Tensor]]:
    """Yield random attentions of many shapes, then the fitted attention on real text."""
    generator = torch.Generator().manual_seed(subject.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for mask, heads, rank, value_dim in itertools.product(get_args(Mask), (1, 2, 3), (1, 3), (1, 2, 5)):
        dim = 4
        query, key = normal(heads, rank, dim), normal(heads, rank, dim)
        value, output = normal(heads, value_dim, dim), normal(heads, dim, value_dim) / heads
        yield CausalAttention(query, key, value, output, mask=mask, start=normal(dim)), normal(6, dim)
    attention = subject.attention
    for mask in get_args(Mask):
        # Half the identity as output: under the inclusive mask the first token's block is I - W_O W_V.
        output = 0.5 * attention.output
        for u in subject.tokens(2):
            yield CausalAttention(attention.query, attention.key, attention.value, output, mask=mask), u[:24]
