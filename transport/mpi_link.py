"""The link over MPI: one frame, one message of raw bytes on one communicator.

Measured facts of Open MPI 5 with ULFM that shape it: progress happens only inside MPI calls; an eager send to a dead
rank "succeeds"; a probe of any source raises PROC_FAILED until the failure is acknowledged, then goes on delivering; a
stopped rank is never reported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from transport import buffers
from transport.buffers import WireBuffer
from transport.doorbell import Doorbell
from transport.flow_control import DEFAULT_MAX_QUEUED, DEFAULT_WINDOW
from transport.links import WindowedLink
from transport.mpi_runtime import init_mpi
from transport.trace import Trace

if TYPE_CHECKING:
    from mpi4py.MPI import Exception as MpiException
    from mpi4py.MPI import Intracomm, Request

FRAME_TAG = 1


class MpiLink(WindowedLink):
    """One rank's end of an MPI communicator, which is the link's from here on: errors are returned, not fatal."""

    def __init__(
        self,
        comm: Intracomm,
        *,
        credit_window: int = DEFAULT_WINDOW,
        max_queued: int = DEFAULT_MAX_QUEUED,
        bell: Doorbell | None = None,
        trace: Trace | None = None,
    ) -> None:
        rank, num_ranks = comm.Get_rank(), comm.Get_size()
        super().__init__(rank, num_ranks, credit_window=credit_window, max_queued=max_queued, trace=trace)
        mpi = init_mpi()
        comm.Set_errhandler(mpi.ERRORS_RETURN)
        self._bell = bell
        self._mpi = mpi
        self._comm = comm
        self._status = mpi.Status()
        self._group = comm.Get_group()
        self._failure_classes = {mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED}
        self._sending: list[tuple[int, Request, WireBuffer]] = []
        self._abandoned: list[tuple[Request, WireBuffer]] = []
        # One queue for each sender: a small message must not overtake a large one that is still arriving.
        self._receiving: dict[int, deque[tuple[Request, WireBuffer]]] = {}

    def _transmit(self, peer: int, buffer: WireBuffer) -> None:
        try:
            request = self._comm.Isend(buffer.data, peer, FRAME_TAG)
            done = request.Test()
            if self._bell is not None:
                self._bell.ring(peer)
            if not done:
                self._sending.append((peer, request, buffer))
                return
        except self._mpi.Exception as error:
            self._note_failure(error)
            return
        self._sent(buffer)

    def _arrivals(self) -> Iterable[tuple[int, memoryview]]:
        if self._sending:
            self._test_sends()
        try:
            self._start_receives()
        except self._mpi.Exception as error:
            self._note_failure(error)
        return self._test_receives() if self._receiving else ()

    def arriving(self) -> bool:
        """See Link."""
        return bool(self._receiving)

    def _unfinished(self) -> bool:
        return bool(self._sending or self._receiving)

    def _start_receives(self) -> None:
        """Begin to receive every message that is announced; the credit windows bound their number."""
        while (message := self._comm.Improbe(self._mpi.ANY_SOURCE, FRAME_TAG, self._status)) is not None:
            source = self._status.Get_source()
            buffer = buffers.new_buffer(self._status.Get_count(self._mpi.BYTE))
            request = message.Irecv(buffer.data)
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
                self._note_failure(error)
            if not queue:
                del self._receiving[source]
        return arrived

    def _test_sends(self) -> None:
        unfinished = []
        for peer, request, buffer in self._sending:
            try:
                done = request.Test()
            except self._mpi.Exception as error:
                self._abandoned.append((request, buffer))
                self._note_failure(error)
                continue
            if done:
                self._sent(buffer)
            else:
                unfinished.append((peer, request, buffer))
        self._sending = unfinished

    def _note_failure(self, error: MpiException) -> None:
        """Find out who died and go on with the others; any other error of MPI is raised again."""
        if error.Get_error_class() not in self._failure_classes:
            raise error
        self._comm.Ack_failed()
        failed = self._comm.Get_failed()
        for peer in self._mpi.Group.Translate_ranks(failed, range(failed.Get_size()), self._group):
            self._mark_lost(peer)
        failed.Free()
        # Buffers of unfinished sends are never reused: MPI may still read them.
        self._abandoned += [(request, buffer) for peer, request, buffer in self._sending if self._peers[peer].lost]
        self._sending = [entry for entry in self._sending if not self._peers[entry[0]].lost]
