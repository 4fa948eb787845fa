"""A random order of so many samples, of which any place is found alone: no array of their number is drawn.

A Feistel network (Luby and Rackoff 1988) permutes the numbers of 2k bits; numbers beyond the last sample are sent
through it again until they come to one that there is (cycle walking, Black and Rogaway 2002): four times in the worst
case on average. Integers alone decide, so the order is the same on every machine and with every version of numpy.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # of splitmix64's finaliser


class Permutation:
    """The numbers 0 .. count−1 in an order drawn from `seed`, whole numbers of at least 0."""

    def __init__(self, count: int, *seed: int) -> None:
        self.count = count
        self._half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        text = " ".join(map(str, seed)).encode()
        self._keys = np.frombuffer(blake2b(text, digest_size=8 * ROUNDS).digest(), "<u8").astype(np.uint64)

    def __len__(self) -> int:
        return self.count

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers that stand at `places`, each from 0 to count−1."""
        found = self._permuted(places.astype(np.uint64))
        while (beyond := found >= self.count).any():
            found[beyond] = self._permuted(found[beyond])
        return found.astype(np.int64)

    def __getitem__(self, place: int) -> int:
        return int(self.at(np.array([place], np.int64))[0])

    def _permuted(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return (left << self._half) | right


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele et al. 2014)."""
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))
