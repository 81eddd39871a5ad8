"""One direction of a local network, and what may befall the frames on it."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import NamedTuple

from transport import buffers

MAX_OVERTAKEN = 4


@dataclass(frozen=True, kw_only=True)
class FaultRates:
    """The chance, for each frame on its own, that something befalls it.

    A delayed frame takes up to `max_delay` virtual seconds; those behind it wait, except the reordered, which overtake
    up to MAX_OVERTAKEN others. A corrupted one has a byte changed, or its end cut off.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    reorder: float = 0.0
    delay: float = 0.0
    max_delay: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= (1 if field.name != "max_delay" else float("inf")):
                raise ValueError(f"{field.name} must be a chance from 0 to 1, or seconds from 0, got {value}")

    def __bool__(self) -> bool:
        return self != CALM


CALM = FaultRates()


class Parcel(NamedTuple):
    """A frame under way, and the virtual time at which it arrives."""

    due: float
    data: memoryview


class Wire:
    """Frames from one rank to another, in the order in which they arrive."""

    def __init__(self) -> None:
        self._parcels: list[Parcel] = []
        self._held: list[memoryview] | None = None
        self.cut = False
        self.rates = CALM

    def __len__(self) -> int:
        return len(self._parcels)

    @property
    def next_due(self) -> float:
        """When the first frame arrives."""
        return self._parcels[0].due

    def clear(self) -> None:
        """All that is under way is lost."""
        self._parcels.clear()
        if self._held is not None:
            self._held.clear()

    def sever(self, *, hold: bool) -> None:
        """From here on frames are lost or, with `hold`, wait for the mending, as they do where TCP sends them again."""
        self.cut = True
        self._held = (self._held or []) if hold else None

    def mend(self, now: float) -> None:
        """Frames travel again, those that waited first."""
        self.cut = False
        held, self._held = self._held or [], None
        for data in held:
            self._parcels.append(Parcel(now, data))

    def put(self, data: memoryview, now: float, rng: random.Random | None) -> list[str]:
        """A frame is sent; what befalls it, in words."""
        if self.cut:
            if self._held is not None:
                self._held.append(data)
            return []
        if not self.rates:
            self._parcels.append(Parcel(now, data))
            return []
        assert rng is not None, "faults are drawn from a seed"
        if rng.random() < self.rates.drop:
            return ["dropped"]
        if rng.random() >= self.rates.duplicate:
            return self._put_one(data, now, rng)
        return ["doubled", *self._put_one(_copy(data), now, rng), *self._put_one(data, now, rng)]

    def _put_one(self, data: memoryview, now: float, rng: random.Random) -> list[str]:
        rates, fates, due = self.rates, [], now
        if rng.random() < rates.delay:
            due += rng.random() * rates.max_delay
            fates.append(f"delayed until {due:.3f}")
        if rng.random() < rates.corrupt:
            fates.append("corrupted")
            data = _damaged(data, rng)
        place = len(self._parcels)
        if rng.random() < rates.reorder:
            fates.append("reordered")
            place = max(0, place - rng.randint(1, MAX_OVERTAKEN))
        self._parcels.insert(place, Parcel(due, data))
        return fates

    def arrived(self, now: float) -> int:
        """How many may be taken."""
        for count, parcel in enumerate(self._parcels):
            if parcel.due > now:
                return count
        return len(self._parcels)

    def take(self, count: int) -> list[memoryview]:
        """The first frames, off the wire."""
        taken = [parcel.data for parcel in self._parcels[:count]]
        del self._parcels[:count]
        return taken


def _copy(data: memoryview) -> memoryview:
    copy = buffers.new_buffer(data.nbytes).data
    copy[:] = data
    return copy


def _damaged(data: memoryview, rng: random.Random) -> memoryview:
    """One byte changed in place, or the end missing."""
    if rng.random() < 0.2:
        return data[: rng.randrange(data.nbytes)]
    data[rng.randrange(data.nbytes)] ^= rng.randint(1, 255)
    return data
