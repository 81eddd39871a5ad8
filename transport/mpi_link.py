"""The link over MPI: one frame, one message of raw bytes.

The ranks that were started together share one communicator; with each process that came later there is one for the
pair. (A probe for each of fifteen pairs costs 5.3 us where one probe for all of them costs 0.3.)

Measured facts of Open MPI 5 with ULFM that shape it: progress happens only inside MPI calls; an eager send to a dead
rank "succeeds"; a probe of any source raises PROC_FAILED until the failure is acknowledged, then goes on delivering; a
stopped rank is never reported. Shared memory joins only processes that were started together: with one that came later
the pair talks over TCP, also on one host (a small round trip takes 11 to 23 us instead of 2.6, 64 KiB 142 instead of
22).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from transport import buffers
from transport.buffers import WireBuffer
from transport.doorbell import Doorbell
from transport.flow_control import DEFAULT_MAX_QUEUED, DEFAULT_WINDOW
from transport.links import WindowedLink
from transport.mpi_meetings import MpiMeetings
from transport.mpi_runtime import init_mpi
from transport.trace import Trace

if TYPE_CHECKING:
    from mpi4py.MPI import Comm, Intercomm, Intracomm, Request
    from mpi4py.MPI import Exception as MpiException

FRAME_TAG = 1


class Channel(NamedTuple):
    """Where a peer is reached: its number in a communicator, which is the pair's alone or that of many."""

    comm: Comm
    place: int


