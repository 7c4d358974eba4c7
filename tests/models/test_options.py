"""Options as dataclasses: what is refused, and what is only written differently."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probattn.errors import InputError
from probattn.models.options import Range, Seed, as_plain, check_options, field_types


@dataclass(frozen=True)
class Part:
    size: Annotated[int, Range(least=1)] = 2

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class Whole:
    steps: Annotated[int, Range(least=1)] = 10
    rate: Annotated[float, Range(above=0, most=1)] = 0.5
    rank: Annotated[int | None, Range(least=1)] = None
    kind: Literal["hard", "soft"] = "hard"
    kinds: tuple[Literal["hard", "soft"], ...] = ()
    out: Path = Path("runs")
    name: str = "a"
    resume: bool = False
    seed: Seed = 0
    part: Part | Range = field(default_factory=Part)

    def __post_init__(self):
        check_options(self)


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ({"steps": np.int64(4)}, 4),
        ({"rate": 1}, 1.0),
        ({"rate": np.float32(0.25)}, 0.25),
        ({"rank": None}, None),
        ({"kinds": ["soft", "hard"]}, ("soft", "hard")),
        ({"out": "elsewhere"}, Path("elsewhere")),
        ({"part": Range(least=0)}, Range(least=0)),
    ],
)
def test_what_is_only_written_differently_becomes_the_type_of_its_field(given, held):
    (name,) = given
    value = getattr(Whole(**given), name)
    assert value == held
    assert type(value) is type(held)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, r"steps is 0; it must be at least 1\."),
        ({"steps": 1.5}, r"steps is 1.5; it must be an integer\."),
        ({"steps": True}, "steps is True; it must be an integer"),
        ({"steps": None}, "steps is None; it must be an integer"),
        ({"steps": "10"}, "steps is '10'; it must be an integer"),
        ({"steps": [10]}, r"steps is \[10\]; it must be an integer"),
        ({"steps": np.arange(3)}, r"steps is array\(\[0, 1, 2\]\); it must be an integer"),
        ({"steps": np.zeros((20, 20))}, "steps is a ndarray; it must be an integer"),
        ({"steps": torch.tensor(3)}, r"steps is tensor\(3\); it must be an integer"),
        ({"rate": 0.0}, "rate is 0.0; it must be above 0 and at most 1"),
        ({"rate": 1.01}, "rate is 1.01; it must be above 0 and at most 1"),
        ({"rate": float("nan")}, "rate is nan; it must be above 0"),
        ({"rate": float("inf")}, "rate is inf; it must be above 0"),
        ({"rate": "fast"}, "rate is 'fast'; it must be a number"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"kind": "sharp"}, "kind is 'sharp'; use one of 'hard', 'soft'"),
        ({"kind": None}, "kind is None; use one of 'hard', 'soft'"),
        ({"kind": ["hard"]}, r"kind is \['hard'\]; use one of"),
        ({"kinds": "hard"}, "kinds is 'hard'; it must be a list"),
        ({"kinds": ["sharp"]}, "kinds is 'sharp'; use one of"),
        ({"out": None}, "out is None; it must be a path"),
        ({"name": 3}, "name is 3; it must be text"),
        ({"resume": 1}, "resume is 1; it must be True or False"),
        ({"seed": -1}, "seed is -1; it must be from 0 to 2147483647"),
        ({"part": "soft"}, "part is 'soft'; it must be of type Part or Range"),
        ({"part": None}, "part is None; it must be of type Part or Range"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(InputError, match=message) as refused:
        Whole(**given)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=message):
        replace(Whole(), **given)


bounds = st.none() | st.integers(-5, 5)


@given(bounds, bounds, bounds, bounds, st.integers(-9, 9) | st.floats())
def test_a_range_is_its_bounds(least, above, most, below, value):
    finite = value == value and abs(value) != float("inf")
    expected = finite and all(
        bound is None or holds
        for bound, holds in (
            (least, least is not None and value >= least),
            (above, above is not None and value > above),
            (most, most is not None and value <= most),
            (below, below is not None and value < below),
        )
    )
    limits = Range(least, above, most, below)
    assert (value in limits) == expected
    for bound in filter(lambda bound: bound is not None, (least, above, most, below)):
        if not (bound in (above, below) and least is not None and most is not None):
            assert str(bound) in str(limits)


def test_plain_values():
    plain = as_plain(Whole(kinds=["soft"], out="x"))
    assert plain["kinds"] == ["soft"]
    assert plain["out"] == "x"
    assert plain["part"] == {"size": 2}


def test_the_annotations_are_those_of_the_source():
    assert field_types(Whole)["steps"] == Annotated[int, Range(least=1)]
