"""One rank of a mesh in which rank 2 dies again and again, and is replaced each time.

`run_respawn.py LIFE ...`: ranks 0 and 1 survive; rank 0 spawns each new life of rank 2, rank 1 accepts it, and the two
exchange frames with each other all the while. `run_respawn.py newcomer LIFE INCARNATION`: one such life. A "whole" one
answers what it is sent until it is told to die; a "stillborn" one dies before MPI knows it, a "short" one before it has
met anybody. Nobody is told of the latter two: the next life simply follows. A "stuck" one is met and then stands still,
with frames under way to it: it is given up, and dies after the next one was met.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from tests.mpi.launch import end_run, linger
from transport.frame import Frame, Header, Kind
from transport.links import Link
from transport.mpi_link import MpiLink
from transport.mpi_meetings import MpiMeetings
from transport.mpi_runtime import init_mpi

RUN = "respawn-test"
VICTIM = 2
ROUNDS = 50
BIG = 1 << 18


class Survivor:
    """Rank 0 or 1: exchanges frames with the other, and with rank 2 while that lives."""

    def __init__(self, link: MpiLink, meetings: MpiMeetings) -> None:
        self.link, self.meetings, self.peer = link, meetings, 1 - link.rank
        self.rounds = self.answers = self.meetings_with_peer = self.calls_of_peer = 0
        self.pid_of_stuck: int | None = None
        self.longest = 0.0
        self._asked_at = time.monotonic()
        if link.rank == 0:
            self._ask()

    def _ask(self) -> None:
        self._asked_at = time.monotonic()
        self.link.post(self.peer, Frame(Header(Kind.DISPATCH, self.link.rank), (torch.ones(4),)))

    def turn(self) -> None:
        """Take what came; the other survivor's frame is answered by the next."""
        self.link.tick(time.monotonic())
        for frame in self.link.poll():
            match frame.header.kind:
                case Kind.DISPATCH:
                    assert frame.header.sender == self.peer
                    self.rounds += 1
                    self.longest = max(self.longest, time.monotonic() - self._asked_at)
                    self._ask()
                case Kind.ANSWER:
                    assert (frame.header.sender, frame.header.incarnation) == (VICTIM, self.incarnation)
                    assert torch.equal(frame.tensors[0], self.content(frame.header.step))
                    self.answers += 1
                case Kind.SAMPLES:
                    self.calls_of_peer += 1
                case Kind.COLLECTIVE:
                    self.pid_of_stuck = frame.header.step
        os.sched_yield()

    def content(self, step: int) -> torch.Tensor:
        return torch.full((BIG if step % 10 == 0 else 3,), float(step * 10 + self.link.rank))

    def await_death(self) -> None:
        lost: list[int] = []
        while not lost:
            self.turn()
            lost = self.link.take_lost()
        assert lost == [VICTIM]
        self.link.forget(VICTIM)

    def replace(self, life: str, incarnation: int) -> None:
        """Begin to have rank 2 replaced."""
        if self.link.rank == 0:
            command = [sys.executable, __file__, "newcomer", life, str(incarnation)]
            self.meetings.spawn(VICTIM, incarnation, command)
        else:
            self.meetings.accept(VICTIM, incarnation)

    def await_life(self, incarnation: int) -> None:
        """Wait for the new life, go on meanwhile, admit it."""
        link = self.link
        self.incarnation, self.answers = incarnation, 0
        joined: list[tuple[int, int]] = []
        before, self.longest = self.rounds, 0.0
        while not joined:
            self.turn()
            joined = link.take_joined()
            # Of a life before, word may come late.
            failed = [life for life in self.meetings.take_failed() if life.incarnation == incarnation]
            assert not failed, failed
        assert joined == [(VICTIM, incarnation)]
        assert self.rounds > before, "the survivors' traffic stood still"
        link.admit(VICTIM, incarnation)
        print(f"met {link.rank} {1e3 * self.longest:.1f} ms", flush=True)

    def talk(self) -> None:
        """Every frame is answered."""
        self.answers = 0
        for step in range(ROUNDS):
            self.link.post(VICTIM, Frame(Header(Kind.DISPATCH, self.link.rank, step=step), (self.content(step),)))
        while self.answers < ROUNDS:
            self.turn()
        assert self.link.take_lost() == []

    def give_up(self) -> None:
        """The life stands still, with more under way than it would ever have taken."""
        while self.pid_of_stuck is None and self.link.rank == 0:
            self.turn()
        for step in range(ROUNDS):
            self.link.post(VICTIM, Frame(Header(Kind.DISPATCH, self.link.rank, step=step), (torch.ones(BIG),)))
        assert not self.link.idle()
        self.link.forget(VICTIM)

    def meet_peer(self) -> None:
        """Wait until the other survivor has got as far."""
        self.link.post(self.peer, Frame(Header(Kind.SAMPLES, self.link.rank)))
        self.meetings_with_peer += 1
        while self.calls_of_peer < self.meetings_with_peer:
            self.turn()

    def kill_stuck(self) -> None:
        """The death of a life that was given up is not charged to the one after it."""
        if self.pid_of_stuck is not None:
            os.kill(self.pid_of_stuck, signal.SIGKILL)
            self.pid_of_stuck = None
        self.talk()

    def cycle(self, life: str, incarnation: int) -> None:
        self.replace(life, incarnation)
        if life in ("stillborn", "short"):
            return
        self.await_life(incarnation)
        if life == "stuck":
            self.give_up()
            self.meet_peer()
            return
        self.talk()
        self.kill_stuck()
        self.meet_peer()
        if self.link.rank == 0:
            self.link.post(VICTIM, Frame(Header(Kind.PLAN, 0)))
        self.await_death()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        descriptors = len(os.listdir("/proc/self/fd"))
        print(f"cycle {self.link.rank} {incarnation} {descriptors} {pages * 4}", flush=True)


