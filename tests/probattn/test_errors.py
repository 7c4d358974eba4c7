"""The checks of input refuse what they say they refuse, and let pass what lies at the bound."""

import math

import pytest

from probattn.errors import InputError, require_at_least, require_choice, require_positive, require_share

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (lambda x: require_choice("kind", x, ("hard", "soft")), ("hard", "soft"), ("sharp", "", None, 1, ["hard"])),
        (lambda x: require_at_least("steps", x), (1, 2, 1.0), (0, -1, 0.999, NAN, INF, -INF)),
        (lambda x: require_at_least("weight", x, 0), (0, 0.0, 5e-324), (-1, -5e-324, NAN, INF)),
        (lambda x: require_positive("rate", x), (1, 5e-324, 1e308), (0, 0.0, -0.0, -1, NAN, INF, -INF)),
        (lambda x: require_share("positions", x), (1, 1.0, 5e-324), (0, 0.0, 1 + 1e-15, -0.5, NAN, INF)),
    ],
    ids=["choice", "at least one", "at least zero", "positive", "share"],
)
def test_what_passes_and_what_does_not(check, right, wrong):
    for value in right:
        check(value)
    for value in wrong:
        with pytest.raises(InputError) as caught:
            check(value)
        assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda: require_choice("--kind", "c", ("a", "b")), "--kind is 'c'; use one of 'a', 'b'."),
        (lambda: require_at_least("chains", 0), "chains is 0; it must be at least 1."),
        (lambda: require_at_least("weight", -0.5, 0), "weight is -0.5; it must be finite and at least 0."),
        (lambda: require_positive("clip", NAN), "clip is nan; it must be positive and finite."),
        (lambda: require_share("windows", 2), "windows is 2; a share must lie in (0, 1]."),
    ],
)
def test_a_message_names_the_argument_its_value_and_the_remedy(check, words):
    with pytest.raises(InputError) as caught:
        check()
    assert str(caught.value) == words
