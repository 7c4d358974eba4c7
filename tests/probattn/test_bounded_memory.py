"""Attention with a memory radius: against loops and autograd, its contraction for every past, and what follows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn import AttentionProcess, CausalAttention, LatentAttention, log_barrier, regime, stability_margin
from probattn.errors import InputError, SeveralSolutionsError
from probattn.folds.line import largest_sensitivity
from probattn.folds.mass import scalar_mass
from probattn.folds.search import find_fold
from probattn.mean_field import stationary_covariance
from probattn.solve import parallel
from probattn.solve.bound import contraction_bound
from probattn.solve.context import Context
from probattn.solve.sequence import find_sequence, solve_sequence
from probattn.solve.token import find_roots
from probattn.testing import check_distribution, check_transform
from probattn.transforms import AttentionTransform
from support import attention_like, dense, dense_blocks, tokens

MASKS = ["strict", "inclusive"]


def bounded(seed, heads=1, rank=2, dim=3, value_dim=None, mask="strict", radius=1.5, **options):
    """A random attention with a memory radius, and the same without one."""
    free = attention_like(seed, heads, rank, dim, value_dim, mask, **options)
    return free.with_memory(radius), free


def contractive(seed, kappa, heads=1, rank=2, dim=3, value_dim=None, mask="strict", radius=1.5, **options):
    return bounded(seed, heads, rank, dim, value_dim, mask, radius, **options)[0].scaled_to(kappa)


def loop(attention, u, radius):
    """The mean token by token, written out with NumPy-like loops."""
    memory = torch.stack([x / math.sqrt(1 + float(x @ x) / radius**2) for x in u])
    rows = []
    for i in range(len(u)):
        seen = memory[: i + 1] if attention.mask == "inclusive" else memory[:i]
        asking = memory[i] if attention.mask == "inclusive" else u[i]
        total = torch.zeros_like(u[0]) if len(seen) else attention.start
        for h in range(attention.heads):
            if len(seen) == 0:
                continue
            scores = [float(attention.scale * (attention.query[h] @ asking) @ (attention.key[h] @ x)) for x in seen]
            shares = [math.exp(score - max(scores)) for score in scores]
            for share, x in zip(shares, seen, strict=True):
                total = total + share / sum(shares) * attention.output[h] @ attention.value[h] @ x
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("heads", "rank", "dim", "value_dim"), [(1, 1, 1, None), (2, 3, 4, 2), (3, 1, 2, None)])
def test_mean_blocks_and_determinants_are_those_of_loops_and_autograd(mask, heads, rank, dim, value_dim):
    attention, free = bounded(0, heads, rank, dim, value_dim, mask)
    u = 3 * tokens(0, 6, dim)
    torch.testing.assert_close(attention.mean(u), loop(attention, u, 1.5))
    assert (attention.mean(u) - free.mean(u)).abs().max() > 0.1
    reference = dense_blocks(attention, u)
    torch.testing.assert_close(attention.jacobian(u), reference, rtol=1e-10, atol=1e-12)
    sign, logabs = attention.logabsdet(u)
    expected = torch.linalg.slogdet(reference)
    torch.testing.assert_close(sign, expected.sign)
    torch.testing.assert_close(logabs, expected.logabsdet, rtol=1e-9, atol=1e-10)
    above = dense(attention, u)
    assert (above[torch.ones(6, 6).triu(1).bool()] == 0).all()


@pytest.mark.parametrize("mask", MASKS)
def test_a_large_radius_is_none_and_a_small_one_forgets(mask):
    attention, free = bounded(1, 2, mask=mask, radius=1e9)
    u = tokens(1, 6, 3)
    torch.testing.assert_close(attention.mean(u), free.mean(u))
    torch.testing.assert_close(attention.jacobian(u), free.jacobian(u))
    small = free.with_memory(1e-9)
    assert small.mean(u)[1:].abs().max() < 1e-7


@pytest.mark.parametrize("mask", MASKS)
def test_single_precision_agrees_with_double(mask):
    attention, _ = bounded(2, 2, 2, 3, 2, mask)
    u = 2 * tokens(2, 12, 3)
    single = attention.to(torch.float32)
    assert single.memory_radius.dtype == torch.float32
    torch.testing.assert_close(single.jacobian(u.float()).double(), attention.jacobian(u), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.logabsdet(u.float())[1].double(), attention.logabsdet(u)[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mask", MASKS)
def test_every_operation_on_the_value_keeps_the_radius(mask):
    attention, free = bounded(3, mask=mask, batch=(2,), radius=torch.tensor([1.0, 2.0]).double())
    u = tokens(3, 5, 3)
    for other in (attention.expand((4, 2)).select((torch.tensor(3), torch.tensor(1))), attention.select(1)):
        torch.testing.assert_close(other.mean(u), attention.mean(u)[1])
    assert attention.equals(attention.detach())
    assert not attention.equals(free)
    assert attention.with_memory(None).equals(free)
    assert not attention.equals(free.with_memory(1.0))
    assert "memory_radius" in repr(attention)
    assert "memory_radius" not in repr(free)
    assert "memory_radius=2" in repr(attention.select(1))


@pytest.mark.parametrize("mask", MASKS)
def test_the_context_is_the_same_map_and_extends_to_itself(mask):
    attention, _ = bounded(4, 2, 2, 3, 2, mask)
    u = 2 * tokens(4, 7, 3)
    mean, jacobian = Context.of(attention, u[:-1]).mean_and_jacobian(u[-1])
    torch.testing.assert_close(mean, attention.mean(u)[-1])
    torch.testing.assert_close(jacobian, attention.jacobian(u)[-1])
    longer = Context.of(attention, u[:3]).extend(u[3]).join(u[4:6])
    torch.testing.assert_close(longer.mean(u[-1]), mean)
    torch.testing.assert_close(longer.first(2).mean(u[2]), attention.mean(u[:3])[-1])
    w = tokens(5, 3)
    past = u[:-1].clone().requires_grad_()
    (expected,) = torch.autograd.grad(attention.mean(torch.cat([past, u[-1:]]))[-1] @ w, past)
    torch.testing.assert_close(Context.of(attention, u[:-1]).pull_back(u[-1], w), expected)


@pytest.mark.parametrize("mask", MASKS)
def test_transform_and_distribution_conform(mask):
    attention = contractive(6, 0.8, 2, 2, 2, mask=mask)
    check_transform(AttentionTransform(attention), 2 * tokens(6, 3, 4, 2), causal=True)
    check_distribution(LatentAttention(attention, 0.7, 3))


@given(st.integers(0, 10**6), st.sampled_from(MASKS), st.integers(1, 3), st.integers(1, 8), st.floats(-3, 6))
@settings(max_examples=60, deadline=None)
def test_no_past_of_any_size_exceeds_the_contraction(seed, mask, heads, dim, size):
    attention, _ = bounded(seed, heads, 2, dim, mask=mask, size=10 ** (seed % 5 - 3))
    u = 10**size * tokens(seed, 8, 12, dim)
    found = torch.linalg.matrix_norm(attention.mean_jacobian(u), 2)
    assert (found <= attention.contraction * (1 + 1e-12)).all()
    assert (found <= contraction_bound(attention, u) * (1 + 1e-12) + 1e-12).all()
    assert (contraction_bound(attention, u) <= attention.contraction * (1 + 1e-12)).all()


def steepest(mask, strength):
    """The largest ratio of |M| to the contraction that gradient ascent on past, token and maps reaches, p = 1."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(200, *shape, generator=generator, dtype=torch.float64) for shape in ((5, 1), (1, 1, 1))]
    parts[0] *= 2
    parts[1] *= strength
    parts = [part.requires_grad_() for part in parts]
    optimizer = torch.optim.Adam(parts, 0.05)
    best = 0.0
    for _ in range(250):
        attention = CausalAttention.from_qk_matrix(parts[1], heads=1, mask=mask, memory_radius=1.0)
        ratio = attention.mean_jacobian(parts[0])[:, -1].abs().flatten() / attention.contraction
        best = max(best, float(ratio.detach().max()))
        optimizer.zero_grad()
        (-ratio.clamp(min=1e-9).log().sum()).backward()
        optimizer.step()
    return best