class MpiLink(WindowedLink):
    """One rank's end of the mesh; its communicators are the link's from here on: errors are returned, not fatal."""

    def __init__(
        self,
        comm: Intracomm | None,
        *,
        meetings: MpiMeetings | None = None,
        credit_window: int = DEFAULT_WINDOW,
        max_queued: int = DEFAULT_MAX_QUEUED,
        bell: Doorbell | None = None,
        trace: Trace | None = None,
    ) -> None:
        """`comm`: that of the ranks that were started together. A newcomer has none; `meetings` say who it is, and as
        which life all began. In a later one than the first nobody is talked with before being admitted."""
        incarnation = 0 if meetings is None else meetings.incarnation
        if comm is not None:
            rank, num_ranks = comm.Get_rank(), comm.Get_size()
        elif meetings is not None:
            rank, num_ranks = meetings.rank, meetings.num_ranks
        else:
            raise ValueError("a link needs a communicator or, for a newcomer, meetings")
        super().__init__(
            rank,
            num_ranks,
            incarnation=incarnation,
            peers={} if incarnation or comm is None else None,
            credit_window=credit_window,
            max_queued=max_queued,
            trace=trace,
        )
        mpi = init_mpi()
        self._bell = bell
        self._meetings = meetings
        self._mpi = mpi
        self._status = mpi.Status()
        self._failure_classes = {mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED}
        self._comm = comm
        self._channels: dict[int, Channel] = {}
        if comm is not None:
            comm.Set_errhandler(mpi.ERRORS_RETURN)
            self._group = comm.Get_group()
            self._channels = {peer: Channel(comm, peer) for peer in self._peers}
        self._pairs: dict[int, Intercomm] = {}
        # Freed while its peer lives, or with something under way, a communicator takes this process with it when the
        # peer dies (a segmentation fault in ompi_comm_revoke_local). So those of lives that were given up are watched
        # until MPI says that they ended, and freed once nothing is under way.
        self._fading: list[Intercomm] = []
        self._ended: list[Intercomm] = []
        self._waiting: dict[int, Intercomm] = {}
        self._sending: list[tuple[int, Request, WireBuffer]] = []
        # Buffers of unfinished sends and receives are never reused: MPI may still touch them.
        self._abandoned: list[tuple[Request, WireBuffer]] = []
        # One queue for each sender: a small message must not overtake a large one that is still arriving.
        self._receiving: dict[int, deque[tuple[Request, WireBuffer]]] = {}

    def take_joined(self) -> list[tuple[int, int]]:
        """See Link. A process joins once it was met; its frames are not looked for before it is admitted."""
        if self._meetings is not None:
            for rank, incarnation, comm in self._meetings.take_met():
                if rank in self._waiting:
                    self._fading.append(self._waiting.pop(rank))
                self._waiting[rank] = comm
                self._mark_joined(rank, incarnation)
        return super().take_joined()

    def forget(self, peer: int) -> None:
        """See Link. The channel stays: the peer may begin another life where it stands."""
        super().forget(peer)
        self._abandon_sends(peer)

    def admit(self, peer: int, incarnation: int) -> None:
        """See Link. A process that was met is reached by the communicator that the meeting made."""
        super().admit(peer, incarnation)
        self._abandon_sends(peer)
        comm = self._waiting.pop(peer, None)
        if comm is not None:
            self._abandon_receives(peer)
            if peer in self._pairs:
                self._fading.append(self._pairs[peer])
            self._pairs[peer] = comm
            self._channels[peer] = Channel(comm, 0)

    def renew(self, incarnation: int) -> None:
        """See Link."""
        super().renew(incarnation)
        for peer in self._peers:
            self._abandon_sends(peer)

    def _transmit(self, peer: int, buffer: WireBuffer) -> None:
        channel = self._channels.get(peer)
        if channel is None:  # admitted again in place, and died before
            self._mark_lost(peer)
            return
        try:
            request = channel.comm.Isend(buffer.data, channel.place, FRAME_TAG)
            done = request.Test()
            if self._bell is not None:
                self._bell.ring(peer)
            if not done:
                self._sending.append((peer, request, buffer))
                return
        except self._mpi.Exception as error:
            self._note_failure(error, peer)
            return
        self._sent(buffer)

    def _arrivals(self) -> Iterable[tuple[int, memoryview]]:
        if self._sending:
            self._test_sends()
        if self._comm is not None:
            try:
                self._start_receives(self._comm, None)
            except self._mpi.Exception as error:
                self._note_failure(error, None)
        if self._pairs:
            for peer, comm in list(self._pairs.items()):
                try:
                    self._start_receives(comm, peer)
                except self._mpi.Exception as error:
                    self._note_failure(error, peer)
        if self._fading:
            self._watch_fading()
        return self._test_receives() if self._receiving else ()

    def arriving(self) -> bool:
        """See Link. A stopped peer may leave a frame half way for long: it is not waited for once it is forgotten."""
        return any(self._peers[peer].admitted for peer in self._receiving)

    def _unfinished(self) -> bool:
        return bool(self._sending) or self.arriving()

    def _start_receives(self, comm: Comm, peer: int | None) -> None:
        """Begin to receive every message that is announced; the credit windows bound their number."""
        place = self._mpi.ANY_SOURCE if peer is None else 0
        while (message := comm.Improbe(place, FRAME_TAG, self._status)) is not None:
            source = self._status.Get_source() if peer is None else peer
            buffer = buffers.new_buffer(self._status.Get_count(self._mpi.BYTE))
            request = message.Irecv(buffer.data)
            if peer is None and source in self._pairs:  # of a life before the one that is reached by a pair's
                self._abandoned.append((request, buffer))
            else:
                self._receiving.setdefault(source, deque()).append((request, buffer))

    def _test_receives(self) -> list[tuple[int, memoryview]]:
        arrived = []
        for source, queue in list(self._receiving.items()):
            try:
                while queue and queue[0][0].Test():
                    arrived.append((source, queue.popleft()[1].data))
            except self._mpi.Exception as error:
                self._abandoned.extend(queue)
                queue.clear()
                self._note_failure(error, source)
            if not queue:
                self._receiving.pop(source, None)
        return arrived

    def _test_sends(self) -> None:
        unfinished, self._sending = self._sending, []
        for peer, request, buffer in unfinished:
            try:
                done = request.Test()
            except self._mpi.Exception as error:
                self._abandoned.append((request, buffer))
                self._note_failure(error, peer)
                continue
            if done:
                self._sent(buffer)
            elif self._peers[peer].lost:
                self._abandoned.append((request, buffer))
            else:
                self._sending.append((peer, request, buffer))

    def _note_failure(self, error: MpiException, peer: int | None) -> None:
        """Find out who died and go on with the others; any other error of MPI is raised again."""
        if error.Get_error_class() not in self._failure_classes:
            raise error
        if peer in self._pairs:
            self._bury(peer)
            self._ended.append(self._pairs.pop(peer))
            del self._channels[peer]
            return
        assert self._comm is not None
        self._comm.Ack_failed()
        failed = self._comm.Get_failed()
        for dead in self._mpi.Group.Translate_ranks(failed, range(failed.Get_size()), self._group):
            # Who was replaced since is reached otherwise, and is not dead.
            channel = self._channels.get(dead)
            if channel is not None and channel.comm is self._comm:
                self._bury(dead)
        failed.Free()

    def _watch_fading(self) -> None:
        """Hear of the end of lives that were given up; what still comes from them is dropped."""
        for comm in list(self._fading):
            try:
                while (message := comm.Improbe(0, FRAME_TAG, self._status)) is not None:
                    buffer = buffers.new_buffer(self._status.Get_count(self._mpi.BYTE))
                    self._abandoned.append((message.Irecv(buffer.data), buffer))
            except self._mpi.Exception as error:
                if error.Get_error_class() not in self._failure_classes:
                    raise
                self._fading.remove(comm)
                self._ended.append(comm)
                self._release()

    def _bury(self, peer: int) -> None:
        self._mark_lost(peer)
        self._abandon_sends(peer)
        self._abandon_receives(peer)

    def _abandon_sends(self, peer: int) -> None:
        """What is half sent to this life of the peer is of no use any more."""
        self._abandoned += [(request, buffer) for to, request, buffer in self._sending if to == peer]
        self._sending = [entry for entry in self._sending if entry[0] != peer]
        self._release()

    def _abandon_receives(self, peer: int) -> None:
        """Nothing more comes this way. (Where the way stays, what comes may be of the next life already.)"""
        self._abandoned += self._receiving.pop(peer, ())

    def _release(self) -> None:
        """Let go of what MPI has done with."""
        self._abandoned = [entry for entry in self._abandoned if not self._finished(entry[0])]
        if not self._abandoned:
            for comm in self._ended:
                comm.Free()
            self._ended.clear()

    def _finished(self, request: Request) -> bool:
        """MPI has done with the request, one way or the other."""
        try:
            return bool(request.Test())
        except self._mpi.Exception:
            return True
