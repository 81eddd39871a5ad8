"""The whole mesh in one process: links that hand buffers to each other, in an order that a seed decides.

A full twin of the MPI link, bytes and credit windows included, so that a run of the mesh can be repeated exactly. Time
is virtual: it stands still until somebody advances it. Everything that can befall a mesh befalls it on command or, for
single frames, by chances drawn from the seed:

    network = LocalNetwork(4, seed=1, check_payload=True)
    network.disturb(FaultRates(drop=0.01, reorder=0.1))
    network.kill(2)                         # its peers hear of it 14 to 80 ms later
    while ...:
        network.advance(0.001)
        for rank, engine in engines.items():
            if network.may_run(rank):       # not dead, not stopped, and not too slow
                engine.turn()
    link = network.revive(2)                # a new life; every end's take_joined() names the other
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from transport.buffers import WireBuffer
from transport.flow_control import DEFAULT_MAX_QUEUED, DEFAULT_WINDOW
from transport.links import WindowedLink
from transport.local_wire import CALM, FaultRates, Wire

NOTICE_SECONDS = (0.014, 0.080)
"""How long MPI was seen to take to report a killed process."""
MAX_STORY = 10_000


class _Notice(NamedTuple):
    """At `due`, `peer` hears that this life of `rank` is over."""

    due: float
    peer: int
    rank: int
    incarnation: int


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
        check_payload: bool = False,
    ) -> None:
        if num_ranks < 1:
            raise ValueError(f"a network needs at least 1 rank, got {num_ranks}")
        self._random = None if seed is None else random.Random(seed)
        self._credit_window, self._max_queued, self._check_payload = credit_window, max_queued, check_payload
        self._dead: set[int] = set()
        self._stopped: set[int] = set()
        self._pace: dict[int, float] = {}
        self._notices: list[_Notice] = []
        self._wires = [
            {sender: Wire() for sender in range(num_ranks) if sender != receiver} for receiver in range(num_ranks)
        ]
        self._links = [self._new_link(rank, incarnation=0, peers=None) for rank in range(num_ranks)]
        self.now = 0.0
        self.story: deque[str] = deque(maxlen=MAX_STORY)
        """What befell ranks and frames, in order."""

    @property
    def links(self) -> tuple[LocalLink, ...]:
        """Each rank's end, of its latest life."""
        return tuple(self._links)

    # --- time

    def advance(self, seconds: float) -> None:
        """Time passes: delayed frames may arrive, and deaths are noticed."""
        self.now += seconds
        due = sorted(notice for notice in self._notices if notice.due <= self.now)
        self._notices = [notice for notice in self._notices if notice.due > self.now]
        for notice in due:
            self._give(notice)

    def next_arrival(self, rank: int) -> float | None:
        """When a turn of the rank may find a frame, or hear of a death; None while nothing is under way to it."""
        if rank in self._dead:
            return None
        dues = [wire.next_due for wire in self._wires[rank].values() if len(wire)]
        dues += [notice.due for notice in self._notices if notice.peer == rank]
        return min(dues, default=None)

    def may_run(self, rank: int) -> bool:
        """Whether the rank gets a turn now; for a slow one a matter of chance."""
        if rank in self._dead or rank in self._stopped:
            return False
        pace = self._pace.get(rank, 1.0)
        return pace >= 1.0 or self._need_random().random() < pace

    # --- what befalls ranks

    def kill(self, rank: int, *, noticed_after: float | None = None) -> None:
        """The rank dies. What it had sent may arrive until the receiver hears of its death.

        That takes `noticed_after` seconds; by default each peer's delay is drawn (none without a seed).
        """
        self._tell(f"rank {rank} is killed")
        self._dead.add(rank)
        self._stopped.discard(rank)
        self._pace.pop(rank, None)
        self._notices = [notice for notice in self._notices if notice.peer != rank]
        for wire in self._wires[rank].values():
            wire.clear()
        for peer in range(len(self._links)):
            if peer != rank and peer not in self._dead:
                delay = noticed_after
                if delay is None:
                    delay = 0.0 if self._random is None else self._random.uniform(*NOTICE_SECONDS)
                self._notices.append(_Notice(self.now + delay, peer, rank, self._links[rank].incarnation))
        self.advance(0.0)

    def revive(self, rank: int, *, incarnation: int | None = None, introduced: bool = True) -> LocalLink:
        """A process takes the dead rank's place, as its next life or a later one.

        It and its living peers may admit each other; unless `introduced`, only from when they are.
        """
        if rank not in self._dead:
            raise ValueError(f"rank {rank} lives: kill it first")
        self._dead.remove(rank)
        incarnation = self._links[rank].incarnation + 1 if incarnation is None else incarnation
        self._tell(f"rank {rank} begins life {incarnation}")
        link = self._links[rank] = self._new_link(rank, incarnation=incarnation, peers={})
        for peer in range(len(self._links)):
            if introduced and peer != rank and peer not in self._dead:
                self.introduce(rank, peer)
        return link

    def introduce(self, rank: int, other: int) -> None:
        """The processes of two ranks have met, and may admit each other."""
        for one, two in ((rank, other), (other, rank)):
            self._links[one].peer_joined(two, self._links[two].born)

    def stop(self, rank: int) -> None:
        """The rank stands still, as after SIGSTOP. Nobody is told; its frames wait."""
        self._tell(f"rank {rank} is stopped")
        self._stopped.add(rank)

    def resume(self, rank: int) -> None:
        """The rank goes on, as after SIGCONT."""
        self._tell(f"rank {rank} goes on")
        self._stopped.discard(rank)

    def slow(self, rank: int, pace: float) -> None:
        """The rank gets this part of its turns, 1 for all of them."""
        if not 0 < pace <= 1:
            raise ValueError(f"a pace is above 0 and at most 1, got {pace}: stop the rank instead")
        self._tell(f"rank {rank} runs at {pace:g} of its pace")
        self._pace[rank] = pace

    # --- what befalls wires

    def disturb(self, rates: FaultRates = CALM, pairs: Iterable[tuple[int, int]] | None = None) -> None:
        """Chances for frames sent from now on, between these (sender, receiver) or all of them."""
        if rates:
            self._need_random()
        if rates.corrupt and not self._check_payload:
            raise ValueError("damage to a payload would go unseen: make the network with check_payload=True")
        for sender, receiver in self._all_pairs() if pairs is None else pairs:
            self._wires[receiver][sender].rates = rates

    def cut(self, sender: int, receiver: int, *, hold: bool = False) -> None:
        """Nothing more gets from one to the other; with `hold` it waits for the mending."""
        self._tell(f"rank {sender} is cut off from {receiver}")
        self._wires[receiver][sender].sever(hold=hold)

    def heal(self, sender: int, receiver: int) -> None:
        """Frames get from one to the other again."""
        self._tell(f"rank {sender} reaches {receiver} again")
        self._wires[receiver][sender].mend(self.now)

    # --- for the links

    def carry(self, sender: LocalLink, receiver: int, data: memoryview) -> None:
        """Put a buffer on the wire. That of a life that is over goes nowhere."""
        if sender is not self._links[sender.rank] or sender.rank in self._dead or receiver in self._dead:
            return
        for fate in self._wires[receiver][sender.rank].put(data, self.now, self._random):
            self._tell(f"frame {sender.rank} -> {receiver} {fate}")

    def draw(self, receiver: LocalLink) -> list[tuple[int, memoryview]]:
        """Take off the wires what reaches the receiver now."""
        if receiver is not self._links[receiver.rank] or receiver.rank in self._dead:
            return []
        loaded = [(sender, wire) for sender, wire in self._wires[receiver.rank].items() if len(wire)]
        if self._random is not None:
            self._random.shuffle(loaded)
        arrived: list[tuple[int, memoryview]] = []
        for sender, wire in loaded:
            count = wire.arrived(self.now)
            if self._random is not None:
                count = self._random.randint(0, count)
            arrived += [(sender, data) for data in wire.take(count)]
        return arrived

    # --- inside

    def _new_link(self, rank: int, *, incarnation: int, peers: Mapping[int, int] | None) -> LocalLink:
        return LocalLink(
            self,
            rank,
            len(self._wires),
            incarnation=incarnation,
            peers=peers,
            credit_window=self._credit_window,
            max_queued=self._max_queued,
            check_payload=self._check_payload,
        )

    def _give(self, notice: _Notice) -> None:
        """A peer hears of a death; MPI delivers nothing more of a process that it has found gone."""
        if self._links[notice.rank].incarnation == notice.incarnation:
            self._wires[notice.peer][notice.rank].clear()
        self._links[notice.peer].peer_died(notice.rank, notice.incarnation)

    def _all_pairs(self) -> list[tuple[int, int]]:
        return [(sender, receiver) for receiver, wires in enumerate(self._wires) for sender in wires]

    def _need_random(self) -> random.Random:
        if self._random is None:
            raise ValueError("chance needs a seed: make the network with one")
        return self._random

    def _tell(self, event: str) -> None:
        self.story.append(f"{self.now:.3f} {event}")


