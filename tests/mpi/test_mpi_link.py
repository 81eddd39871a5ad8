"""The MPI link in real meshes of processes: the link contract, a killed rank, a stopped rank."""

import os
import signal
from collections import Counter

import pytest

from tests.mpi.launch import await_lines, started_ranks
from tests.transport.link_contract import CONTRACT


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_contract(num_ranks: int) -> None:
    with started_ranks(num_ranks, ["tests/mpi/run_contract.py"]) as process:
        passed = Counter(line.split()[1] for line in await_lines(process, "passed", num_ranks * len(CONTRACT)))
    assert passed == {program.__name__: num_ranks for program in CONTRACT}


def test_killed_rank_is_reported_once_and_the_others_go_on() -> None:
    with started_ranks(3, ["tests/mpi/run_faults.py", "kill"]) as process:
        assert sorted(await_lines(process, "survived", 2)) == ["survived 0\n", "survived 1\n"]


def test_stopped_rank_does_not_stall_the_others() -> None:
    """The healthy pair talks on while rank 2 is stopped; continued, it receives everything."""
    with started_ranks(3, ["tests/mpi/run_faults.py", "stop"]) as process:
        victim = int(await_lines(process, "victim", 1)[0].split()[1])
        await_lines(process, "healthy", 2)
        os.kill(victim, signal.SIGCONT)
        await_lines(process, "survived", 3)
