"""Starts that are feasible, and the curvature there."""

import pytest
import torch
from posteriors import Linear, bilinear_model, sequences

from probattn.errors import InputError
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.starts import curvature_guess, feasible_start

TARGET = LogDensity(Linear(), Linear.data())


def test_starts_are_feasible_where_a_wide_one_is_not():
    target = LogDensity(bilinear_model(sequences(), prior_scale=5.0), sequences())
    z = feasible_start(target, 4, 0, spread=1e6)  # noise scales overflow there, so that it has to shrink
    value, gradient = target.value_and_gradient(z)
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(gradient).all())
    assert len({tuple(row.tolist()) for row in z}) == 4
    halvings = torch.log2(1e6 / (z / feasible_start(target, 4, 0, spread=1.0)))
    torch.testing.assert_close(halvings, halvings.round(), rtol=0, atol=1e-9)
    with pytest.raises(InputError, match=r"no feasible start: .* not finite within 1e\+06 of the origin"):
        feasible_start(target, 1, 0, spread=1e6, tries=1)
    with pytest.raises(InputError, match=r"not finite within 5e\+05 of the origin"):
        feasible_start(target, 1, 0, spread=1e6, tries=2)


def test_starts_are_normal_around_the_origin():
    z = feasible_start(TARGET, 4000, 3)
    assert float(z.std()) == pytest.approx(0.1, rel=0.04)
    assert abs(float(z.mean())) < 0.005
    assert torch.equal(z, feasible_start(TARGET, 4000, 3))
    assert not torch.equal(z, feasible_start(TARGET, 4000, 4))


def test_one_bad_gradient_among_many_is_seen(monkeypatch):
    def bad(z, rows=None):
        gradient = torch.zeros_like(z)
        gradient[2, 1] = torch.nan if float(z.abs().max()) > 0.05 else 0.0
        return torch.zeros(len(z), dtype=z.dtype), gradient

    monkeypatch.setattr(TARGET, "value_and_gradient", bad)
    assert float(feasible_start(TARGET, 5, 0).abs().max()) <= 0.05


def test_the_curvature_of_a_normal_is_its_covariance():
    _, covariance = Linear.posterior()
    guess = curvature_guess(TARGET, torch.randn(3, 2, dtype=torch.float64))
    torch.testing.assert_close(guess, covariance.expand(3, 2, 2))


def test_a_flat_or_a_growing_direction_has_a_variance_of_one_or_less(monkeypatch):
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    hessian = turn @ torch.diag(torch.tensor([-4.0, 0.5, 9.0]).double()) @ turn.mT
    monkeypatch.setattr(TARGET, "hessian", lambda z: hessian.expand(2, 3, 3))
    expected = turn @ torch.diag(torch.tensor([1 / 4, 1.0, 1 / 9]).double()) @ turn.mT
    torch.testing.assert_close(curvature_guess(TARGET, torch.zeros(2, 3)), expected.expand(2, 3, 3))
