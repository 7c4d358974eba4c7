import numpy as np
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from probattn import AttentionProcess, CausalAttention, LatentAttention
from probattn.errors import InputError, SeveralSolutionsError
from probattn.folds.branches import Branches
from probattn.folds.mass import scalar_mass
from probattn.models.scalar import scalar_attention
from probattn.next_token import NextToken
from probattn.solve.context import Context
from probattn.solve.token import find_token
from support import attention_like, tokens

RULES = ["uniform", "smallest_step", "nearest_mean"]
QUIET = attention_like(0, 1, 2, 4, size=0.02)


def past(a, *points):
    return Context.of(scalar_attention(a), torch.tensor(points, dtype=torch.float64).unsqueeze(-1))


class TestBranches:
    @settings(max_examples=60)
    @given(seed=st.integers(0, 10**6), a=st.floats(-3, 5), sigma=st.floats(0.2, 2), length=st.integers(0, 6))
    def test_mass_is_the_quadrature(self, seed, a, sigma, length):
        law = past(a, *np.random.default_rng(seed).normal(size=length))
        assert Branches(law, sigma).mass == pytest.approx(scalar_mass(law, sigma).absolute, abs=1e-8)
        assert Branches(law, sigma, "uniform").mass == pytest.approx(1, abs=1e-12)

    @settings(max_examples=40)
    @given(seed=st.integers(0, 10**6), a=st.floats(-3, 5), noise=st.floats(-3, 3))
    def test_roots_are_all_the_roots(self, seed, a, noise):
        branches = Branches(past(a, *np.random.default_rng(seed).normal(size=5)), 0.7)
        roots = branches.roots(noise)
        assert len(roots) % 2 == 1
        np.testing.assert_allclose(branches.residual(roots), noise, atol=1e-12)
        assert (np.diff(roots) > 0).all()
        grid = np.linspace(-12, 12, 24_001)
        assert len(roots) >= (np.diff(np.sign(branches.residual(grid) - noise)) != 0).sum()

    @pytest.mark.parametrize("rule", RULES)
    def test_the_selected_law_is_normalised_and_its_cdf_is_its_integral(self, rule):
        law = past(2.5, -1.3, 0.4, 1.1)
        branches, density = Branches(law, 0.6, rule), NextToken(law, 0.6, selection=rule)
        assert branches.mass == pytest.approx(1, abs=1e-9)
        cuts = sorted({*branches.turning_points, *(branches.icdf(q) for q in (0.2, 0.5, 0.8))})
        for low, high in zip([-8.0, *cuts], [*cuts, 8.0], strict=True):
            grid = np.linspace(low, high, 4001)[1:-1]
            values = density.log_prob(torch.tensor(grid).unsqueeze(-1)).exp().numpy()
            # The trapezium rule across the jumps of the selection: about one cell times the density.
            assert np.trapezoid(values, grid) == pytest.approx(branches.cdf(high) - branches.cdf(low), abs=3e-3)

    @pytest.mark.parametrize("rule", ["all", *RULES])
    def test_quantiles_invert_the_distribution_function(self, rule):
        branches = Branches(past(3.0, -1.0, 0.2, 1.0), 0.5, rule)
        for q in (1e-6, 0.1, 0.5, 0.9, 1 - 1e-6):
            assert branches.cdf(branches.icdf(q)) == pytest.approx(q * branches.mass, abs=1e-9)
        with pytest.raises(InputError, match="strictly between 0 and 1"):
            branches.icdf(1.0)

    def test_rules_choose_as_they_say(self):
        noise = torch.tensor([0.05], dtype=torch.float64)

        def taken(context, rule, share=0.5):
            return float(find_token(context, noise, rule, torch.tensor(share, dtype=torch.float64)).u)

        law = past(3.0, -1.0, 1.0)
        roots = Branches(law, 0.5).roots(0.05)
        assert roots == pytest.approx([-0.9430, -0.0250, 1.0463], abs=1e-4)  # of u - tanh(3 u) = 0.05
        assert taken(law, "smallest_step") == pytest.approx(roots[1], abs=1e-12)
        assert [taken(law, "uniform", share) for share in (0.1, 0.5, 0.9)] == pytest.approx(list(roots), abs=1e-12)
        shifted = past(3.0, -1.0, 1.0, 1.0, 1.0)
        nearest = min(Branches(shifted, 0.5).roots(0.05), key=lambda u: abs(u - 0.5))
        assert taken(shifted, "nearest_mean") == pytest.approx(nearest, abs=1e-12)

    @pytest.mark.parametrize("rule", ["smallest_step", "nearest_mean"])
    def test_the_taken_root_changes_where_the_distances_do(self, rule, monkeypatch):
        def disagreements():
            count = 0
            for seed in range(2):
                context = past(3.0, *np.random.default_rng(seed).normal(size=6))
                branches = Branches(context, 0.6, rule)
                for noise in np.linspace(-2, 2, 61):
                    roots = branches.roots(noise)
                    aim = noise if rule == "smallest_step" else float(context.values.mean())
                    expected = np.where(np.arange(len(roots)) == np.argmin(np.abs(roots - aim)), 0.0, -np.inf)
                    count += not np.array_equal(branches.log_weight(roots), expected)
            return count

        assert disagreements() == 0
        if rule == "smallest_step":  # two noises in an interval do not see where the nearest root changes
            monkeypatch.setattr("probattn.folds.branches._PROBES", 2)
            assert disagreements() > 0

    def test_tails_keep_their_digits(self):
        branches = Branches(past(0.0, -1.0, 1.0), 1.0)  # mean zero: the token is the noise
        for z in (5.0, 12.0, 30.0):
            assert float(branches.cdf(-z)) == pytest.approx(stats.norm.cdf(-z), rel=1e-12)
            assert float(branches._probability(z, z + 1)) == pytest.approx(
                stats.norm.sf(z) - stats.norm.sf(z + 1), rel=1e-12
            )

    def test_bad_arguments(self):
        with pytest.raises(InputError, match="rule is 'first'"):
            Branches(past(1.0, 0.0), 0.5, "first")
        with pytest.raises(InputError, match="noise_scale is -1"):
            Branches(past(1.0, 0.0), -1)


