"""The watchdog ends what has lost its mesh, and nothing else."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from moemesh.processes import ProcessIdentity
from moemesh.run_directory import RunDirectory
from moemesh.watchdog import Watchdog
from tests.moemesh.processes_under_test import eventually

WAITING = [sys.executable, "-c", "import signal; signal.pause()"]


@pytest.fixture
def run() -> Iterator[RunDirectory]:
    made = RunDirectory.create()
    yield made
    made.remove()


@pytest.fixture
def waiting() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(WAITING)
    yield child
    child.kill()
    child.wait()


def watch(run: RunDirectory, reasons: queue.Queue[str], *, started_by: int | None = None) -> Watchdog:
    dog = Watchdog(run, started_by=started_by, on_lost=lambda _, reason: reasons.put(reason))
    dog.start()
    return dog


def test_it_registers_and_leaves_a_healthy_mesh_alone(run: RunDirectory) -> None:
    reasons: queue.Queue[str] = queue.Queue()
    dog = watch(run, reasons)
    assert run.processes() == [ProcessIdentity.current()]
    with pytest.raises(queue.Empty):
        reasons.get(timeout=1.2)
    dog.stop()
    assert reasons.empty()


def test_it_sees_the_frontend_go_even_as_a_zombie(run: RunDirectory, waiting: subprocess.Popen[bytes]) -> None:
    identity = ProcessIdentity.of(waiting.pid)
    assert identity is not None
    run.set_frontend(identity)
    reasons: queue.Queue[str] = queue.Queue()
    watch(run, reasons)
    waiting.kill()  # and nobody waits for it
    assert reasons.get(timeout=10) == f"the frontend (pid {waiting.pid}) is gone"


def test_it_sees_that_the_frontends_pid_is_another_process(run: RunDirectory) -> None:
    run.set_frontend(ProcessIdentity(os.getpid(), 1))
    reasons: queue.Queue[str] = queue.Queue()
    watch(run, reasons)
    assert reasons.get(timeout=10) == f"the frontend (pid {os.getpid()}) is gone"


def test_it_sees_that_its_parent_went_before_it_started(run: RunDirectory) -> None:
    reasons: queue.Queue[str] = queue.Queue()
    watch(run, reasons, started_by=2**22 + 1)
    assert reasons.get(timeout=10) == f"its parent (pid {2**22 + 1}) is gone"


def test_a_rank_that_comes_too_late_ends(run: RunDirectory) -> None:
    run.remove()
    reasons: queue.Queue[str] = queue.Queue()
    watch(run, reasons)
    assert "is gone" in reasons.get(timeout=10)


def test_ending_the_mesh_kills_the_others_and_itself(run: RunDirectory, waiting: subprocess.Popen[bytes]) -> None:
    other = ProcessIdentity.of(waiting.pid)
    assert other is not None
    run.register(other)
    code = (
        "from moemesh.run_directory import RunDirectory; from moemesh.watchdog import end_mesh;"
        f"end_mesh(RunDirectory.open({str(run.path)!r}), 'of a test')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -9
    assert "ends: of a test" in ended.stderr
    eventually(lambda: waiting.poll() == -9)
    assert not run.path.exists()


ENDS_AT = """
import sys, time
from moemesh.processes import ProcessIdentity
from moemesh.run_directory import RunDirectory
from moemesh.watchdog import end_mesh
run = RunDirectory.open(sys.argv[1])
run.register(ProcessIdentity.current())
while time.time() < float(sys.argv[2]):
    pass
end_mesh(run, "the frontend is gone")
"""


@pytest.mark.parametrize("attempt", range(6))
def test_two_ranks_that_notice_at_once_leave_nothing(attempt: int) -> None:
    """Each kills the other: whichever comes first, the folders must be gone by then."""
    run = RunDirectory.create(num_ranks=2)
    folders = [run.path, *run.companions()]
    at = str(time.time() + 0.5)
    ranks = [
        subprocess.Popen([sys.executable, "-c", ENDS_AT, str(run.path), at], stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    for rank in ranks:
        rank.wait()
    assert [folder for folder in folders if folder.exists()] == []