def survive(lives: list[str]) -> None:
    world = init_mpi().COMM_WORLD
    rank = world.Get_rank()
    meetings = MpiMeetings(run_id=RUN, rank=rank, num_ranks=3)
    link = MpiLink(world.Dup(), meetings=meetings)
    if rank == VICTIM:
        await_order_to_die(link)
    survivor = Survivor(link, meetings)
    if rank == 0:
        link.post(VICTIM, Frame(Header(Kind.PLAN, 0)))
    survivor.await_death()
    for incarnation, life in enumerate(lives, start=1):
        survivor.cycle(life, incarnation)
    linger(survivor.turn)


def newcomer(life: str, incarnation: int) -> None:
    if life == "stillborn":
        os.kill(os.getpid(), signal.SIGKILL)
    init_mpi()
    if life == "short":
        os.kill(os.getpid(), signal.SIGKILL)
    meetings = MpiMeetings(run_id=RUN, rank=VICTIM, num_ranks=3, incarnation=incarnation)
    meetings.meet_parent(0, 0)
    meetings.connect([(1, 0)])
    link = MpiLink(None, meetings=meetings)
    admitted = 0
    while admitted < 2:
        for peer, incarnation_of_peer in link.take_joined():
            link.admit(peer, incarnation_of_peer)
            admitted += 1
        failed = meetings.take_failed()
        assert not failed, failed
        os.sched_yield()
    if life == "stuck":
        stand_still(link)
    await_order_to_die(link)


def stand_still(link: Link) -> None:
    """Say who we are, and stop."""
    link.post(0, Frame(Header(Kind.COLLECTIVE, link.rank, step=os.getpid())))
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        link.poll()
    os.kill(os.getpid(), signal.SIGSTOP)


def await_order_to_die(link: Link) -> None:
    """Answer every frame with its own tensors, until told otherwise."""
    while True:
        for frame in link.poll():
            if frame.header.kind is Kind.PLAN:
                os.kill(os.getpid(), signal.SIGKILL)
            if frame.header.kind is Kind.DISPATCH:
                answer = Frame(Header(Kind.ANSWER, link.rank, step=frame.header.step), frame.tensors)
                link.post(frame.header.sender, answer)
        link.tick(time.monotonic())
        os.sched_yield()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        if sys.argv[1] == "newcomer":
            newcomer(sys.argv[2], int(sys.argv[3]))
        else:
            survive(sys.argv[1:])
    except BaseException:
        end_run()
