"""The tree of NUTS against an independent recursion, and the pieces it is made of."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn.inference.methods.trajectory import Metric, Point, grow_trajectory, leapfrog, transition

THRESHOLD = 1000.0  # Stan's


def correlated(dim):
    """A normal distribution with very different widths and some correlation: log-density and gradient in NumPy."""
    scales = np.array([1.0, 0.3, 2.0])[:dim]
    covariance = np.diag(scales**2) + 0.1 * np.outer(scales, scales) * (1 - np.eye(dim))
    precision = np.linalg.inv(covariance)
    return lambda z: (-0.5 * z @ precision @ z, -precision @ z)


def banana(z):
    """Not normal, with strong curvature, in two dimensions or more."""
    bend = z[1] - z[0] ** 2
    gradient = np.zeros_like(z)
    gradient[0] = -z[0] + 4 * bend * z[0]
    gradient[1] = -2 * bend
    gradient[2:] = -z[2:]
    return -0.5 * z[0] ** 2 - bend**2 - 0.5 * float(z[2:] @ z[2:]), gradient


def batched(density):
    """The same for many chains of torch."""

    def value_and_gradient(z, rows):
        found = [density(point) for point in z.numpy()]
        return torch.tensor(np.array([v for v, _ in found])), torch.tensor(np.array([g for _, g in found]))

    return value_and_gradient


class Recursive:
    """NUTS of one chain by recursion, as in the papers: it shares nothing with the code under test but the random
    numbers, which it takes in the order of the leaves.
    """

    def __init__(self, density, covariance, step_size, uniforms, max_depth):
        self.density, self.covariance, self.step_size = density, covariance, step_size
        self.uniforms, self.max_depth = iter(uniforms), max_depth
        self.visited = []  # log-weights and points of the present subtree, in the order of their making
        self.leaves, self.accepted, self.diverging, self.inner_turns = 0, 0.0, False, 0

    def run(self, z, r):
        value, gradient = self.density(z)
        origin = (z, r, value, gradient)
        self.energy = 0.5 * r @ self.covariance @ r - value
        left = right = chosen = origin
        total, weight, depth = r, 0.0, 0
        while depth < self.max_depth:
            forward = next(self.uniforms) < 0.5
            self.visited = []
            piece = self.build(right if forward else left, 1 if forward else -1, depth)
            take = next(self.uniforms)
            depth += 1
            if piece is None:
                break
            candidate, piece_weight = self.draw()
            if math.log(take) < piece_weight - weight:
                chosen = candidate
            left, right = (left, piece[1]) if forward else (piece[1], right)
            total, weight = total + piece[2], np.logaddexp(weight, piece_weight)
            if self.turns(left[1], right[1], total):
                break
        return chosen, depth

    def build(self, point, direction, depth):
        """First and last point of a subtree and its sum of momenta; None where it turns or diverges."""
        if depth == 0:
            new = self.step(point, direction * self.step_size)
            error = 0.5 * new[1] @ self.covariance @ new[1] - new[2] - self.energy
            error = math.inf if math.isnan(error) else error
            self.leaves += 1
            self.accepted += min(1.0, math.exp(-error)) if error > 0 else 1.0
            self.visited.append((-error, new, next(self.uniforms)))
            if error > THRESHOLD:
                self.diverging = True
                return None
            return new, new, new[1]
        near = self.build(point, direction, depth - 1)
        far = near and self.build(near[1], direction, depth - 1)
        if not far:
            return None
        total = near[2] + far[2]
        if self.turns(near[0][1], far[1][1], total):
            self.inner_turns += 1
            return None
        return near[0], far[1], total

    def draw(self):
        """A point of the subtree with weights exp(-H), leaf after leaf."""
        weight, chosen = -math.inf, None
        for own, point, number in self.visited:
            weight = np.logaddexp(weight, own)
            if math.log(number) < own - weight:
                chosen = point
        return chosen, weight

    def turns(self, begin, end, total):
        inner = total - (begin + end) / 2
        return (self.covariance @ begin) @ inner <= 0 or (self.covariance @ end) @ inner <= 0

    def step(self, point, size):
        z, r, _, gradient = point
        r = r + size / 2 * gradient
        z = z + size * self.covariance @ r
        value, gradient = self.density(z)
        return z, r + size / 2 * gradient, value, gradient


def both(density, dim, step_size, seed, max_depth=6):
    """A transition by the code under test and by the recursion, from the same start and the same numbers."""
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(dim, dim)) * 0.4 + np.eye(dim)
    covariance, z, r = root @ root.T, 0.7 * generator.normal(size=dim), 1.5 * generator.normal(size=dim)
    uniforms = generator.random(2 * max_depth + 2**max_depth)
    reference = Recursive(density, covariance, step_size, uniforms, max_depth)
    chosen, depth = reference.run(z, r)
    value_and_gradient = batched(density)
    origin = torch.tensor(z)[None]
    point = Point(origin, torch.tensor(r)[None], *value_and_gradient(origin, None))
    stream = iter(uniforms)
    found, row = grow_trajectory(
        value_and_gradient,
        point,
        torch.tensor([step_size], dtype=torch.float64),
        Metric(torch.tensor(covariance)[None]),
        lambda: torch.tensor([next(stream)]),
        max_depth,
    )
    return (found, row), (chosen, depth, reference)


def check(result, expected):
    (found, row), (chosen, depth, reference) = result, expected
    assert float(row["n_steps"]) == reference.leaves
    assert float(row["tree_depth"]) == depth
    assert bool(row["diverging"]) == reference.diverging
    assert float(row["acceptance_rate"]) == pytest.approx(reference.accepted / reference.leaves, abs=1e-9)
    assert float(row["energy"]) == pytest.approx(reference.energy, abs=1e-9)
    # A trajectory amplifies rounding by a few digits.
    np.testing.assert_allclose(found.z[0], chosen[0], atol=1e-8)
    np.testing.assert_allclose(found.r[0], chosen[1], atol=1e-8)
    assert float(row["lp"]) == pytest.approx(chosen[2], abs=1e-8) == pytest.approx(float(found.value), abs=1e-8)
    np.testing.assert_allclose(found.gradient[0], chosen[3], atol=1e-7)


@settings(max_examples=60)
@given(dim=st.integers(1, 3), step_size=st.floats(0.02, 0.9), seed=st.integers(0, 2**31), bent=st.booleans())
def test_the_tree_is_that_of_the_recursion(dim, step_size, seed, bent):
    density = banana if bent and dim > 1 else correlated(dim)
    check(*both(density, dim, step_size, seed))


def test_every_kind_of_end_is_among_those_compared():
    """Saturated trees, turns of the whole, turns inside a subtree at several levels, and divergences."""
    ends = {"saturated": 0, "inner": 0, "outer": 0, "diverging": 0}
    for seed in range(40):
        for density, size in ((correlated(2), 0.05), (correlated(2), 0.2), (banana, 0.15), (banana, 1.9)):
            result, expected = both(density, 2, size, seed, max_depth=5)
            check(result, expected)
            _, depth, reference = expected
            ends["diverging"] += reference.diverging
            ends["inner"] += reference.inner_turns > 0 and depth > 3
            ends["outer"] += not reference.diverging and not reference.inner_turns and depth < 5
            ends["saturated"] += not reference.diverging and not reference.inner_turns and depth == 5
    assert min(ends.values()) >= 5, ends


def test_chains_do_not_meet():
    """Each of several chains goes the way that it goes alone, whatever becomes of the others."""
    density = batched(banana)
    generator = torch.Generator().manual_seed(0)
    z, r = torch.randn(2, 9, 2, generator=generator, dtype=torch.float64)
    steps = torch.linspace(0.05, 1.8, 9, dtype=torch.float64)
    covariance = torch.eye(2, dtype=torch.float64) * torch.linspace(0.5, 2, 9, dtype=torch.float64)[:, None, None]
    numbers = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)  # one for each chain, the same at every call
    asked = []

    def watched(points, rows):
        asked.append(rows.tolist())
        return density(points, rows)

    def grow(rows, value_and_gradient=density):
        point = Point(z[rows], r[rows], *density(z[rows], None))
        return grow_trajectory(
            value_and_gradient, point, steps[rows], Metric(covariance[rows]), lambda: numbers[rows], 5
        )

    together, rows = grow(torch.arange(9), watched)
    for chain in range(9):
        alone, row = grow(torch.tensor([chain]))
        for part, other in zip(together, alone, strict=True):
            torch.testing.assert_close(part[chain : chain + 1], other, rtol=1e-12, atol=1e-12)
        for name in row:
            torch.testing.assert_close(rows[name][chain : chain + 1], row[name], rtol=1e-12, atol=1e-12)
    # Only chains whose trajectory still grows are computed.
    assert sum(map(len, asked)) == int(rows["n_steps"].sum())
    assert len({len(numbers) for numbers in asked}) > 2


@pytest.mark.parametrize(("drop", "diverging"), [(999.0, False), (1001.0, True), (math.nan, True), (math.inf, True)])
def test_a_trajectory_diverges_where_its_energy_is_wrong_by_a_thousand(drop, diverging):
    def cliff(z, rows):
        return torch.where(z[:, 0] > 1, -drop, 0.0).double(), torch.zeros_like(z)

    zero = torch.zeros(1, 1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    origin = Point(zero, one[:, None], zero[:, 0], zero)
    found, row = grow_trajectory(cliff, origin, 2 * one, Metric(one[:, None, None]), lambda: 0.4 * one, 1)
    assert bool(row["diverging"]) == diverging
    assert float(row["n_steps"]) == 1
    assert float(row["acceptance_rate"]) == 0
    assert float(found.z) == 0  # it stays where it was


def test_a_transition_leaves_the_distribution_as_it_is():
    """20,000 chains begin with exact draws of log Gamma(2), of which three transitions make other exact draws."""

    def log_gamma(z, rows):
        return (2 * z - z.exp()).squeeze(-1), 2 - z.exp()

    chains = 20_000
    torch.manual_seed(1)
    z = torch.distributions.Gamma(2.0, 1.0).sample((chains, 1)).double().log()
    point = Point(z, torch.zeros_like(z), *log_gamma(z, None))
    metric = Metric(torch.full((chains, 1, 1), 0.5, dtype=torch.float64))
    generator = torch.Generator().manual_seed(2)
    moved = []
    for _ in range(3):
        point, _ = transition(log_gamma, point, torch.full((chains,), 0.9).double(), metric, generator, 4)
        moved.append(point.z)
    uniform = torch.special.gammainc(torch.tensor(2.0).double(), point.z.exp()).squeeze(-1).sort().values
    gap = (uniform - (torch.arange(chains) + 0.5) / chains).abs().max()
    assert float(gap) < 1.95 / chains**0.5  # Kolmogorov's bound at 1 in 1000
    assert float((moved[0] != z).double().mean()) > 0.9
    assert abs(float(torch.corrcoef(torch.cat([z, point.z], 1).mT)[0, 1])) < 0.2  # and it does move


class TestMetric:
    COVARIANCE = torch.tensor([[[2.0, 0.6], [0.6, 0.5]], [[1.0, 0.0], [0.0, 9.0]]], dtype=torch.float64)

    def test_velocity_and_energy(self):
        metric = Metric(self.COVARIANCE)
        r = torch.tensor([[1.0, -2.0], [0.5, 1.0]], dtype=torch.float64)
        expected = torch.stack([self.COVARIANCE[k] @ r[k] for k in range(2)])
        torch.testing.assert_close(metric.velocity(r), expected)
        torch.testing.assert_close(metric.kinetic(r), 0.5 * torch.stack([r[k] @ expected[k] for k in range(2)]))
        swapped = metric.at(torch.tensor([1, 0]))
        torch.testing.assert_close(swapped.velocity(r.flip(0)), expected.flip(0))

    def test_momenta_have_the_mass_matrix_as_their_covariance(self):
        chains = 40_000
        metric = Metric(self.COVARIANCE[:1].expand(chains, 2, 2))
        found = torch.cov(metric.draw(torch.Generator().manual_seed(0)).mT)
        expected = torch.linalg.inv(self.COVARIANCE[0])
        # Five standard errors of a covariance from as many draws.
        variance = expected.diagonal().outer(expected.diagonal()) + expected.square()
        assert bool(((found - expected).abs() < 5 * (variance / chains).sqrt()).all())
        again = metric.draw(torch.Generator().manual_seed(0))
        assert torch.equal(again, metric.at(torch.arange(chains)).draw(torch.Generator().manual_seed(0)))

    def test_turning_is_seen_at_either_end(self):
        metric = Metric(torch.eye(2, dtype=torch.float64).expand(5, 2, 2))
        ahead, back, aside = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0], [-1.0, 0], [0.0, 1]))
        left = torch.stack([ahead, ahead, back, ahead, ahead])
        right = torch.stack([ahead, back, ahead, ahead, aside])
        # The sum without half of the ends: forward, forward, forward, backward, along the first end only.
        inner = torch.stack([ahead, ahead, ahead, back, ahead])
        total = inner + 0.5 * (left + right)
        assert metric.turning(left, right, total).tolist() == [False, True, True, True, True]


def test_leapfrog_is_reversible_and_of_second_order():
    density = batched(banana)
    metric = Metric(torch.tensor([[[1.5, 0.2], [0.2, 0.7]]], dtype=torch.float64))
    z, r = torch.tensor([[0.3, -0.4]]).double(), torch.tensor([[1.0, 0.5]]).double()
    rows = torch.arange(1)
    origin = Point(z, r, *density(z, rows))

    def travel(point, size, count):
        for _ in range(count):
            point = leapfrog(density, point, torch.tensor([size]).double(), metric, rows)
        return point

    there = travel(origin, 0.1, 7)
    back = travel(there, -0.1, 7)
    for part, other in zip(back, origin, strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=1e-12)

    def error(size, count):
        end = travel(origin, size, count)
        energy = [float(metric.kinetic(p.r) - p.value) for p in (end, origin)]
        return abs(energy[0] - energy[1])

    assert error(0.1, 10) / error(0.05, 20) == pytest.approx(4, rel=0.3)
    half = r + 0.05 * origin.gradient
    expected = z + 0.1 * half @ metric.covariance[0]
    one = travel(origin, 0.1, 1)
    torch.testing.assert_close(one.z, expected)
    torch.testing.assert_close(one.r, half + 0.05 * density(expected, rows)[1])
