"""Broken symmetry of bounded memory: the closed form, the flow, and paths that are continued."""

import math

import numpy as np
import pytest

from probattn.errors import InputError
from probattn.inference.studies import bounded_broken
from probattn.models.bounded_limit import bounded_limit


@pytest.mark.parametrize("kappa", [1.8, 2.2])
def test_beyond_three_halves_the_mean_settles_at_the_closed_form_on_either_side(kappa):
    expected = math.sqrt(2 * kappa - 3)
    assert bounded_broken.settle(kappa, 8.0, 1.2 * expected).mean == pytest.approx(expected, rel=0.03)
    assert bounded_broken.settle(kappa, 8.0, -1.2 * expected).mean == pytest.approx(-expected, rel=0.03)


def test_below_it_returns_to_zero_and_has_the_density_of_the_symmetric_state():
    found = bounded_broken.settle(0.9, 2.0, 1.5)
    assert abs(found.mean) < 1e-4
    limit = bounded_limit(bounded_broken._line(0.9, 2.0), 1.0)
    assert float((found.density * found.points.square()).sum() * (found.points[1] - found.points[0])) == pytest.approx(
        limit.square, rel=1e-3
    )
    assert found.slope < 0.9


def test_the_flow_near_zero_has_the_exponent_of_the_linear_one():
    growth = bounded_limit(bounded_broken._line(0.9, 2.0), 1.0).growth
    # Between late times the slowest deviation alone is left.
    first = bounded_broken.flow_of_mean(0.9, 2.0, 0.01, (1, 20)) * math.log(20) / 0.01
    last = bounded_broken.flow_of_mean(0.9, 2.0, 0.01, (1, 400)) * math.log(400) / 0.01
    assert math.log((1 + last) / (1 + first)) / math.log(20) == pytest.approx(growth - 1, abs=2e-3)


def test_paths_follow_the_flow_of_mean_field_and_not_that_of_another_contraction():
    found = bounded_broken.simulated_flow(0.9, 2.0, 1.5, lengths=(100, 300), pairs=6)
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    expected = bounded_broken.flow_of_mean(0.9, 2.0, 1.5, (100, 300))
    assert abs(float(found.mean()) - expected) < 5 * error + 0.02
    assert abs(bounded_broken.flow_of_mean(0.2, 2.0, 1.5, (100, 300)) - expected) > 5 * error + 0.02


def test_a_map_that_folds_has_no_state():
    with pytest.raises(InputError, match="folds"):
        bounded_broken.settle(9.0, 2.0, 0.1)
    assert math.isnan(bounded_broken._settled_mean(9.0, 2.0))
    assert 1.0 < bounded_broken.folding_contraction(1.0) < 2.0
    assert math.isnan(bounded_broken.symmetry_breaking(1.0))  # it folds while zero is still stable


def test_the_figure_has_the_diagram_the_order_and_the_flow(monkeypatch):
    monkeypatch.setattr(bounded_broken, "simulated_flow", lambda *args, **options: np.array([0.0, 0.1]))
    monkeypatch.setattr(bounded_broken, "symmetry_breaking", lambda radius: 1.5)
    monkeypatch.setattr(bounded_broken, "folding_contraction", lambda radius: 3.0)
    monkeypatch.setattr(bounded_broken, "_settled_mean", lambda kappa, radius: 0.5)
    figure = bounded_broken.plot_broken(radii=(1.0, 4.0), branches=(4.0,), simulated=((0.9, 1.0),))
    assert [axis.get_xlabel() for axis in figure.axes] == ["radius ρ / σ", "κ = aρ²", "mean of the past, m / σ"]
