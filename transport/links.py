"""The seam between the mesh and what carries its bytes: a link sends frames to peers and hands out those that came."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from transport.buffers import BufferPool, WireBuffer
from transport.errors import ProtocolError
from transport.flow_control import DEFAULT_MAX_QUEUED, DEFAULT_WINDOW, CreditWindow
from transport.frame import Frame, Header, Kind, Label, decode, encode, seal
from transport.peers import Peer
from transport.trace import Trace, now


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkStats:
    """Counters since the link was made; `queued` and `in_flight` are frames now, over all peers.

    `dropped` counts frames that were meant for a peer that is lost or forgotten; of the frames that came,
    `protocol_errors` those that were refused or damaged, `stale` those from or to a life that is over, `duplicates`
    those that had come before.
    """

    frames_sent: dict[Kind, int]
    bytes_sent: int
    frames_received: int
    bytes_received: int
    dropped: int
    protocol_errors: int
    stale: int
    duplicates: int
    queued: int
    in_flight: int


class Link(Protocol):
    """One rank's end of the mesh. Used by one thread; no method ever waits for a peer.

    A link talks with one life of each peer: with the one that it was told to admit. What comes from a life that is
    over is dropped; what comes from a later one waits until that is admitted.
    """

    @property
    def rank(self) -> int: ...

    @property
    def incarnation(self) -> int:
        """Which of this rank's lives the link is in."""
        ...

    @property
    def num_ranks(self) -> int: ...

    def post(self, peer: int, frame: Frame) -> None:
        """Send a copy of the frame to a peer (not to oneself); its tensors may be reused on return.

        Frames to one peer arrive in order. Beyond the credit window they wait in the link's own queue; Overloaded when
        that is full. A frame to a peer that is lost or forgotten is dropped and counted. That a frame left says nothing
        about its arrival.
        """
        ...

    def poll(self) -> list[Frame]:
        """The frames that arrived, in order for each sender; the caller owns their tensors. Also drives the sends."""
        ...

    def take_lost(self) -> list[int]:
        """Peers whose admitted life was found dead since the last call; each life is named once."""
        ...

    def take_joined(self) -> list[tuple[int, int]]:
        """Processes that came within reach since the last call, and wait to be admitted: the rank of each, and the
        incarnation that it began as."""
        ...

    def forget(self, peer: int) -> None:
        """This life of the peer is over: what waits for it is dropped, what still comes from it as well."""
        ...

    def admit(self, peer: int, incarnation: int) -> None:
        """Talk with this life of the peer. ValueError if it is not later than the one before."""
        ...

    def renew(self, incarnation: int) -> None:
        """This rank has a new life: nothing of the old one is sent or heard any more. ValueError if it is not later."""
        ...

    def tick(self, now: float) -> None:
        """Time passes (monotonic seconds): ask peers for acknowledgements that may have been lost."""
        ...

    def frames_sent(self, kind: Kind) -> int: ...

    def stats(self) -> LinkStats: ...

    def arriving(self) -> bool:
        """Some frame is half received: the sooner the next poll, the sooner it is here."""
        ...

    def idle(self) -> bool:
        """Nothing queued, nothing half sent, nothing half received."""
        ...

    def close(self) -> None:
        """Drop what is queued. Waits for nobody."""
        ...


TICK_SECONDS = 0.05


