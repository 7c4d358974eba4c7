from hypothesis import given
from hypothesis import strategies as st

from probattn.inference.runtime.seeds import derived_seed


@given(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 10**6), max_size=4))
def test_seeds_are_seeds(seed, numbers):
    found = derived_seed(seed, *numbers)
    assert 0 <= found < 2**63
    assert found == derived_seed(derived_seed(seed, *numbers[:1]), *numbers[1:])


def test_parts_differ():
    found = {derived_seed(seed, step, shard) for seed in range(5) for step in range(20) for shard in range(4)}
    assert len(found) == 400
    assert derived_seed(3) == 3
