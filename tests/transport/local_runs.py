"""Drives programs of the link contract over a local network, all ranks in turn in one thread."""

from collections.abc import Callable

from tests.transport.link_contract import Program, Sync
from transport.links import Link
from transport.local_link import LocalNetwork

MAX_TURNS = 200_000
"""Far more than any program takes: what does not end by then never does."""


class Barrier:
    """A barrier of generators."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._arrived = 0

    def __call__(self) -> Program:
        self._arrived += 1
        # The round this rank belongs to is over once all ranks have come as often as it has.
        target = -(-self._arrived // self._num_ranks) * self._num_ranks
        while self._arrived < target:
            yield


def run_programs(network: LocalNetwork, program: Callable[[Link, Sync], Program]) -> None:
    """Run the program at every rank to its end."""
    barrier = Barrier(len(network.links))
    running = [program(link, barrier) for link in network.links]
    for _ in range(MAX_TURNS):
        running = [steps for steps in running if _advance(steps)]
        if not running:
            return
    raise AssertionError(f"{len(running)} of {len(network.links)} ranks still wait after {MAX_TURNS} turns")


def _advance(steps: Program) -> bool:
    try:
        next(steps)
    except StopIteration:
        return False
    return True
