"""Seeds of the parts of a run, from its one seed."""

from __future__ import annotations

__all__ = ["derived_seed"]


def derived_seed(seed: int, *numbers: int) -> int:
    """Seed of one part of a run, such as a step or a shard of it.

    Args:
        seed: seed of the run.
        numbers: numbers of the part, the outermost first.

    Returns:
        A seed below 2^63, a function of the arguments alone.

    Example:
        >>> derived_seed(0, 7), derived_seed(1, 7)
        (7, 1000010)
    """
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return seed