class TestNextToken:
    def test_density_is_the_ratio_of_joint_densities(self):
        attention, u = attention_like(1, 2, 2, 3, 2, size=0.4), tokens(1, 5, 6, 3)
        conditional = AttentionProcess(attention, 0.7).conditional(u[:, :5])
        joint = LatentAttention(attention, 0.7, 6).log_prob(u) - LatentAttention(attention, 0.7, 5).log_prob(u[:, :5])
        assert conditional.batch_shape == (5,)
        torch.testing.assert_close(conditional.log_prob(u[:, 5]), joint)

    @pytest.mark.parametrize("rule", RULES)
    def test_draws_follow_the_exact_law(self, rule):
        law = NextToken(past(2.5, -1.3, 0.4, 1.1), 0.6, selection=rule)
        torch.manual_seed(0)
        drawn = law.sample((1500,))
        ranks = law.cdf(drawn).flatten().numpy()
        assert stats.kstest(ranks, "uniform").pvalue > 1e-3  # one test in a thousand fails by chance; the seed is fixed
        other = NextToken(law.past, 0.6, selection="uniform" if rule != "uniform" else "smallest_step")
        assert stats.kstest(other.cdf(drawn).flatten().numpy(), "uniform").pvalue < 1e-3  # which the test can tell

    def test_unique_raises_on_a_fold(self):
        law = NextToken(past(3.0, -1.0, 1.0), 0.5)
        torch.manual_seed(0)
        with pytest.raises(SeveralSolutionsError, match="position 2"):
            law.sample((50,))

    @pytest.mark.parametrize("dim", [2, 4, 8])
    def test_mass_by_importance_sampling(self, dim):
        # Independent coordinates, one of them folded: the mass is that of the one.
        line = past(2.0, -1.0, 1.0)
        attention = CausalAttention.from_qk_matrix(torch.diag(torch.tensor([2.0] + [0.0] * (dim - 1))).double())
        points = torch.zeros(2, dim, dtype=torch.float64)
        points[:, 0] = torch.tensor([-1.0, 1.0])
        law = NextToken(Context.of(attention, points), 0.7)
        mass = law.mass()
        assert mass.method == "importance sampling"
        assert abs(mass.value - scalar_mass(line, 0.7).absolute) < 3 * mass.standard_error
        assert mass.value - 1 > 5 * mass.standard_error  # and it is told from one
        signed = law.importance_weights(20_000)[1]
        assert abs(float(signed.mean()) - 1) < 3 * float(signed.std()) / 20_000**0.5

    def test_mass_is_exactly_one_when_certified(self):
        assert NextToken(Context.of(QUIET, 0.3 * tokens(0, 4, 4)), 1.0).mass() == (1.0, 0.0, "contraction")

    def test_two_dimensions_against_cubature(self):
        attention = CausalAttention.from_qk_matrix(torch.tensor([[1.6, 0.4], [-0.3, 1.2]]).double())
        law = NextToken(Context.of(attention, torch.tensor([[1.0, 0.3], [-0.8, -0.5], [0.2, 1.1]]).double()), 0.8)
        mean = law.past.values.sum(0).mean(0)
        grid = torch.linspace(-7, 7, 1201, dtype=torch.float64)
        u = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), dim=-1) + mean
        exact = float(law.log_prob(u).exp().sum()) * float(grid[1] - grid[0]) ** 2
        mass = law.mass(draws=100_000)
        assert abs(mass.value - exact) < 3 * mass.standard_error
        assert exact > 1

    @pytest.mark.parametrize("dim", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
    def test_mass_of_a_general_past_is_the_mean_number_of_roots_found(self, dim):
        attention = CausalAttention.from_qk_matrix(0.4 * tokens(5, dim, dim))
        law = NextToken(Context.of(attention, tokens(6, 8, dim)), 0.8)
        mass = law.mass()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            counts = [len(law.roots(e)) for e in 0.8 * torch.randn(60, dim).double()]
        roots = torch.tensor(counts).double()
        # Three of the two standard errors together; a third of a standard error for a constant count.
        error = (mass.standard_error**2 + float(roots.var()) / len(roots) + 1e-4) ** 0.5
        assert abs(mass.value - float(roots.mean())) < 3 * error

    def test_roots_in_several_dimensions_solve_and_differ(self):
        attention = CausalAttention.from_qk_matrix(torch.diag(torch.tensor([3.0, 2.0])).double())
        points = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]]).double()
        law = NextToken(Context.of(attention, points), 0.5)
        roots = law.roots(torch.zeros(2).double())
        assert len(roots) == 9  # three in each coordinate
        torch.testing.assert_close(roots - law.past.mean(roots), torch.zeros(9, 2).double(), atol=1e-10, rtol=0)
        assert torch.cdist(roots, roots)[~torch.eye(9, dtype=torch.bool)].min() > 0.1
        with pytest.raises(InputError, match="one past and one noise"):
            law.roots(torch.zeros(3, 2).double())

    def test_normalised_density_integrates_to_one_on_a_fold(self):
        line = NextToken(past(3.0, -1.0, 1.0), 0.5)
        grid = torch.linspace(-8, 8, 16001, dtype=torch.float64).unsqueeze(-1)
        total = float(line.log_prob(grid, normalised=True).exp().sum()) * 16 / 16000
        assert total == pytest.approx(1, abs=1e-4)  # the kink at a fold costs the square of a step
        assert float(line.log_prob(grid).exp().sum()) * 16 / 16000 == pytest.approx(line.mass().value, abs=1e-4)
        ruled = NextToken(past(3.0, -1.0, 1.0), 0.5, selection="uniform")
        assert torch.equal(ruled.log_prob(grid, normalised=True), ruled.log_prob(grid))
        batch = NextToken(Context.of(QUIET, tokens(0, 2, 4, 4)), 1.0)
        with pytest.raises(InputError, match="one past at a time"):
            batch.log_prob(tokens(1, 2, 4), normalised=True)

    def test_a_pyro_site(self):
        law = NextToken(Context.of(QUIET, 0.3 * tokens(0, 4, 4)), 1.0)
        with pyro.plate("tokens", 3):
            drawn = pyro.sample("u", law)
        assert drawn.shape == (3, 4)
        assert law.expand((2, 3)).sample().shape == (2, 3, 4)
        assert "length=4" in repr(law)

    def test_each_past_of_a_batch_draws_noise_of_its_own(self):
        law = NextToken(Context.of(QUIET, 0.3 * tokens(0, 5, 4, 4)), 1.0)
        torch.manual_seed(0)
        drawn = law.sample((400,))
        assert drawn.shape == (400, 5, 4)
        assert law.log_prob(drawn).shape == (400, 5)
        correlation = torch.corrcoef(drawn[..., 0].T) - torch.eye(5)
        assert correlation.abs().max() < 5 / 400**0.5  # five standard errors of a correlation that is zero

    @pytest.mark.parametrize("shape", [(), (1,), (5, 1)])
    def test_expand_never_shrinks(self, shape):
        with pytest.raises(InputError, match=r"batch shape \(5,\) does not expand to"):
            NextToken(Context.of(QUIET, tokens(0, 5, 4, 4)), 1.0).expand(shape)

    @pytest.mark.parametrize("scale", [1e-17, 1e-300])
    def test_noise_too_small_to_tell_solutions_apart(self, scale):
        for attention, points in ((scalar_attention(3.0), [[-1.0], [1.0]]), (QUIET, [[0.3] * 4, [-0.2] * 4])):
            with pytest.raises(InputError, match="those of different noise would coincide"):
                NextToken(Context.of(attention, torch.tensor(points).double()), scale)

    def test_only_one_dimension_has_exact_roots(self):
        law = NextToken(Context.of(QUIET, tokens(0, 4, 4)), 1.0)
        with pytest.raises(InputError, match="exact roots, cdf and icdf need one-dimensional tokens"):
            law.cdf(torch.zeros(4, 1).double())
        with pytest.raises(InputError, match="one past at a time"):
            NextToken(Context.of(QUIET, tokens(0, 2, 4, 4)), 1.0).mass()
        with pytest.raises(InputError, match="selection is 'first'"):
            NextToken(past(1.0, 0.0), 1.0, selection="first")


