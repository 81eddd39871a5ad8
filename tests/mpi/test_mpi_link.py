"""The MPI link in real meshes of processes: the link contract, a killed rank, a stopped rank."""

import os
import signal
import subprocess
from collections import Counter

import pytest

from tests.mpi.launch import run_ranks, started_ranks
from tests.transport.link_contract import CONTRACT


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_contract(num_ranks: int) -> None:
    finished = run_ranks(num_ranks, ["tests/mpi/run_contract.py"])
    assert finished.returncode == 0, finished.output
    passed = Counter(line.split()[1] for line in finished.output.splitlines() if line.startswith("passed "))
    assert passed == {program.__name__: num_ranks for program in CONTRACT}, finished.output


def test_killed_rank_is_reported_once_and_the_others_go_on() -> None:
    finished = run_ranks(3, ["tests/mpi/run_faults.py", "kill"])
    assert {"survived 0", "survived 1"} <= set(finished.output.splitlines()), finished.output


def test_stopped_rank_does_not_stall_the_others() -> None:
    """The healthy pair talks on while rank 2 is stopped; continued, it receives everything."""
    with started_ranks(3, ["tests/mpi/run_faults.py", "stop"]) as process:
        victim = int(await_lines(process, "victim", 1)[0].split()[1])
        await_lines(process, "healthy", 2)
        os.kill(victim, signal.SIGCONT)
        await_lines(process, "survived", 3)
        assert process.wait() == 0


def await_lines(process: subprocess.Popen[str], word: str, count: int) -> list[str]:
    """The next `count` lines of the run's output that begin with `word`."""
    assert process.stdout is not None
    seen: list[str] = []
    found: list[str] = []
    while len(found) < count:
        line = process.stdout.readline()
        assert line, f"the ranks ended before {count} lines of {word!r}:\n{''.join(seen)}"
        seen.append(line)
        if line.startswith(word):
            found.append(line)
    return found
