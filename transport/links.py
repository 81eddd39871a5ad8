"""The seam between the mesh and what carries its bytes: a link sends frames to peers and hands out those that came."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from transport.buffers import BufferPool, WireBuffer
from transport.errors import ProtocolError
from transport.flow_control import DEFAULT_MAX_QUEUED, DEFAULT_WINDOW, CreditWindow
from transport.frame import Frame, Header, Kind, decode, encode, set_credits
from transport.trace import Trace, now


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkStats:
    """Counters since the link was made; `queued` and `in_flight` are frames now, over all peers.

    `dropped` counts frames that were meant for a lost peer, `protocol_errors` frames of peers that were refused.
    """

    frames_sent: dict[Kind, int]
    bytes_sent: int
    frames_received: int
    bytes_received: int
    dropped: int
    protocol_errors: int
    queued: int
    in_flight: int


class Link(Protocol):
    """One rank's end of the mesh. Used by one thread; no method ever waits for a peer."""

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def post(self, peer: int, frame: Frame) -> None:
        """Send a copy of the frame to a peer (not to oneself); its tensors may be reused on return.

        Frames to one peer arrive in order. Beyond the credit window they wait in the link's own queue; Overloaded when
        that is full. A frame to a lost peer is dropped and counted. That a frame left says nothing about its arrival.
        """
        ...

    def poll(self) -> list[Frame]:
        """The frames that arrived, in order for each sender; the caller owns their tensors. Also drives the sends."""
        ...

    def take_lost(self) -> list[int]:
        """Peers found dead since the last call; each is named once."""
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


class WindowedLink(ABC):
    """What every link does alike: encoding, credit windows, counters. A carrier moves whole buffers in order.

    A carrier may call `_sent` only when a buffer is no longer read, `_mark_lost` when it finds a peer dead.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        *,
        credit_window: int = DEFAULT_WINDOW,
        max_queued: int = DEFAULT_MAX_QUEUED,
        trace: Trace | None = None,
    ) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._trace = trace
        self._windows: dict[int, CreditWindow[tuple[Kind, WireBuffer]]] = {
            peer: CreditWindow(credit_window, max_queued) for peer in range(num_ranks) if peer != rank
        }
        self._pool = BufferPool()
        self._lost: set[int] = set()
        self._unreported: list[int] = []
        self._frames_sent = dict.fromkeys(Kind, 0)
        self._bytes_sent = self._frames_received = self._bytes_received = 0
        self._dropped = self._protocol_errors = 0

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

    def post(self, peer: int, frame: Frame) -> None:
        """See Link."""
        window = self._windows.get(peer)
        if window is None:
            raise ValueError(f"rank {self._rank} of {self._num_ranks} cannot post to {peer}: name another rank")
        header = frame.header
        if header.sender != self._rank or header.kind is Kind.CREDIT:
            raise ValueError(f"rank {self._rank} cannot post a {header.kind.name} frame of sender {header.sender}")
        if peer in self._lost:
            self._dropped += 1
            return
        began = now() if self._trace is not None else None
        window.push((header.kind, encode(frame, self._pool.take)))
        self._pump(peer, window)
        if self._trace is not None:
            nbytes = sum(tensor.nbytes for tensor in frame.tensors)
            self._trace.span(f"post {header.kind.name}", began, to=peer, layer=header.layer, nbytes=nbytes)

    def poll(self) -> list[Frame]:
        """See Link."""
        frames: list[Frame] = []
        active: set[int] = set()
        for source, data in self._arrivals():
            active.add(source)
            self._accept(source, data, frames)
        for peer in active:
            if peer not in self._lost:
                window = self._windows[peer]
                self._pump(peer, window)
                self._return_credits(peer, window)
        return frames

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
            queued=sum(window.queued for window in self._windows.values()),
            in_flight=sum(window.in_flight for window in self._windows.values()),
        )

    def arriving(self) -> bool:
        """See Link. Nothing, for a carrier that hands over whole buffers."""
        return False

    def idle(self) -> bool:
        """See Link."""
        return not self._unfinished() and not any(window.queued for window in self._windows.values())

    def close(self) -> None:
        """See Link."""
        for window in self._windows.values():
            window.clear()

    def _accept(self, source: int, data: memoryview, frames: list[Frame]) -> None:
        """Decode one buffer and book its credits. What cannot be read still took a credit, unless it is a CREDIT."""
        self._frames_received += 1
        self._bytes_received += data.nbytes
        window = self._windows[source]
        try:
            frame = decode(data)
        except ProtocolError:
            self._protocol_errors += 1
            window.consumed()
            return
        header = frame.header
        if header.kind is not Kind.CREDIT:
            window.consumed()
        try:
            if header.sender != source:
                raise ProtocolError(f"frame from rank {source} says it is from {header.sender}")
            window.returned(header.credits)
        except ProtocolError:
            self._protocol_errors += 1
            return
        if header.kind is not Kind.CREDIT:
            frames.append(frame)

    def _pump(self, peer: int, window: CreditWindow[tuple[Kind, WireBuffer]]) -> None:
        """Send what the window allows."""
        while (item := window.pop()) is not None:
            kind, buffer = item
            credits = window.take_owed()
            if credits:
                set_credits(buffer, credits)
            self._count_and_transmit(peer, kind, buffer)

    def _return_credits(self, peer: int, window: CreditWindow[tuple[Kind, WireBuffer]]) -> None:
        credits = window.take_due()
        if credits:
            frame = Frame(Header(Kind.CREDIT, self._rank, credits=credits))
            self._count_and_transmit(peer, Kind.CREDIT, encode(frame, self._pool.take))

    def _count_and_transmit(self, peer: int, kind: Kind, buffer: WireBuffer) -> None:
        self._frames_sent[kind] += 1
        self._bytes_sent += buffer.size
        self._transmit(peer, buffer)

    def _sent(self, buffer: WireBuffer) -> None:
        self._pool.give_back(buffer)

    def _mark_lost(self, peer: int) -> None:
        if peer == self._rank or peer in self._lost:
            return
        self._lost.add(peer)
        self._unreported.append(peer)
        self._dropped += len(self._windows[peer].clear())
