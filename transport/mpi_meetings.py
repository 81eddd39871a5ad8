"""How a process that takes a dead rank's place comes to the others, while they go on.

    a survivor's helper thread      Spawn ------------> the newcomer: the two have a communicator
    each other survivor's           Accept(name) <----- Connect(name), one after the other
    both ends                       hello <-----------> hello: run, rank and incarnation are what they should be

No call here is collective over more than two processes, and each runs in a thread of its own, so that nobody's frames
wait. Open MPI takes the name of a port for a key that both sides look up, and asks for nothing behind it: so the name
is made of the two processes that meet, and need not be told to anybody. Whoever comes first waits, asleep, for at most
ten minutes. Who connects is decided by an order of all processes, and each connects to one at a time: in each process
MPI agrees on the number of one new communicator at a time, and so no circle of waiting can form.

A process is named by its rank and the incarnation that it began as: it may be in a later life when it meets somebody.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from transport.errors import ProtocolError
from transport.frame import VERSION
from transport.mpi_runtime import init_mpi

if TYPE_CHECKING:
    from mpi4py.MPI import Comm, Intercomm, Intracomm, Request

ItemT = TypeVar("ItemT")

HELLO_TAG = 2
HELLO_SECONDS = 30.0
PATIENCE_SECONDS = 2.0
_LOOK_SECONDS = 0.0005

# magic, version of the frames, run, rank, incarnation
_HELLO = struct.Struct("<4sH32sII")
_HELLO_MAGIC = b"moeH"

logger = logging.getLogger(__name__)


class SpawnError(RuntimeError):
    """MPI did not start a process."""


class Met(NamedTuple):
    """A communicator between this process and one of another rank; hello has been said both ways.

    `incarnation`: the one that the other process began as.
    """

    rank: int
    incarnation: int
    comm: Intercomm


class NotMet(NamedTuple):
    """A process that could not be spawned or met, and why. Not told of one that dies before it says hello."""

    rank: int
    incarnation: int
    reason: str


class MpiMeetings:
    """One process's meetings. Methods return at once; what came of them is told by `take_met` and `take_failed`."""

    def __init__(self, *, run_id: str, rank: int, num_ranks: int, incarnation: int = 0) -> None:
        """`run_id`: at most 32 characters, the same in all processes of a mesh and in no other. `incarnation`: the one
        that this process begins as."""
        if not 0 < len(run_id.encode()) <= 32:
            raise ValueError(f"a run's id has 1 to 32 bytes, got {run_id!r}")
        self.run_id, self.rank, self.num_ranks, self.incarnation = run_id, rank, num_ranks, incarnation
        self._mpi = init_mpi()
        self._met: SimpleQueue[Met] = SimpleQueue()
        self._failed: SimpleQueue[NotMet] = SimpleQueue()
        self._one_dup_at_a_time = threading.Lock()
        self._to_connect: SimpleQueue[tuple[int, int]] = SimpleQueue()
        self._connecting: threading.Thread | None = None
        # MPI may still write to or read from these.
        self._abandoned: list[tuple[list[Request], bytearray, bytearray]] = []

    def spawn(self, rank: int, incarnation: int, command: Sequence[str]) -> None:
        """Start the process that is to be this life, on this host, and meet it: it must call `meet_parent`."""
        self._begin(rank, incarnation, lambda own: self._spawn(own, command))

    def accept(self, rank: int, incarnation: int) -> None:
        """Meet a process that was started otherwise: it must `connect`."""
        name = self._name(self.rank, self.incarnation, rank, incarnation)
        self._begin(rank, incarnation, lambda own: own.Accept(name))

    def meet_parent(self, rank: int, incarnation: int) -> None:
        """A newcomer's first meeting: with the process that spawned it. Waits for it; raises SpawnError."""
        self._begin(rank, incarnation, lambda _: self._mpi.Comm.Get_parent()).join()
        for failed in self.take_failed():
            raise SpawnError(failed.reason)

    def connect(self, lives: Iterable[tuple[int, int]]) -> None:
        """Meet processes, one after the other; each of them must `accept` this one.

        Who does not come for PATIENCE_SECONDS, being stopped perhaps, is waited for beside the next.
        """
        for life in sorted(lives):
            self._to_connect.put(life)
        if self._connecting is None:
            self._connecting = threading.Thread(target=self._connect_all, name="connect", daemon=True)
            self._connecting.start()

    def take_met(self) -> list[Met]:
        """Those met since the last call."""
        return _drain(self._met)

    def take_failed(self) -> list[NotMet]:
        """Meetings that came to nothing since the last call."""
        return _drain(self._failed)

    def _connect_all(self) -> None:
        while True:
            rank, incarnation = self._to_connect.get()
            name = self._name(rank, incarnation, self.rank, self.incarnation)
            meeting = self._begin(rank, incarnation, lambda own, name=name: own.Connect(name))  # type: ignore[misc]
            meeting.join(PATIENCE_SECONDS)

    def _spawn(self, own: Intracomm, command: Sequence[str]) -> Intercomm:
        here = self._mpi.Info.Create({"host": socket.gethostname()})
        try:
            return own.Spawn(command[0], args=list(command[1:]), maxprocs=1, info=here)
        except self._mpi.Exception as error:
            raise SpawnError(
                f"cannot spawn {command[0]}: {error}; mpirun's error output says why: no slots, unless it was started "
                "with --oversubscribe"
            ) from error
        finally:
            here.Free()

    def _name(self, host: int, host_incarnation: int, guest: int, guest_incarnation: int) -> str:
        return f"moemesh-{self.run_id}-{host}.{host_incarnation}-{guest}.{guest_incarnation}"

    def _begin(self, rank: int, incarnation: int, way: Callable[[Intracomm], Intercomm]) -> threading.Thread:
        arguments = (rank, incarnation, way)
        meeting = threading.Thread(target=self._meet, args=arguments, name=f"meet rank {rank}", daemon=True)
        meeting.start()
        return meeting

    def _meet(self, rank: int, incarnation: int, way: Callable[[Intracomm], Intercomm]) -> None:
        """One meeting, in a helper thread. Whatever goes wrong is reported.

        A communicator that came to nothing is not freed: its peer may yet live.
        """
        began = time.monotonic()
        try:
            comm = self._reach(way)
            comm.Set_errhandler(self._mpi.ERRORS_RETURN)
            self._say_hello(comm, rank, incarnation)
        except (self._mpi.Exception, ProtocolError, SpawnError) as error:
            self._failed.put(NotMet(rank, incarnation, str(error)))
            return
        logger.info("met rank %d (life %d) in %.0f ms", rank, incarnation, 1000 * (time.monotonic() - began))
        self._met.put(Met(rank, incarnation, comm))

    def _reach(self, way: Callable[[Intracomm], Intercomm]) -> Intercomm:
        # Two threads must not make collective calls on the same communicator, and be it COMM_SELF.
        with self._one_dup_at_a_time:
            own = self._mpi.COMM_SELF.Dup()
        own.Set_errhandler(self._mpi.ERRORS_RETURN)
        try:
            return way(own)
        finally:
            with self._one_dup_at_a_time:
                own.Free()

    def _say_hello(self, comm: Comm, rank: int, incarnation: int) -> None:
        """Exchange who we are. Raises ProtocolError where the other is not who was to come, or says nothing."""
        run = self.run_id.encode()
        ours = bytearray(_HELLO.pack(_HELLO_MAGIC, VERSION, run, self.rank, self.incarnation))
        theirs = bytearray(_HELLO.size)
        requests = [comm.Irecv(theirs, 0, HELLO_TAG), comm.Isend(ours, 0, HELLO_TAG)]
        deadline = time.monotonic() + HELLO_SECONDS
        while not all(request.Test() for request in requests):
            if time.monotonic() > deadline:
                self._abandoned.append((requests, ours, theirs))
                raise ProtocolError(f"rank {rank} (life {incarnation}) said no hello for {HELLO_SECONDS:.0f} s")
            time.sleep(_LOOK_SECONDS)
        expected = (_HELLO_MAGIC, VERSION, run.ljust(32, b"\0"), rank, incarnation)
        found = _HELLO.unpack(theirs)
        if found != expected:
            raise ProtocolError(f"hello of {found}, expected {expected}")


def _drain(queue: SimpleQueue[ItemT]) -> list[ItemT]:
    """What is there; for the only one who takes."""
    taken: list[ItemT] = []
    while not queue.empty():
        taken.append(queue.get_nowait())
    return taken
