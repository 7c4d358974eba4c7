"""Roots counted by brute force, not by the package's search: one with a contraction, several without the radius."""

import itertools

import pytest
import torch

from probattn import CausalAttention
from probattn.solve.context import Context
from support import tokens

MASKS = ["strict", "inclusive"]
SIZES = [1e-3, 1.0, 1e3, 1e6]
CASES = list(itertools.product(MASKS, SIZES, range(1, 9), (1, 3)))


def contractive(seed, kappa, heads, dim, mask):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return CausalAttention.contractive(query, key, contraction=kappa, memory_radius=2.0, mask=mask)


def crossings(attention, past, noise):
    """Solutions of u - mu(u) = noise on a line, as changes of sign on a fine grid around the noise."""
    reach = 2 + float(attention.ov_matrix.abs().sum()) * max(2.0, float(past.abs().max()))
    # Fine where the softmax of a large past turns, and coarse far out.
    near = torch.logspace(-12, 0, 20_000, dtype=torch.float64) * reach
    grid = torch.cat([-near.flip(0), torch.zeros(1, dtype=torch.float64), near])
    u = torch.cat([grid, grid + noise]).sort().values.unsqueeze(-1)
    gap = u - Context.of(attention, past).mean(u) - noise
    sign = gap.flatten().sign()
    sign = sign[sign != 0]
    return int((sign[1:] != sign[:-1]).sum())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES)
def test_on_a_line_there_is_one_and_without_the_radius_there_are_several(mask, size):
    several = 0
    for seed in range(6):
        attention, past = contractive(seed, 0.95, 1 + seed % 3, 1, mask), size * tokens(seed, 6, 1)
        noise = float(tokens(seed + 100, 1))
        assert crossings(attention, past, noise) == 1
        several += crossings(attention.with_memory(None), past, noise) > 1
    if size >= 1e3:
        assert several > 0  # the control: attraction of a wide past pulls to both sides


def settle(attention, past, noise, starts, sweeps=150):
    context, u = Context.of(attention, past), starts
    for _ in range(sweeps):
        u = noise + context.mean(u)
    return u


@pytest.mark.parametrize(("mask", "size", "dim", "heads"), CASES)
def test_from_everywhere_sweeps_lead_to_one_token(mask, size, dim, heads):
    attention = contractive(dim, 0.8, heads, dim, mask)
    past, noise = size * tokens(dim, 6, dim), tokens(dim + 1, dim)
    starts = torch.cat([scale * tokens(dim + 2, 20, dim) for scale in (1.0, 1e3, 1e6)])
    found = settle(attention, past, noise, starts)
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dim", [1, 4, 8])
def test_without_the_radius_they_lead_to_several(mask, dim):
    attention = CausalAttention.from_qk_matrix(0.2 * torch.eye(dim, dtype=torch.float64), mask=mask)
    ends = torch.tensor([-10.0, 10.0], dtype=torch.float64).unsqueeze(-1).expand(2, dim)
    noise = 0.1 * tokens(dim, dim)
    found = settle(attention, ends, noise, torch.cat([5 * ends, ends / 2]))
    assert float((found - found[:1]).norm(dim=-1).max()) > 1


@pytest.mark.parametrize("mask", MASKS)
def test_no_determinant_of_any_past_is_negative_and_some_are_without_the_radius(mask):
    lowest = {True: float("inf"), False: float("inf")}
    for seed, size in itertools.product(range(8), (*SIZES, 10.0, 30.0)):
        dim = 1 + seed
        attention, u = contractive(seed, 0.95, 2, dim, mask), size * tokens(seed, 20, 8, dim)
        for bounded in lowest:
            sign, _ = (attention if bounded else attention.with_memory(None)).logabsdet(u)
            lowest[bounded] = min(lowest[bounded], float(sign.min()))
    assert lowest == {True: 1.0, False: -1.0}
