"""Step sizes, windows and mass matrices against their formulas written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probattn.inference.methods.adaptation import StepSize, window_covariance, window_ends


def test_step_sizes_follow_hoffman_and_gelman():
    """Their recursions summed up: the mean error is a plain sum, the averaged logarithm a product of decays."""
    generator = np.random.default_rng(0)
    acceptance = generator.random((30, 2))
    initial, target = torch.tensor([0.25, 3.0], dtype=torch.float64), 0.8
    adaptation = StepSize(initial, target)
    logs = []
    for t in range(1, 31):
        step = adaptation.update(torch.tensor(acceptance[t - 1]))
        mean_error = (target - acceptance[:t]).sum(0) / (t + 10)
        logs.append(np.log(2 * initial.numpy()) - math.sqrt(t) / 0.05 * mean_error)
        np.testing.assert_allclose(step, np.exp(logs[-1]), rtol=1e-12)
        # The first step has weight 1 by itself, so that the initial size is forgotten.
        weights = [s**-0.75 * math.prod(1 - later**-0.75 for later in range(s + 1, t + 1)) for s in range(1, t + 1)]
        assert sum(weights) == pytest.approx(1)
        np.testing.assert_allclose(adaptation.final(), np.exp(np.einsum("t,tc->c", weights, np.array(logs))), rtol=1e-9)
    assert adaptation.count == 30


def test_step_sizes_settle_where_the_acceptance_is_the_target():
    """Acceptance exp(-step): the answer is -log(target), for each chain from its own beginning."""
    adaptation = StepSize(torch.tensor([1e-3, 10.0], dtype=torch.float64), 0.7)
    step = torch.tensor([1e-3, 10.0], dtype=torch.float64)
    for _ in range(400):
        step = adaptation.update((-step).exp())
    np.testing.assert_allclose(adaptation.final(), -math.log(0.7), rtol=0.05)


def test_adaptation_goes_on_from_its_state():
    one, other = (StepSize(torch.tensor([0.5, 1.0]).double(), 0.8) for _ in range(2))
    one.update(torch.tensor([0.3, 0.9]).double())
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other.update(torch.ones(2).double()), one.update(torch.ones(2).double()), rtol=0, atol=0)
    assert torch.equal(one.final(), other.final())


@pytest.mark.parametrize(
    ("warmup", "ends"),
    [
        (1000, [150, 200, 300, 500, 900]),  # 15 %, then 50, 100, 200, and what is left before the last 10 %
        (200, [30, 40, 60, 100, 180]),
        (100, [15, 25, 45, 90]),
        (20, [3, 18]),
        (21, [4, 18]),
        (101, [16, 26, 46, 90]),  # shares of the warm-up are rounded up
    ],
)
def test_ends_of_the_windows(warmup, ends):
    assert window_ends(warmup) == ends


@given(st.integers(20, 5000))
def test_windows_double_and_fill_the_middle(warmup):
    ends = window_ends(warmup)
    assert ends[0] == math.ceil(0.15 * warmup)
    assert ends[-1] == warmup - math.ceil(0.1 * warmup)
    widths = np.diff(ends)
    assert (widths > 0).all()
    first = max(10, math.ceil(0.05 * warmup))
    expected = first * 2 ** np.arange(len(widths))
    np.testing.assert_array_equal(widths[:-1], expected[:-1])
    if len(widths) > 1:  # what is left is never less than a window that would double
        assert widths[-1] >= expected[-1]
    assert widths[-1] < 3 * expected[-1]


@pytest.mark.parametrize("together", [1, 2, 4])
def test_mass_matrices_are_shrunk_covariances(together):
    generator = np.random.default_rng(1)
    window = generator.normal(size=(7, 4, 3)) + generator.normal(size=(4, 1))[:, [0, 0, 0]]
    before = np.stack([np.eye(3) * (k // together + 1) for k in range(4)])
    found = window_covariance(torch.tensor(window), together, torch.tensor(before))
    for chain in range(4):
        first = chain // together * together
        pooled = window[:, first : first + together].reshape(-1, 3)
        n = len(pooled)
        expected = (n * np.cov(pooled.T) + 5 * before[chain]) / (n + 5)
        np.testing.assert_allclose(found[chain], expected, rtol=1e-12)
