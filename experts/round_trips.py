"""How long a peer takes to answer, and from when on it is late. Pure: times are arguments, in seconds.

What a call takes depends on its size (a chunk of a prompt asks for a thousand times what a decoded token asks for), so
each peer is known by size: powers of two of the slots that were asked for. Sizes not seen yet are estimated from the
nearest smaller one, as if time grew with the slots; that is more than it does.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_DEADLINE = 1.0
"""Before anything was seen."""
SHORTEST_DEADLINE = 0.1
LONGEST_DEADLINE = 5.0
PATIENCE = 3.0
SMOOTHING = 0.125
DEVIATIONS = 4.0


@dataclass(slots=True)
class _Size:
    """Smoothed mean of the round trips, and of how far they were from it (RFC 6298)."""

    mean: float
    deviation: float

    def add(self, seconds: float) -> None:
        off = seconds - self.mean
        self.mean += SMOOTHING * off
        self.deviation += 2 * SMOOTHING * (abs(off) - self.deviation)

    @property
    def expected(self) -> float:
        return self.mean + DEVIATIONS * self.deviation


class RoundTrips:
    """The round trips to one peer."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def observe(self, num_slots: int, seconds: float) -> None:
        """A call of so many slots was answered after so many seconds."""
        size = num_slots.bit_length()
        known = self._sizes.get(size)
        if known is None:
            self._sizes[size] = _Size(mean=seconds, deviation=seconds / 2)
        else:
            known.add(seconds)

    def deadline(self, num_slots: int) -> float:
        """Seconds after which a call of so many slots is late."""
        known = self._sizes.get(num_slots.bit_length())
        expected = self._guess(num_slots.bit_length()) if known is None else known.expected
        return min(max(SHORTEST_DEADLINE, PATIENCE * expected), LONGEST_DEADLINE)

    def _guess(self, size: int) -> float:
        smaller = max((seen for seen in self._sizes if seen < size), default=None)
        if smaller is not None:
            return float(self._sizes[smaller].expected * 2 ** (size - smaller))
        larger = min(self._sizes, default=None)
        return FIRST_DEADLINE / PATIENCE if larger is None else self._sizes[larger].expected
