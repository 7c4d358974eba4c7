"""What the figures share: colours, the kind of array, characters as labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLOURS", "Array", "visible"]

Array = NDArray[np.float64]

# Okabe and Ito's palette, told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def visible(character: str) -> str:
    """A character as a tick label: white space by a sign, and the dollar sign kept from matplotlib's mathematics."""
    return {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "$": r"\$"}.get(character, character)
