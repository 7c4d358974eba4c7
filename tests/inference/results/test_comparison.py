"""Leaving one sequence out, by weights and by refitting; and what forgetting the Jacobian costs."""

import math

import numpy as np
import pytest
import torch
from posteriors import bilinear_model, sequences, short_sequences

from probattn.errors import InputError
from probattn.inference.methods.laplace import LaplaceConfig, fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.results.comparison import AS_ASKED, compare, leave_one_out, standard_error, variants
from probattn.models import EmbeddingModel

U = sequences()[:6, :16]


def laplace(name, target):
    return fit_laplace(target, LaplaceConfig(draws=1000))


@pytest.fixture(scope="module")
def compared():
    return {entry.name: entry for entry in compare(variants(bilinear_model(U), ("jacobian",)), U, laplace)}


def test_weights_agree_with_refitting_without_the_sequence():
    model = bilinear_model(U)
    target = LogDensity(model, U)
    flat = fit_laplace(target, LaplaceConfig(draws=4000)).z
    elpd, khat = leave_one_out(target.evaluate(flat[0])["u"].numpy()[None])
    for n in range(3):
        rest = torch.cat([U[:n], U[n + 1 :]])
        without = fit_laplace(LogDensity(model, rest), LaplaceConfig(draws=4000)).z[0]
        exact = LogDensity(model, U[n : n + 1]).evaluate(without)["u"].squeeze(-1)
        expected = float(torch.logsumexp(exact, 0)) - math.log(4000)
        # Both are Monte Carlo estimates of the log of a mean over a few thousand draws.
        assert abs(elpd[n] - expected) < 0.1 + 0.2 * (khat[n] > 0.5)


def test_standard_errors_are_those_of_a_sum():
    """By a table and by repetition: a sum of N numbers varies sqrt(N) times as much as one of them."""
    assert standard_error(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx((4 * 5 / 3) ** 0.5)
    generator = np.random.default_rng(0)
    sums = generator.normal(scale=2.0, size=(20_000, 30)).sum(1)
    estimates = [standard_error(row) for row in generator.normal(scale=2.0, size=(2000, 30))]
    assert np.mean(estimates) == pytest.approx(sums.std(), rel=0.03)


def test_both_errors_of_a_comparison_are_standard_errors_of_sums():
    u = short_sequences()
    models = {"tight": bilinear_model(u, prior_scale=0.1), "loose": bilinear_model(u, prior_scale=1.0)}
    drawn = {name: fit_laplace(LogDensity(model, u), LaplaceConfig(draws=100)) for name, model in models.items()}
    found = {entry.name: entry for entry in compare(models, u, lambda name, target: drawn[name])}
    pointwise = {}
    for name, model in models.items():
        terms = LogDensity(model, u).evaluate(drawn[name].z[0])["u"]
        pointwise[name] = leave_one_out(terms.numpy()[None])[0]
        assert found[name].elpd == pytest.approx(pointwise[name].sum())
        assert found[name].elpd_se == pytest.approx((3 * pointwise[name].var(ddof=1)) ** 0.5)
    best, other = sorted(found.values(), key=lambda entry: -entry.elpd)
    gap = pointwise[other.name] - pointwise[best.name]
    assert (best.difference, best.difference_se) == (0.0, 0.0)
    assert other.difference == pytest.approx(gap.sum())
    assert other.difference_se == pytest.approx((3 * gap.var(ddof=1)) ** 0.5)
    assert list(found) == [best.name, other.name]


def test_predictive_weights_are_normalised():
    fitted = np.random.default_rng(0).normal(size=(2, 300, 4))
    constant = np.full_like(fitted, -3.0)
    np.testing.assert_allclose(leave_one_out(fitted, constant)[0], -3.0)


def test_the_naive_posterior_predicts_worse_and_folds(compared):
    naive, asked = compared["without the Jacobian"], compared[AS_ASKED]
    assert asked.difference == 0.0
    assert naive.difference < -2 * naive.difference_se
    assert naive.folded > 0.5
    assert asked.folded == 0.0
    assert "behind the best" in str(naive)
    assert "fold at the data" in str(naive)


def test_the_likelihood_that_was_fitted_makes_the_weights_and_the_density_judges():
    """Judged by its own formula the naive fit would look better than it is: its formula is no density."""
    naive = bilinear_model(U, jacobian=False)
    target = LogDensity(naive, U)
    flat = fit_laplace(target, LaplaceConfig(draws=1000)).z[0]
    own = target.evaluate(flat)["u"].numpy()[None]
    proper = LogDensity(naive.altered(jacobian=True), U).evaluate(flat)["u"].numpy()[None]
    assert leave_one_out(own)[0].sum() > leave_one_out(own, proper)[0].sum() + 10


def test_variants():
    model = EmbeddingModel(8, 2, heads=2, value_dim=2, prior_scale=0.3)
    found = variants(model, ("jacobian", "mask", "heads"))
    assert list(found) == [AS_ASKED, "without the Jacobian", "inclusive mask", "1 head", "3 heads"]
    assert found["inclusive mask"].mask == "inclusive"
    assert found["3 heads"].heads == 3
    assert found["3 heads"].prior_scale == 0.3
    assert not found["without the Jacobian"].jacobian
    with pytest.raises(InputError, match="cannot compare 'length'; choose among jacobian, mask, heads"):
        variants(model, ("length",))
    with pytest.raises(InputError, match=r"comparing masks needs value and output maps \(--value-dim\)"):
        variants(bilinear_model(U), ("mask",))


def test_strict_against_inclusive_and_heads():
    u = short_sequences()
    model = EmbeddingModel(8, 2, value_dim=2, prior_scale=0.3)

    def quick(name, target):
        return fit_laplace(target, LaplaceConfig(draws=200, correct=False))

    found = compare(variants(model, ("mask",)), u, quick)
    assert {entry.name for entry in found} == {AS_ASKED, "inclusive mask"}
    assert found[0].elpd >= found[1].elpd
    assert all(np.isfinite([entry.elpd, entry.elpd_se]).all() for entry in found)


def test_one_sequence_is_refused():
    with pytest.raises(InputError, match="one sequence only"):
        compare({"a": bilinear_model(U)}, U[:1], laplace)
    with pytest.raises(InputError, match="one sequence only"):
        leave_one_out(np.zeros((1, 10, 1)))
