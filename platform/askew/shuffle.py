"""Scrambling: numbers that look like chance, and are the same for the same key.

Knows nothing of what is numbered.
"""

import numpy as np
from numpy.typing import NDArray


def mixed(numbers: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers by a key (splitmix64: Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = numbers + np.uint64((key + 1) * 0x9E3779B97F4A7C15 % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