class TestProcess:
    def test_lazy_and_eager_paths_agree_to_the_bit(self):
        process = AttentionProcess(QUIET, 0.5)
        lazy = process.path(seed=3)
        pieces = [lazy[0:100], lazy[100:257], lazy[257:300]]  # noise comes in blocks of 256 tokens
        eager = process.path(seed=3)[0:300]
        assert torch.equal(torch.cat(pieces), eager)
        assert torch.equal(lazy[0:100], pieces[0])
        assert lazy.computed == 300
        assert not torch.equal(process.path(seed=4)[0:20], eager[:20])

    @pytest.mark.slow
    def test_ten_thousand_tokens(self):
        process = AttentionProcess(QUIET, 0.5)
        lazy = process.path(seed=0)
        for stop in (1, 7, 100, 2500, 9999, 10_000):
            lazy[0:stop]
        assert torch.equal(lazy[0:10_000], process.path(seed=0)[0:10_000])

    def test_a_path_is_the_solution_for_its_noise(self):
        process = AttentionProcess(QUIET, 0.5)
        u = process.path(seed=1)[0:300]
        noise = torch.cat([process.noise(1, 0), process.noise(1, 1)])[:300]
        torch.testing.assert_close(QUIET.residual(u), noise, atol=1e-11, rtol=0)
        assert float(noise.std()) == pytest.approx(0.5, abs=0.05)
        assert not torch.equal(process.noise(1, 0), process.noise(1, 1))
        assert not torch.equal(process.noise(1, 1), process.noise(2, 0))

    def test_indexing(self):
        path = AttentionProcess(scalar_attention(0.05), 1.0).path(seed=0)
        assert path[3].shape == (1,)
        assert torch.equal(path[0:8:2], path[0:8][::2])
        assert path[5:5].shape == (0, 1)
        for index, message in (
            (slice(0, None), "has no end"),
            (slice(-3, 4), "has no end"),
            (-1, "no end to count from"),
        ):
            with pytest.raises(InputError, match=message):
                path[index]

    def test_prefix_laws(self):
        process = AttentionProcess(QUIET, scale_tril=0.5 * torch.eye(4, dtype=torch.float64))
        u = process.path(seed=2)[0:6]
        assert process.prefix(6).event_shape == (6, 4)
        step = process.prefix(6).log_prob(u) - process.prefix(5).log_prob(u[:5])
        torch.testing.assert_close(process.conditional(u[:5]).log_prob(u[5]), step)

    def test_folded_paths_follow_the_named_rule(self):
        strict, lenient = (
            AttentionProcess(scalar_attention(1.5), 1.0, selection=rule) for rule in ("unique", "smallest_step")
        )
        raised = 0
        for seed in range(20):
            try:
                unique = strict.path(seed)[0:8]
            except SeveralSolutionsError:
                raised += 1
                assert torch.isfinite(lenient.path(seed)[0:8]).all()
            else:
                torch.testing.assert_close(lenient.path(seed)[0:8], unique, atol=1e-10, rtol=0)
        assert 0 < raised < 20

    def test_a_path_has_no_length(self):
        path = AttentionProcess(QUIET, 1.0).path(seed=0)
        assert path
        with pytest.raises(TypeError, match="a path has no end and so no length"):
            len(path)

    def test_batches_are_refused(self):
        with pytest.raises(InputError, match="one attention"):
            AttentionProcess(attention_like(0, batch=(2,)), 1.0)
        with pytest.raises(InputError, match="one noise scale"):
            AttentionProcess(QUIET, torch.ones(2, 1).double())


@pytest.mark.parametrize(("a", "consistent"), [(0.3, True), (3.0, False)])
def test_marginals_in_one_dimension_are_consistent_exactly_where_nothing_folds(a, consistent):
    """The law of u_1..3 integrated over u_3 against the law of u_1..2, by quadrature: equal, or off by the factor Z."""
    attention = scalar_attention(a)
    head, whole = LatentAttention(attention, 0.8, 2), LatentAttention(attention, 0.8, 3)
    u = torch.tensor([[-1.0], [1.0]]).double()

    def density(x):
        return float(whole.log_prob(torch.cat([u, torch.tensor([[x]], dtype=torch.float64)])).exp())

    factor = integrate.quad(density, -12, 12, points=[-1, 0, 1], limit=400)[0] / float(head.log_prob(u).exp())
    assert factor == pytest.approx(scalar_mass(Context.of(attention, u), 0.8).absolute, abs=1e-6)
    assert (abs(factor - 1) < 1e-6) == consistent