class WindowedLink(ABC):
    """What every link does alike: encoding, credit windows, lives, counters. A carrier moves whole buffers.

    A carrier may call `_sent` only when a buffer is no longer read, `_mark_lost` when it finds a peer dead.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        *,
        incarnation: int = 0,
        peers: Mapping[int, int] | None = None,
        credit_window: int = DEFAULT_WINDOW,
        max_queued: int = DEFAULT_MAX_QUEUED,
        check_payload: bool = False,
        trace: Trace | None = None,
    ) -> None:
        """`peers`: the incarnations to talk with from the start; by default the first life of everybody."""
        self._rank = rank
        self._num_ranks = num_ranks
        self._incarnation = incarnation
        self._credit_window = credit_window
        self._max_queued = max_queued
        self._check_payload = check_payload
        self._trace = trace
        self._peers = {peer: Peer(self._new_window()) for peer in range(num_ranks) if peer != rank}
        self._pool = BufferPool()
        self._early: list[tuple[int, memoryview]] = []
        self._unreported: list[int] = []
        self._joined: list[tuple[int, int]] = []
        self._next_tick = 0.0
        self._frames_sent = dict.fromkeys(Kind, 0)
        self._bytes_sent = self._frames_received = self._bytes_received = 0
        self._dropped = self._protocol_errors = self._stale = self._duplicates = 0
        for peer, life in (dict.fromkeys(self._peers, 0) if peers is None else peers).items():
            self._peers[peer].admit(life, self._new_window())

    @abstractmethod
    def _transmit(self, peer: int, buffer: WireBuffer) -> None:
        """Start to send; owns the buffer until it calls `_sent`."""

    @abstractmethod
    def _arrivals(self) -> Iterable[tuple[int, memoryview]]:
        """Advance unfinished transfers; the complete buffers that came, with the peer they came from."""

    @abstractmethod
    def _unfinished(self) -> bool:
        """Some transfer has begun and not ended."""

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    @property
    def incarnation(self) -> int:
        """See Link."""
        return self._incarnation

    def post(self, peer: int, frame: Frame) -> None:
        """See Link."""
        state = self._peers.get(peer)
        if state is None:
            raise ValueError(f"rank {self._rank} of {self._num_ranks} cannot post to {peer}: name another rank")
        header = frame.header
        if header.sender != self._rank or header.kind in (Kind.CREDIT, Kind.PROBE):
            raise ValueError(f"rank {self._rank} cannot post a {header.kind.name} frame of sender {header.sender}")
        if not state.sendable:
            self._dropped += 1
            return
        began = now() if self._trace is not None else None
        state.window.push((header.kind, encode(frame, self._pool.take)))
        self._pump(peer, state)
        if self._trace is not None:
            nbytes = sum(tensor.nbytes for tensor in frame.tensors)
            self._trace.span(f"post {header.kind.name}", began, to=peer, layer=header.layer, nbytes=nbytes)

    def poll(self) -> list[Frame]:
        """See Link."""
        frames: list[Frame] = []
        active: set[int] = set()
        if self._early:
            early, self._early = self._early, []
            for source, data in early:
                self._accept(source, data, frames)
                active.add(source)
        for source, data in self._arrivals():
            self._frames_received += 1
            self._bytes_received += data.nbytes
            self._accept(source, data, frames)
            active.add(source)
        for peer in active:
            state = self._peers[peer]
            if state.sendable:
                self._pump(peer, state)
                if state.window.must_tell():
                    self._send_alone(peer, state, Kind.CREDIT, 0)
        return frames

    def take_joined(self) -> list[tuple[int, int]]:
        """See Link."""
        joined, self._joined = self._joined, []
        return joined

    def forget(self, peer: int) -> None:
        """See Link."""
        self._dropped += self._peers[peer].forget()

    def admit(self, peer: int, incarnation: int) -> None:
        """See Link."""
        state = self._peers[peer]
        state.admit(incarnation, self._new_window())
        # The loss of the life before must not be taken for that of this one.
        self._unreported = [lost for lost in self._unreported if lost != peer]
        self._early += [(peer, data) for data in state.take_early()]

    def renew(self, incarnation: int) -> None:
        """See Link."""
        if incarnation <= self._incarnation:
            raise ValueError(f"rank {self._rank} is in life {self._incarnation} and cannot begin life {incarnation}")
        self._incarnation = incarnation
        self._early.clear()
        for state in self._peers.values():
            self._dropped += len(state.window.clear())
            state.early.clear()
            state.window = self._new_window()

    def tick(self, now: float) -> None:
        """See Link."""
        if now < self._next_tick:
            return
        self._next_tick = now + TICK_SECONDS
        for peer, state in self._peers.items():
            if state.window.queued and state.window.probe_due(now):
                self._send_alone(peer, state, Kind.PROBE, state.window.sequence)

    def take_lost(self) -> list[int]:
        """See Link."""
        lost, self._unreported = self._unreported, []
        return lost

    def frames_sent(self, kind: Kind) -> int:
        """Frames of one kind that left this rank."""
        return self._frames_sent[kind]

    def stats(self) -> LinkStats:
        """See LinkStats."""
        return LinkStats(
            frames_sent=dict(self._frames_sent),
            bytes_sent=self._bytes_sent,
            frames_received=self._frames_received,
            bytes_received=self._bytes_received,
            dropped=self._dropped,
            protocol_errors=self._protocol_errors,
            stale=self._stale,
            duplicates=self._duplicates,
            queued=sum(state.window.queued for state in self._peers.values()),
            in_flight=sum(state.window.in_flight for state in self._peers.values()),
        )

    def arriving(self) -> bool:
        """See Link. Nothing, for a carrier that hands over whole buffers."""
        return False

    def idle(self) -> bool:
        """See Link."""
        return not self._unfinished() and not any(state.window.queued for state in self._peers.values())

    def close(self) -> None:
        """See Link."""
        for state in self._peers.values():
            state.window.clear()

    def _new_window(self) -> CreditWindow[tuple[Kind, WireBuffer]]:
        return CreditWindow(self._credit_window, self._max_queued)

    def _accept(self, source: int, data: memoryview, frames: list[Frame]) -> None:
        """Decode one buffer and book it; it is handed out if it is for this life and had not come yet."""
        peer = self._peers[source]
        try:
            frame, label = decode(data, whole=self._check_payload)
            kind = frame.header.kind
            if frame.header.sender != source:
                raise ProtocolError(f"frame from rank {source} says it is from {frame.header.sender}")
            if not peer.hears(label, self._incarnation):
                self._stale += not peer.keep_early(label, self._incarnation, data, self._credit_window)
                return
            peer.window.acknowledged(label.acknowledged)
            if kind is Kind.PROBE:
                peer.window.probed(label.sequence)
            elif kind is not Kind.CREDIT:
                if peer.window.arrived(label.sequence):
                    frames.append(frame)
                else:
                    self._duplicates += 1
        except ProtocolError:
            self._protocol_errors += 1

    def _pump(self, peer: int, state: Peer) -> None:
        """Send what the window allows."""
        window = state.window
        while (item := window.pop()) is not None:
            kind, buffer = item
            self._seal_and_transmit(peer, state, kind, buffer, window.sequence)

    def _send_alone(self, peer: int, state: Peer, kind: Kind, sequence: int) -> None:
        """An acknowledgement, or the wish for one, on a frame that takes no credit."""
        buffer = encode(Frame(Header(kind, self._rank)), self._pool.take)
        self._seal_and_transmit(peer, state, kind, buffer, sequence)

    def _seal_and_transmit(self, peer: int, state: Peer, kind: Kind, buffer: WireBuffer, sequence: int) -> None:
        label = Label(self._incarnation, state.incarnation, sequence, state.window.tell())
        seal(buffer, label, whole=self._check_payload)
        self._frames_sent[kind] += 1
        self._bytes_sent += buffer.size
        self._transmit(peer, buffer)

    def _sent(self, buffer: WireBuffer) -> None:
        self._pool.give_back(buffer)

    def _mark_lost(self, peer: int) -> None:
        """Found dead: nothing is sent any more. What it sent before is still heard until it is forgotten."""
        if peer == self._rank or self._peers[peer].lost:
            return
        state = self._peers[peer]
        state.lost = True
        self._dropped += len(state.window.clear())
        if state.admitted:
            self._unreported.append(peer)

    def _mark_joined(self, peer: int, incarnation: int) -> None:
        """A process of a peer is within reach."""
        self._joined.append((peer, incarnation))
