"""One line of the page "against published numbers": their number, ours, its interval, and whether the two agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from probattn.errors import InputError

__all__ = ["Comparison", "Estimate", "estimate", "power_fit"]

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A number with the ends of its 95 % interval; all three are equal where nothing is random.

    Attributes:
        value: the number.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A number without sampling error."""
        return cls(value, value, value)

    def holds(self, value: float) -> bool:
        """True if the interval contains a value; NaN is in none."""
        return self.low <= value <= self.high


class Comparison(NamedTuple):
    """Their number against ours.

    Attributes:
        name: short name, unique.
        quantity: what is compared, in words.
        theirs: the published number.
        ours: the measured one.
        reference: arXiv identifier.
        agrees: True if ours confirms theirs by the rule that its measurement states.
        why: reason for a difference; empty where there is none.
    """

    name: str
    quantity: str
    theirs: float
    ours: Estimate
    reference: str
    agrees: bool
    why: str = ""

    def measured(self) -> dict[str, float]:
        """Return the numbers by name, as a claim lists them."""
        numbers = {self.name: self.ours.value, f"{self.name}_theirs": self.theirs}
        if self.ours.low != self.ours.high:
            numbers |= {f"{self.name}_low": self.ours.low, f"{self.name}_high": self.ours.high}
        return numbers


def estimate(draws: Sequence[float] | Array) -> Estimate:
    """Mean of independent draws with its 95 % interval by Student's t.

    Args:
        draws: at least two numbers.

    Raises:
        InputError: fewer than two.

    Example:
        >>> estimate([1.0, 2.0, 3.0]).value
        2.0
    """
    numbers = np.asarray(draws, dtype=float)
    if numbers.size < 2:
        raise InputError(f"an interval needs at least two draws; there are {numbers.size}.")
    half = float(student.ppf(0.975, numbers.size - 1)) * float(numbers.std(ddof=1)) / math.sqrt(numbers.size)
    mean = float(numbers.mean())
    return Estimate(mean, mean - half, mean + half)


def power_fit(sizes: Sequence[float] | Array, values: Array, correction: float | None = None) -> Array:
    r"""Exponent s of :math:`y \sim C n^s` by least squares on logarithms.

    .. math:: \log y = s \log n + b + c\, n^{-\omega}

    Args:
        sizes: n, (K,).
        values: y, positive, ``(..., K)``.
        correction: omega, the power at which the leading correction falls off; None omits it.

    Returns:
        s, ``(...)``.

    Example:
        >>> round(float(power_fit([1, 2, 4], np.array([3.0, 6.0, 12.0]))), 6)
        1.0
    """
    n = np.asarray(sizes, dtype=float)
    columns = [np.log(n), np.ones_like(n)]
    if correction is not None:
        columns.append(n**-correction)
    solution = np.linalg.lstsq(np.stack(columns, -1), np.log(values).reshape(-1, n.size).T, rcond=None)[0]
    exponents: Array = solution[0].reshape(np.shape(values)[:-1])
    return exponents
