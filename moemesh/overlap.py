"""How many micro-batches a step is cut into: one, or two of which one computes while the frames of the other travel.

A second one can save no more than a step of one spends waiting with nothing to do; it costs a second reading of every
weight that both halves touch, and each call twice. None of it is guessed. Steps of about the same number of rows are
one class, and each class goes its way:

    one --(waiting is a worthwhile share of the step)--> try two --(quicker)--> two --(after a while)--> try one
    one <----------------------------------(not quicker)-- try two              two <--(not quicker)-- try one

A host whose ranks have more threads than it has cores is no place for it: while a rank waits there, another computes.
Only the number of micro-batches depends on these measurements, never a result. Pure: times are arguments, in seconds.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

SAMPLES = 8
"""Steps that a median is taken over, and that a trial lasts at most."""
ENOUGH = 3
"""Steps after which a trial ends if even the quickest of them was slower than the median of before."""
LOYALTY = 256
"""Steps between a choice and the next trial of the other."""
WORTHWHILE = 0.05
"""Share of a step below which waiting is not worth a trial."""


def _samples() -> deque[float]:
    return deque(maxlen=SAMPLES)


@dataclass(kw_only=True)
class _Class:
    """What steps of one class have cost: seconds a row in 1 and in 2 micro-batches, and in 1 the share that waited."""

    seconds: dict[int, deque[float]] = field(default_factory=lambda: {1: _samples(), 2: _samples()})
    waiting: deque[float] = field(default_factory=_samples)
    parts: int = 1
    on_trial: bool = False
    num_steps: int = LOYALTY  # since the last choice: there was none, so that a trial may come at once

    def note(self, parts: int, seconds_per_row: float, waiting: float) -> None:
        self.seconds[parts].append(seconds_per_row)
        if parts == 1:
            self.waiting.append(waiting)
        if parts != self.parts:
            return
        self.num_steps += 1
        if self.on_trial and (self.num_steps >= SAMPLES or self._hopeless()):
            self.on_trial, self.num_steps = False, 0
            self.parts = 2 if median(self.seconds[2]) < median(self.seconds[1]) else 1
        elif not self.on_trial and self.num_steps >= LOYALTY and self._worth_a_trial():
            self.on_trial, self.num_steps = True, 0
            self.parts = 3 - self.parts
            self.seconds[self.parts].clear()

    def _hopeless(self) -> bool:
        tried, before = self.seconds[self.parts], self.seconds[3 - self.parts]
        return len(tried) >= ENOUGH and bool(before) and min(tried) > median(before)

    def _worth_a_trial(self) -> bool:
        return self.parts == 2 or (len(self.waiting) == SAMPLES and median(self.waiting) > WORTHWHILE)


class OverlapRule:
    """Chooses among `allowed` numbers of micro-batches, at the leader of a group; its plans tell the others."""

    def __init__(self, allowed: tuple[int, ...]) -> None:
        self._allowed = allowed
        self._classes: dict[int, _Class] = {}

    def num_parts(self, num_rows: int) -> int:
        """Into how many micro-batches a step of so many rows is to be cut."""
        return self._allowed[0] if len(self._allowed) == 1 else self._class(num_rows).parts

    def note(self, num_rows: int, parts: int, *, seconds: float, waited: float) -> None:
        """A step in so many parts has taken `seconds`; `waited` of them its leader had nothing to do."""
        if len(self._allowed) > 1 and seconds > 0:
            self._class(num_rows).note(parts, seconds / num_rows, waited / seconds)

    def _class(self, num_rows: int) -> _Class:
        return self._classes.setdefault(num_rows.bit_length(), _Class())
