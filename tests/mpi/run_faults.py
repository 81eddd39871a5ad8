"""One rank of a mesh that suffers: `run_faults.py kill` or `run_faults.py stop`. Rank 2 is the victim."""

import os
import signal
import sys

import torch

from tests.mpi.launch import end_run, linger
from transport.flow_control import DEFAULT_WINDOW
from transport.frame import Frame, Header, Kind
from transport.mailbox import Mailbox, MailKey
from transport.mpi_link import MpiLink
from transport.mpi_runtime import init_mpi

VICTIM = 2
FLOOD = 600
"""More small unanswered frames than Open MPI's shared-memory pool holds: without credit windows the sender stalls."""
ROUNDS = 200


def hello(link: MpiLink) -> None:
    """Everybody has heard of everybody: connections stand, nothing is under way but credits."""
    for peer in range(link.num_ranks):
        if peer != link.rank:
            link.post(peer, Frame(Header(Kind.PLAN, link.rank)))
    received = 0
    while received < link.num_ranks - 1 or not link.idle():
        received += len(link.poll())
        os.sched_yield()


def poll_into(mailbox: Mailbox, link: MpiLink) -> None:
    for frame in link.poll():
        mailbox.deliver(frame)
    os.sched_yield()


def exchange(link: MpiLink, mailbox: Mailbox, peer: int) -> None:
    """Full rounds with a healthy peer, large and small frames."""
    for step in range(ROUNDS):
        rows = torch.full((1 if step % 2 else 5000,), step, dtype=torch.int32)
        link.post(peer, Frame(Header(Kind.DISPATCH, link.rank, step=step), (rows,)))
        key = MailKey(Kind.DISPATCH, 0, step, 0, 0, 0, peer)
        while not mailbox.has([key]):
            poll_into(mailbox, link)
        frame = mailbox.take(key)
        assert frame is not None
        assert torch.equal(frame.tensors[0], rows)


def flood_victim(link: MpiLink) -> None:
    for step in range(FLOOD):
        link.post(VICTIM, Frame(Header(Kind.DISPATCH, link.rank, step=step), (torch.ones(8),)))


def kill(link: MpiLink) -> None:
    """The victim kills itself; the others go on, and each learns of it once."""
    if link.rank == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    mailbox = Mailbox()
    flood_victim(link)
    lost: list[int] = []
    while not lost:
        poll_into(mailbox, link)
        lost = link.take_lost()
    assert lost == [VICTIM]
    exchange(link, mailbox, 1 - link.rank)
    flood_victim(link)
    assert link.take_lost() == []
    assert link.stats().dropped >= FLOOD


def stop(link: MpiLink) -> None:
    """The victim stops; the others' traffic goes on, with a window's worth under way to it. Then it is continued."""
    if link.rank == VICTIM:
        print(f"victim {os.getpid()}", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        received = 0
        while received < 2 * FLOOD:
            received += len(link.poll())
        return
    flood_victim(link)
    mailbox = Mailbox()
    exchange(link, mailbox, 1 - link.rank)
    assert link.stats().in_flight <= 2 * DEFAULT_WINDOW
    print("healthy", flush=True)
    while not link.idle():
        poll_into(mailbox, link)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        own_link = MpiLink(init_mpi().COMM_WORLD)
        hello(own_link)
        {"kill": kill, "stop": stop}[sys.argv[1]](own_link)
        print(f"survived {own_link.rank}", flush=True)
        linger(own_link.poll)
    except BaseException:
        end_run()
