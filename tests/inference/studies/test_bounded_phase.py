"""The phase diagram: mean field and simulation agree on a contraction, and the map that folds is left out."""

import math

import numpy as np
import pytest

from probattn.inference.studies import bounded_phase


def test_paths_have_the_exponent_of_mean_field():
    (expected,) = bounded_phase.mean_field_exponents([2.0], [0.6])[0]
    assert bounded_phase.simulated_exponent(2.0, 0.6, sequences=12, last=8000) == pytest.approx(expected, abs=0.03)


def test_the_diagram_has_a_curve_per_radius_and_no_number_where_the_map_folds(monkeypatch):
    monkeypatch.setattr(bounded_phase, "simulated_exponent", lambda radius, kappa: 0.5)
    found = bounded_phase.mean_field_exponents([0.5, 8.0], [0.9, 3.0])
    assert np.isnan(found).tolist() == [[False, True], [False, False]]
    assert found[1, 0] < 1 < found[1, 1]
    monkeypatch.setattr(bounded_phase, "mean_field_exponents", lambda radii, contractions: found)
    axis = bounded_phase.plot_phases([0.5, 8.0], [0.9, 3.0]).axes[0]
    assert len(axis.lines) == 6
    assert math.isclose(axis.lines[4].get_ydata()[0], 1.0)
