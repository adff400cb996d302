"""Counted randomness: uniform numbers that depend on the place of their use, not on earlier draws.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
ten rounds of multiplication and exclusive or over a 128-bit counter ``(position, episode low, episode high, stream)``
with the seed as 64-bit key. So an episode uses the same numbers for any number of rows, refill order or path.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The same (seed, episode, position) gives independent numbers in each stream.
TOKEN = 0  # the sampled token or action
PROMPT = 1  # the prompt of an episode
RESET = 2  # the seed for resetting a control environment
ANNOTATOR = 3  # a simulated annotator's choices and flips
CORPUS = 4  # the corpus of Reviews
TABLE = 5  # the tables of the enumerable task
ORDER = 6  # the order in which an annotator sees the responses of an item

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32 with ten rounds: from a counter, ``(4, ...)`` uint64 below 2**32, and a key of two 32-bit words to
    ``(4, ...)`` uint64 below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniform(seed: int, stream: int, episode: ArrayLike, position: ArrayLike = 0) -> NDArray[np.float64]:
    """Return float64 uniform numbers in [0, 1) with 53 random bits, a pure function of the four arguments.

    Args:
        seed: any non-negative integer below 2**64.
        stream: one of the constants of this module.
        episode: integers, any shape.
        position: integers below 2**32, broadcast against ``episode``.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
    episode, position = np.broadcast_arrays(np.asarray(episode, np.uint64), np.asarray(position, np.uint64))
    counter = np.stack(
        [position & _LOW, episode & _LOW, episode >> _HALF, np.full(episode.shape, stream, dtype=np.uint64)]
    )
    word = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    bits = ((word[0] << _HALF) | word[1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def integers(seed: int, stream: int, episode: ArrayLike, high: int, position: ArrayLike = 0) -> NDArray[np.int64]:
    """Return integers in [0, ``high``), by scaling :func:`uniform`."""
    return (uniform(seed, stream, episode, position) * high).astype(np.int64)
