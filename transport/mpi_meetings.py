"""How a process that takes a dead rank's place comes to the others, while they go on.

    a survivor's helper thread      Spawn ------------> the newcomer: the two have a communicator
    each other survivor's           Accept(name) <----- Connect(name), one after the other
    both ends                       hello <-----------> hello: run, rank and incarnation are what they should be

No call here is collective over more than two processes, and each runs in a thread of its own, so that nobody's frames
wait. Open MPI takes the name of a port for a key that both sides look up, and asks for nothing behind it: so the name
is made of the two lives that meet, and need not be told to anybody. Whoever comes first waits, asleep, for at most ten
minutes. Newcomers connect only to those who were there before them, in one order and one at a time: in each process MPI
agrees on the number of one new communicator at a time, and so no circle of waiting can form.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
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
    """A communicator between this process and a life of another rank; hello has been said both ways."""

    rank: int
    incarnation: int
    comm: Intercomm


class NotMet(NamedTuple):
    """A life that could not be spawned or met, and why. Not told of one that dies before it says hello."""

    rank: int
    incarnation: int
    reason: str


class MpiMeetings:
    """One process's meetings. Methods return at once; what came of them is told by `take_met` and `take_failed`."""

    def __init__(self, *, run_id: str, rank: int, num_ranks: int, incarnation: int = 0) -> None:
        """`run_id`: at most 32 characters, the same in all processes of a mesh and in no other."""
        if not 0 < len(run_id.encode()) <= 32:
            raise ValueError(f"a run's id has 1 to 32 bytes, got {run_id!r}")
        self.run_id, self.rank, self.num_ranks, self.incarnation = run_id, rank, num_ranks, incarnation
        self._mpi = init_mpi()
        self._met: SimpleQueue[Met] = SimpleQueue()
        self._failed: SimpleQueue[NotMet] = SimpleQueue()
        self._one_dup_at_a_time = threading.Lock()
        # MPI may still write to or read from these.
        self._abandoned: list[tuple[list[Request], bytearray, bytearray]] = []

    def spawn(self, rank: int, incarnation: int, command: Sequence[str]) -> None:
        """Start a process that is to be this life, and meet it: it must call `meet_parent`."""
        self._begin(rank, incarnation, lambda own: self._spawn(own, command))

    def accept(self, rank: int, incarnation: int) -> None:
        """Meet a life that somebody else has spawned: it must `connect`."""
        name = self._name(self.rank, self.incarnation, rank, incarnation)
        self._begin(rank, incarnation, lambda own: own.Accept(name))

    def meet_parent(self, rank: int, incarnation: int) -> None:
        """A newcomer's first meeting: with the life that spawned it."""
        self._begin(rank, incarnation, lambda _: self._mpi.Comm.Get_parent())

    def connect(self, lives: Sequence[tuple[int, int]]) -> None:
        """A newcomer's other meetings, one after the other; each of these lives must `accept` it.

        Who does not come for PATIENCE_SECONDS, being stopped perhaps, is waited for beside the next.
        """

        def connect_all() -> None:
            for rank, incarnation in sorted(lives):
                name = self._name(rank, incarnation, self.rank, self.incarnation)
                meeting = self._begin(rank, incarnation, lambda own, name=name: own.Connect(name))  # type: ignore[misc]
                meeting.join(PATIENCE_SECONDS)

        threading.Thread(target=connect_all, name="connect", daemon=True).start()

    def take_met(self) -> list[Met]:
        """Those met since the last call."""
        return _drain(self._met)

    def take_failed(self) -> list[NotMet]:
        """Meetings that came to nothing since the last call."""
        return _drain(self._failed)

    def _spawn(self, own: Intracomm, command: Sequence[str]) -> Intercomm:
        try:
            return own.Spawn(command[0], args=list(command[1:]), maxprocs=1)
        except self._mpi.Exception as error:
            raise SpawnError(
                f"cannot spawn {command[0]}: {error}; mpirun's error output says why: no slots, unless it was started "
                "with --oversubscribe"
            ) from error

    def _name(self, host: int, host_incarnation: int, guest: int, guest_incarnation: int) -> str:
        return f"moemesh-{self.run_id}-{host}.{host_incarnation}-{guest}.{guest_incarnation}"

    def _begin(self, rank: int, incarnation: int, way: Callable[[Intracomm], Intercomm]) -> threading.Thread:
        arguments = (rank, incarnation, way)
        meeting = threading.Thread(target=self._meet, args=arguments, name=f"meet rank {rank}", daemon=True)
        meeting.start()
        return meeting

    def _meet(self, rank: int, incarnation: int, way: Callable[[Intracomm], Intercomm]) -> None:
        """One meeting, in a helper thread. Whatever goes wrong is reported: nobody waits for this thread.

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
    taken: list[ItemT] = []
    while True:
        try:
            taken.append(queue.get_nowait())
        except Empty:
            return taken