@pytest.mark.parametrize(("mask", "strength", "least"), [("strict", 1.0, 0.98), ("inclusive", 0.4, 0.84)])
def test_the_contraction_is_nearly_attained_and_never_exceeded(mask, strength, least):
    assert least < steepest(mask, strength) <= 1 + 1e-12


def test_the_contraction_of_weak_attention_under_the_inclusive_mask_is_that_of_the_first_token():
    attention, _ = bounded(16, 1, 2, 3, 2, "inclusive", size=0.01)
    first = attention.mean_jacobian(torch.zeros(1, 3).double())[0]
    torch.testing.assert_close(torch.linalg.matrix_norm(first, 2), attention.contraction)


@pytest.mark.parametrize("mask", MASKS)
def test_margins_and_determinants_stay_within_what_the_contraction_allows(mask):
    attention, u = contractive(7, 0.9, 2, 3, 4, mask=mask), 10 * tokens(7, 40, 20, 4)
    for kind in ("singular_value", "spectral", "complex"):
        assert stability_margin(attention, u, kind).min() >= 0.1 - 1e-12
    barrier = log_barrier(attention, u)
    assert barrier.min() >= -4 * math.log(1.9)
    assert barrier.max() <= -4 * math.log(0.1)
    assert attention.mean(u).norm(dim=-1).max() <= 1.5 * torch.linalg.matrix_norm(attention.ov_matrix, 2).sum() + 3


