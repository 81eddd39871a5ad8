"""When the expert service may hold a layer back, so that calls about to come are computed in the same batch.

Each batch reads the weights of every expert that it touches, so two callers apart read more than both together. A
layer is held only while a caller is missing that was there for the layer before, and at most for

    min(what reading less weight saves, the median of how far apart calls of one layer came before)

after its first call. Where ranks have more threads than there are cores, the core of a rank that waits computes for
another: waiting costs next to nothing there, whereas callers that are apart by more than what one layer saves would
stay apart for good. There a layer is held, instead, for

    min(PATIENCE times the median of how long callers took from one call to the next, LONGEST times its computation)

so that callers at most a layer apart come together, and stay together. That holds for few rows an expert, where reading
weights is what takes time. As waiting makes calls come later, two ranks might wait for each other's callers again and
again: patience that was in vain is given up for some layers, twice as many each time.

Neither is a barrier: who was waited for in vain is not waited for again until it has come. Pure: times are arguments,
in seconds.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

SAMPLES = 32
FEWEST_SAMPLES = 4
SMOOTHING = 0.1
PATIENCE = 1.5
LONGEST = 4.0
FEW_ROWS = 4
MOST_IMPATIENT = 256

Caller = tuple[int, int]
"""Rank and micro-batch."""


@dataclass(kw_only=True)
class _Wave:
    """The calls of one layer that belong together: one of each caller. `computed`: the first of them, at least."""

    first: float
    last: float
    computed: bool = False
    callers: set[Caller] = field(default_factory=set)


class HoldRule:
    """Watches calls come, by layer, and says until when a layer may wait for more. `patient`: waiting is free."""

    def __init__(self, layers: Sequence[int], num_experts: int, *, patient: bool = False) -> None:
        self._before = {layer: layers[place - 1] for place, layer in enumerate(layers)}
        self._num_experts = num_experts
        self._patient = patient
        self._waves: dict[int, _Wave] = {}
        self._seen: dict[Caller, tuple[int, int]] = {}
        self._skews: deque[float] = deque(maxlen=SAMPLES)
        self._seconds_per_expert: float | None = None
        self._last_call: dict[Caller, float] = {}
        self._gaps: deque[float] = deque(maxlen=SAMPLES)
        self._in_vain = self._impatient = 0  # layers for which patience was given up last, and still is

    def came(self, layer: int, caller: Caller, num_slots: int, now: float) -> None:
        """A call for a layer has come."""
        self._seen[caller] = (layer, num_slots)
        if caller in self._last_call:
            self._gaps.append(now - self._last_call[caller])
        self._last_call[caller] = now
        wave = self._waves.get(layer)
        if wave is None or caller in wave.callers:
            if wave is not None and len(wave.callers) > 1:
                self._skews.append(wave.last - wave.first)
            wave = self._waves[layer] = _Wave(first=now, last=now)
        wave.callers.add(caller)
        wave.last = now

    def until(self, layer: int, num_slots: int) -> float:
        """When the layer's calls, of so many slots, must be computed; long ago where nobody is missing."""
        missing = self._missing(layer)
        if not missing or len(self._skews) < FEWEST_SAMPLES:
            return 0.0
        if self._patient and not self._impatient and num_slots <= FEW_ROWS * self._num_experts:
            longest = LONGEST * self._touched(num_slots) * (self._seconds_per_expert or 0.0)
            return self._waves[layer].first + min(PATIENCE * median(self._gaps), longest)
        return self._waves[layer].first + min(median(self._skews), self._saving(num_slots, missing))

    def computed(self, layer: int, num_slots: int, seconds: float) -> None:
        """A layer's calls were computed in so many seconds. Who was missing is not waited for again."""
        missing = self._missing(layer)
        for caller in missing:
            del self._seen[caller]
        wave = self._waves[layer]
        if not wave.computed:  # else these calls are those that were late
            self._judge_patience(in_vain=bool(missing))
        wave.computed = True
        each = seconds / max(1.0, self._touched(num_slots))
        before = self._seconds_per_expert
        self._seconds_per_expert = each if before is None else before + SMOOTHING * (each - before)

    def _judge_patience(self, *, in_vain: bool) -> None:
        if self._impatient:
            self._impatient -= 1
        elif in_vain:
            self._in_vain = self._impatient = min(MOST_IMPATIENT, 2 * self._in_vain + 1)
        else:
            self._in_vain = 0

    def _missing(self, layer: int) -> list[Caller]:
        before, here = self._before[layer], self._waves[layer].callers
        return [caller for caller, (seen, _) in self._seen.items() if seen == before and caller not in here]

    def _saving(self, num_slots: int, missing: Sequence[Caller]) -> float:
        coming = sum(self._seen[caller][1] for caller in missing)
        twice = self._touched(num_slots) + self._touched(coming) - self._touched(num_slots + coming)
        return twice * (self._seconds_per_expert or 0.0)

    def _touched(self, num_slots: int) -> float:
        """Experts that so many slots touch, if each is as likely as another."""
        return self._num_experts * (1.0 - (1.0 - 1.0 / self._num_experts) ** num_slots)
