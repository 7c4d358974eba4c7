"""The smallest run that the options allow, by every method: every bound is reached, and the run ends with a verdict."""

from dataclasses import fields
from typing import Annotated, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from posteriors import sequences

from probattn.errors import InputError
from probattn.inference.fit import METHODS, FitOptions, fit
from probattn.models.options import Range

pytestmark = pytest.mark.usefixtures("undrawn")


def smallest(kind):
    """Every option that counts something at its lower bound."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        bounds = [part for part in get_args(hint) if isinstance(part, Range)] if get_origin(hint) is Annotated else []
        if bounds and get_args(hint)[0] is int and bounds[0].least is not None:
            found[name] = int(bounds[0].least)
    return found


def options(name, folder, **changes):
    method = METHODS[name](**{**smallest(METHODS[name]), **changes})
    return FitOptions(data=folder / "hidden.npy", method=method, out=folder / name, device="cpu")


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "hidden.npy", sequences()[:1, :3].numpy())
    return tmp_path


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of ArviZ, on statistics of so few draws
@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_smallest_run_ends_with_a_verdict(folder, name):
    _, diagnosis = fit(options(name, folder))
    assert diagnosis.verdict != "reliable" or name == "map"
    words = " ".join(finding.words for finding in diagnosis.findings)
    assert ("draws are too few to compare with the prior" in words) == (name != "map")
    for file in ("fit.nc", "summary.csv", "diagnosis.json", "config.json"):
        assert (folder / name / file).is_file()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_less_than_the_smallest_is_refused_before_anything_is_run(folder, name):
    bounds = smallest(METHODS[name])
    assert bounds
    for option, least in bounds.items():
        with pytest.raises(InputError, match=f"{option} is {least - 1}; it must be (at least|from) {least}"):
            options(name, folder, **{option: least - 1})
    assert {field.name for field in fields(METHODS[name])} >= bounds.keys()