def folds_at(attention, u):
    """Return True if det J < 0 at some token after the past u, on a line."""
    return largest_sensitivity(Context.of(attention, u)).lower > 1


@given(st.integers(0, 10**6), st.floats(-3, 6), st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_on_a_line_every_past_leaves_one_root_and_mass_one(seed, size, kappa):
    u = 10**size * tokens(seed, 9, 1)
    attention = CausalAttention.contractive(
        torch.ones(1, 1, 1).double(), torch.ones(1, 1, 1).double(), contraction=kappa, memory_radius=2.0
    )
    context = Context.of(attention, u)
    assert not folds_at(attention, u)
    assert abs(scalar_mass(context, 0.5).absolute - 1) < 1e-8
    assert len(find_roots(context, tokens(seed + 1, 1))) == 1


def test_without_the_radius_the_same_parameters_fold():
    u = torch.tensor([[-8.0], [8.0]], dtype=torch.float64)
    attention = CausalAttention.from_qk_matrix(torch.tensor([[0.2]]).double(), memory_radius=2.0)
    free = CausalAttention.from_qk_matrix(torch.tensor([[0.2]]).double())
    assert not folds_at(attention, u)
    assert folds_at(free, u)
    assert scalar_mass(Context.of(free, u), 0.5).absolute > 1.5
    assert len(find_roots(Context.of(free, u), torch.zeros(1).double())) == 3
    assert [str(regime(one, torch.cat([u, u]))) for one in (attention, free)] == ["certified", "folded"]


@pytest.mark.parametrize("dim", [2, 4, 8])
@pytest.mark.parametrize("mask", MASKS)
def test_in_several_dimensions_many_starts_find_one_root(dim, mask):
    attention = contractive(dim, 0.95, 2, 2, dim, mask=mask)
    for size in (1e-3, 1.0, 1e6):
        context = Context.of(attention, size * tokens(dim, 10, dim))
        assert find_fold(context) is None
        # The contraction spares the search; without it the search finds the same.
        blind = Context.of(attention, size * tokens(dim, 10, dim))
        object.__setattr__(blind, "ceiling", torch.full_like(blind.ceiling, torch.inf))
        object.__setattr__(blind, "diameters", tuple(1e9 + part for part in blind.diameters))
        assert len(find_roots(blind, tokens(dim + 1, dim))) == 1


@pytest.mark.parametrize("mask", MASKS)
def test_regimes_are_certified_for_every_past_and_say_why(mask):
    attention = contractive(8, 0.9, mask=mask)
    found = regime(attention, 1e5 * tokens(8, 6, 3))
    assert (found.name, found.proved) == ("certified", True)
    assert "contraction 0.9 < 1 for every past" in found.evidence
    several = bounded(8, mask=mask, batch=(2,))[0].scaled_to(0.5)
    assert [part.name for part in regime(several, tokens(8, 6, 3))] == ["certified", "certified"]
    loose, _ = bounded(8, mask=mask, size=50.0)
    assert "every past" not in regime(loose, tokens(8, 6, 3)).evidence


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kappa", [0.5, 0.99])
def test_sweeps_solve_whole_sequences_and_never_fall_back(mask, kappa):
    attention = contractive(9, kappa, 2, mask=mask)
    e = 5 * tokens(9, 3, 150, 3)
    context, u = parallel.unique_prefix(Context.of(attention.expand((3,)), e[..., :0, :]), e)
    assert context.length == 150
    torch.testing.assert_close(attention.residual(u), e, rtol=1e-10, atol=1e-10)
    alone, several = find_sequence(attention, e, "unique", "sequential")
    assert not several.any()
    torch.testing.assert_close(u, alone, rtol=1e-10, atol=1e-10)


def test_sweeps_that_are_cut_short_take_fewer_tokens_at_a_time(monkeypatch):
    attention, e = contractive(9, 0.9, 2), 5 * tokens(9, 60, 3)
    monkeypatch.setattr(parallel, "_SWEEPS", 18)
    context, u = parallel.unique_prefix(Context.of(attention, e[:0]), e)
    assert context.length == 60
    torch.testing.assert_close(attention.residual(u), e, rtol=1e-9, atol=1e-9)


def test_without_the_radius_sampling_at_the_same_parameters_meets_folds():
    attention = CausalAttention.from_qk_matrix(0.9 * torch.eye(2).double(), memory_radius=1.0)
    e = 2 * tokens(10, 20, 60, 2)
    assert not find_sequence(attention, e, "unique")[1].any()
    free = CausalAttention.from_qk_matrix(0.9 * torch.eye(2).double())
    with pytest.raises(SeveralSolutionsError):
        find_sequence(free, e, "unique")


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_of_solution_and_density_reach_every_parameter(mask):
    free = attention_like(11, 2, 2, 2, 2, mask)
    leaves = [free._parameters()[name].clone().requires_grad_() for name in ("query", "key", "value", "output")]
    radius, kappa = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.3, 0.7))
    e = tokens(11, 4, 2).requires_grad_()

    def attention(query, key, value, output, radius, kappa):
        return CausalAttention.contractive(
            query, key, value, output, contraction=kappa, memory_radius=radius, mask=mask
        )

    assert torch.autograd.gradcheck(lambda e, *x: solve_sequence(attention(*x), e), (e, *leaves, radius, kappa))
    u = tokens(12, 5, 2).requires_grad_()

    def density(u, *x):
        return LatentAttention(attention(*x), 0.8, 5).log_prob(u)

    assert torch.autograd.gradcheck(density, (u, *leaves, radius, kappa))


