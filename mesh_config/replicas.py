"""Where the further copies of a layer's experts go. Places are indices of the ranks that host experts."""

from __future__ import annotations

from collections.abc import Sequence

Copies = tuple[tuple[int, ...], ...]
"""The places of each expert, the first copy's in front."""


def spread_copies(first: Sequence[int], totals: Sequence[int], *, machines: Sequence[str], start: int) -> Copies:
    """Copies until place p hosts `totals[p]` experts; `first[e]` is the place of expert e's first copy.

    In this order: no expert has two copies at one place; none has two copies more than another; where another machine
    has room, copies lie on different machines; the copies of one place's experts lie at as many others as possible, so
    that their load does not fall on one when it is lost. `start` is the place that chooses first.
    """
    spread = _Spread(first, machines)
    quota = [total - first.count(place) for place, total in enumerate(totals)]
    turn = 0
    while any(quota):
        place = (start + turn) % len(quota)
        turn += 1
        if quota[place]:
            quota[place] -= 1
            spread.give(place)
    spread.even_out()
    return tuple(tuple(places) for places in spread.places)


class _Spread:
    """The copies given so far. `first` is never changed."""

    def __init__(self, first: Sequence[int], machines: Sequence[str]) -> None:
        self._first = first
        self._machines = machines
        self.places = [[place] for place in first]
        self._of_place: list[list[int]] = [[] for _ in machines]
        for expert, place in enumerate(first):
            self._of_place[place].append(expert)
        self._given = [0] * len(machines)  # copies of a place's experts
        self._pairs: dict[tuple[int, int], int] = {}

    def give(self, place: int) -> None:
        """One more copy to a place: of the experts of the place that has the fewest copies, which are not here yet."""
        choices = []
        for source, experts in enumerate(self._of_place):
            absent = [expert for expert in experts if place not in self.places[expert]]
            if absent:
                choices.append((self._cost(source, place, absent), absent))
        _, absent = min(choices)
        expert = min(absent, key=lambda e: (len(self.places[e]), self._on_machine(e, place)))
        source = self._first[expert]
        self.places[expert].append(place)
        self._given[source] += 1
        self._pairs[source, place] = self._pairs.get((source, place), 0) + 1

    def _cost(self, source: int, place: int, absent: Sequence[int]) -> tuple[int, int, float, int, int]:
        fewest = min(len(self.places[expert]) for expert in absent)
        crowded = min(self._on_machine(expert, place) for expert in absent if len(self.places[expert]) == fewest)
        share = self._given[source] / len(self._of_place[source])
        return fewest, crowded, share, self._pairs.get((source, place), 0), (source - place) % len(self._machines)

    def _on_machine(self, expert: int, place: int) -> int:
        """Copies of the expert on the machine of a place."""
        return sum(self._machines[other] == self._machines[place] for other in self.places[expert])

    def even_out(self) -> None:
        """The last places to choose may have found nothing but experts that had copies enough: let them swap."""
        while (pair := self._unequal()) is not None and self._swap(*pair):
            pass

    def _unequal(self) -> tuple[int, int] | None:
        """An expert with at least two copies fewer than another one."""
        fewest = min(range(len(self.places)), key=lambda e: len(self.places[e]))
        most = max(range(len(self.places)), key=lambda e: len(self.places[e]))
        return (fewest, most) if len(self.places[most]) - len(self.places[fewest]) > 1 else None

    def _swap(self, poor: int, rich: int) -> bool:
        """One copy of `rich` becomes one of `poor`, at once or by way of another expert's."""
        for place in self.places[rich][1:]:
            if place not in self.places[poor]:
                self._replace(rich, place, poor)
                return True
        for place in self.places[rich][1:]:
            for between, places in enumerate(self.places):
                others = [other for other in places[1:] if other not in self.places[poor]]
                if between != poor and place not in places and others:
                    self._replace(rich, place, between)
                    self._replace(between, others[0], poor)
                    return True
        return False

    def _replace(self, old: int, place: int, new: int) -> None:
        self.places[old].remove(place)
        self.places[new].append(place)