class LocalLink(WindowedLink):
    """One rank's end of a LocalNetwork. Made by the network."""

    def __init__(
        self,
        network: LocalNetwork,
        rank: int,
        num_ranks: int,
        *,
        incarnation: int,
        peers: Mapping[int, int] | None,
        credit_window: int,
        max_queued: int,
        check_payload: bool,
    ) -> None:
        super().__init__(
            rank,
            num_ranks,
            incarnation=incarnation,
            peers=peers,
            credit_window=credit_window,
            max_queued=max_queued,
            check_payload=check_payload,
        )
        self._network = network
        self.born = incarnation

    def peer_died(self, peer: int, incarnation: int) -> None:
        """The network says that a life of a peer is over; of no interest once there is a later one."""
        if self._peers[peer].incarnation == incarnation:
            self._mark_lost(peer)

    def peer_joined(self, peer: int, incarnation: int) -> None:
        """The network says that a process of a peer, which began as `incarnation`, is within reach."""
        self._mark_joined(peer, incarnation)

    def _transmit(self, peer: int, buffer: WireBuffer) -> None:
        # The receiver owns what it gets, as it would after a real receive; so the buffer does not come back.
        self._network.carry(self, peer, buffer.data)

    def _arrivals(self) -> Iterable[tuple[int, memoryview]]:
        return self._network.draw(self)

    def _unfinished(self) -> bool:
        return False
