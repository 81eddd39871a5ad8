"""The whole mesh in one process: links that hand buffers to each other, in an order that a seed decides.

A full twin of the MPI link, bytes and credit windows included, so that a run of the mesh can be repeated exactly.
"""

import random
from collections import deque
from collections.abc import Iterable

from transport.buffers import WireBuffer
from transport.flow_control import DEFAULT_MAX_QUEUED, DEFAULT_WINDOW
from transport.links import WindowedLink

Wire = deque[memoryview]


class LocalNetwork:
    """The wires between `num_ranks` links. One thread drives all of them.

    With a seed, each poll delivers a random part of what lies on each wire, senders shuffled: any interleaving that
    keeps each pair's order. Without one, everything that was sent arrives at the next poll.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        seed: int | None = None,
        credit_window: int = DEFAULT_WINDOW,
        max_queued: int = DEFAULT_MAX_QUEUED,
    ) -> None:
        if num_ranks < 1:
            raise ValueError(f"a network needs at least 1 rank, got {num_ranks}")
        self._random = None if seed is None else random.Random(seed)
        self._dead: set[int] = set()
        self._wires: list[dict[int, Wire]] = [
            {sender: deque() for sender in range(num_ranks) if sender != receiver} for receiver in range(num_ranks)
        ]
        self.links = tuple(
            LocalLink(self, rank, num_ranks, credit_window=credit_window, max_queued=max_queued)
            for rank in range(num_ranks)
        )

    def lose(self, rank: int) -> None:
        """The rank dies: nothing of it, nor of what lies on its wires, arrives any more. Its peers learn of it now."""
        self._dead.add(rank)
        for receiver, wires in enumerate(self._wires):
            for sender, wire in wires.items():
                if rank in (sender, receiver):
                    wire.clear()
        for link in self.links:
            link.peer_died(rank)

    def carry(self, sender: int, receiver: int, data: memoryview) -> None:
        """Put a buffer on the wire."""
        if sender not in self._dead and receiver not in self._dead:
            self._wires[receiver][sender].append(data)

    def draw(self, receiver: int) -> list[tuple[int, memoryview]]:
        """Take off the wires what reaches the receiver now."""
        loaded = [(sender, wire) for sender, wire in self._wires[receiver].items() if wire]
        if self._random is not None:
            self._random.shuffle(loaded)
        arrived = []
        for sender, wire in loaded:
            count = len(wire) if self._random is None else self._random.randint(0, len(wire))
            arrived += [(sender, wire.popleft()) for _ in range(count)]
        return arrived


class LocalLink(WindowedLink):
    """One rank's end of a LocalNetwork. Made by the network."""

    def __init__(
        self, network: LocalNetwork, rank: int, num_ranks: int, *, credit_window: int, max_queued: int
    ) -> None:
        super().__init__(rank, num_ranks, credit_window=credit_window, max_queued=max_queued)
        self._network = network

    def peer_died(self, peer: int) -> None:
        """The network says that a peer died."""
        self._mark_lost(peer)

    def _transmit(self, peer: int, buffer: WireBuffer) -> None:
        # The receiver owns what it gets, as it would after a real receive; so the buffer does not come back.
        self._network.carry(self.rank, peer, buffer.data)

    def _arrivals(self) -> Iterable[tuple[int, memoryview]]:
        return self._network.draw(self.rank)

    def _unfinished(self) -> bool:
        return False