def test_scaling_gives_the_contraction_or_stays_below_it():
    for mask in MASKS:
        free, _ = bounded(13, 2, 2, 4, 3, mask, batch=(5,))
        kappa = torch.linspace(0.1, 0.9, 5).double()
        torch.testing.assert_close(free.scaled_to(kappa).contraction, kappa)
        below = free.scaled_to(kappa, shrink=True).contraction
        assert ((below > 0) & (below < kappa)).all()
        weak = free.scaled_to(1e-4)
        torch.testing.assert_close(weak.scaled_to(0.9, shrink=True).contraction, weak.contraction, rtol=1e-6, atol=0)
    zero = CausalAttention.from_qk_matrix(torch.zeros(2, 2, requires_grad=True), memory_radius=1.0)
    (slope,) = torch.autograd.grad(zero.scaled_to(0.5, shrink=True).qk_matrix.sum(), zero.query)
    assert torch.equal(slope, torch.ones_like(slope))


def test_a_narrow_rank_has_the_same_contraction_as_the_product_written_out():
    attention, _ = bounded(14, 3, 2, 6, 2)
    norms = [torch.linalg.svdvals(part)[..., 0] for part in (attention.ov_matrix, attention.qk_matrix)]
    torch.testing.assert_close(attention.contraction, 1.5**2 * (norms[0] * norms[1]).sum())
    assert attention_like(14).contraction == math.inf


def test_paths_of_an_attractive_process_stay_bounded_and_agree_however_they_are_read():
    attention = CausalAttention.from_qk_matrix(torch.tensor([[0.9]]).double(), memory_radius=1.0)
    process = AttentionProcess(attention, 0.5)
    path, again = process.path(3), process.path(3)
    whole = path[0:600]
    _ = again[0:7]
    assert torch.equal(again[0:600], whole)
    noise = torch.cat([process.noise(3, block) for block in range(3)])[:600]
    torch.testing.assert_close(attention.residual(whole), noise, rtol=1e-9, atol=1e-9)
    assert (whole - noise).abs().max() <= 1.0
    assert process.conditional(whole).mass().method == "contraction"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_radius": 0.0}, r"memory_radius is 0.0; it must be positive and finite"),
        ({"memory_radius": -1}, r"memory_radius is -1; it must be positive"),
        ({"memory_radius": math.inf}, r"memory_radius is inf"),
        ({"memory_radius": torch.tensor([1.0, -2.0]).double()}, r"memory_radius has an entry of -2.0"),
        ({"memory_radius": "wide"}, r"memory_radius is a str"),
        ({"memory_radius": torch.tensor(1.0)}, r"memory_radius is torch.float32"),
        ({"memory_radius": 1.0, "contraction": 1.0}, r"contraction is 1.0; it must lie strictly between 0 and 1"),
        ({"memory_radius": 1.0, "contraction": 0.0}, r"contraction is 0.0"),
        ({"memory_radius": 1.0, "contraction": torch.tensor([0.5, 1.5])}, r"contraction is from 0.5 to 1.5"),
        ({"memory_radius": 1.0, "contraction": math.nan}, r"contraction is nan"),
    ],
)
def test_radii_and_contractions_that_do_not_exist_are_refused(options, message):
    factor = torch.eye(2).double().unsqueeze(0)
    build = CausalAttention.contractive if "contraction" in options else CausalAttention
    with pytest.raises(InputError, match=message):
        build(factor, factor, **options)


def test_what_cannot_be_scaled_or_answered_is_refused():
    zero = CausalAttention.from_qk_matrix(torch.zeros(2, 2).double(), memory_radius=1.0)
    with pytest.raises(InputError, match="the factors are zero"):
        zero.scaled_to(0.5)
    with pytest.raises(InputError, match="without memory_radius"):
        attention_like(15).scaled_to(0.5)
    with pytest.raises(InputError, match="mean field"):
        stationary_covariance(zero, torch.eye(2).double())
