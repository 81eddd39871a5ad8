"""One rank of the link contract under mpirun: runs every program and prints its name when it passed."""

import os
from typing import TYPE_CHECKING

import torch

from tests.mpi.launch import end_run, linger
from tests.transport.link_contract import CONTRACT, Program
from transport import buffers
from transport.buffers import WireBuffer
from transport.mpi_link import MpiLink
from transport.mpi_runtime import detect_mpi_launch, init_mpi

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

_fresh_buffer = buffers.new_buffer


def poisoned_buffer(size: int) -> WireBuffer:
    """Memory that holds NaN in every format: a transfer that leaves a gap shows."""
    buffer = _fresh_buffer(size)
    torch.frombuffer(buffer.memory, dtype=torch.uint8).fill_(0xFF)
    return buffer


def sync(comm: "Intracomm") -> Program:
    """A barrier that is polled; the frames of the link wait in MPI meanwhile."""
    request = comm.Ibarrier()
    while not request.Test():
        yield


def main() -> None:
    mpi = init_mpi()
    world = mpi.COMM_WORLD
    assert detect_mpi_launch(os.environ) == (world.Get_rank(), world.Get_size())
    buffers.new_buffer = poisoned_buffer
    for program in CONTRACT:
        # A communicator each: what one program leaves under way cannot reach the next.
        link = MpiLink(world.Dup())
        for _ in program(link, lambda: sync(world)):
            os.sched_yield()
        print(f"passed {program.__name__}", flush=True)
    linger(world.Iprobe)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except BaseException:
        end_run()
