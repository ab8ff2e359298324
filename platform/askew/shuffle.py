"""Shuffling by arithmetic: any place of a permutation of n, and any random number, without making the rest.

So a training step costs its batch, not the size of the catalogue, and depends on the seed and on itself alone.
Knows nothing of what is shuffled.
"""

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
ROUNDS = 4


def mixed(numbers: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers by a key (splitmix64: Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = numbers + np.uint64((key + 1) * 0x9E3779B97F4A7C15 % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def uniform(numbers: Numbers, key: int) -> NDArray[np.float64]:
    """A random number in [0, 1) for each of n numbers and a key."""
    words: NDArray[np.uint64] = mixed(numbers.astype(np.uint64), key) >> np.uint64(11)
    return np.asarray(words, dtype=np.float64) * 2.0**-53


def permuted(places: Numbers, n: int, key: int) -> Numbers:
    """What stands at these places, each in [0, n), of the key's permutation of n.

    A Feistel network over the next power of four, walked on from results beyond n until they are within (Black
    and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): at most 4 n steps in all.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = places.astype(np.uint64)
    left = np.arange(len(out))
    while len(left):
        high, low = out[left] >> half, out[left] & mask
        for turn in range(ROUNDS):
            high, low = low, high ^ (mixed(low, key * ROUNDS + turn) & mask)
        out[left] = (high << half) | low
        left = left[out[left] >= n]
    return out.astype(np.int64)
