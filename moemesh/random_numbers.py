"""Counter-based random numbers: pure functions of a seed and a position, so that a restarted request draws the same."""

from __future__ import annotations

_MASK32 = 0xFFFFFFFF
# Keeps the random numbers of draws and of derived seeds apart: the last word of the counter.
_DRAW, _CHOICE_SEED = 0, 1


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice `choice` of a request with `n` choices: 63 bits, so that it fits every wire format."""
    words = philox((choice & _MASK32, choice >> 32 & _MASK32, 0, _CHOICE_SEED), seed)
    return (words[0] << 31) ^ words[1]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that belongs to a position: 53 bits, from (seed, position) alone."""
    words = philox((position & _MASK32, position >> 32 & _MASK32, 0, _DRAW), seed)
    return float((words[0] << 21) ^ (words[1] >> 11)) / 2.0**53


def philox(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random words of 32 bits for a counter and a key of 64 bits.

    Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK32, seed >> 32 & _MASK32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3
