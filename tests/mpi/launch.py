"""Starts Python scripts under mpirun for the tests, and leaves nothing behind."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]


def end_run() -> None:
    """Called in a rank that failed: shows why and has mpirun end all ranks, which would wait for this one for ever.

    MPI_Abort does not do: with fault tolerance on it was seen to hang.
    """
    traceback.print_exc()
    sys.stderr.flush()
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()


def linger(progress: Callable[[], object]) -> NoReturn:
    """Called in a rank that is done and has said so: stays, with MPI's progress made, until the test ends the run.

    A rank that left at once would take with it what it sent last and others have not read yet: MPI drops the messages
    of a process that it has found gone.
    """
    while True:
        progress()
        os.sched_yield()


def mpirun_command(num_ranks: int, arguments: list[str], slots: int | None = None) -> list[str]:
    """The documented line, with the interpreter that runs the tests. Skips the test where there is no mpirun.

    With `slots` no more processes than that can ever be started.
    """
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("mpirun is not installed: pip install 'moemesh[mpi]'")
    room = ["--oversubscribe"] if slots is None else ["--host", f"localhost:{slots}"]
    flags = ["--with-ft", "ulfm", *room, "--bind-to", "none", "--mca", "pml", "ob1"]
    return [mpirun, *flags, "-n", str(num_ranks), sys.executable, *arguments]


def mpirun_environment() -> dict[str, str]:
    """The child's environment: our sources first, one thread a rank, and root allowed where we are root."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return environment


@contextmanager
def started_ranks(
    num_ranks: int, arguments: list[str], *, slots: int | None = None, timeout_s: float = 120.0
) -> Iterator[subprocess.Popen[str]]:
    """Run `python ARGUMENTS` on every rank, both outputs in one pipe; ended after `timeout_s`, and with the context."""
    process = subprocess.Popen(
        mpirun_command(num_ranks, arguments, slots),
        env=mpirun_environment(),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(timeout_s, _end, [process])
    watchdog.start()
    try:
        with process:
            try:
                yield process
            finally:
                _end(process)
    finally:
        watchdog.cancel()


def _end(process: subprocess.Popen[str]) -> None:
    """End mpirun if it still runs; it ends its ranks, stopped ones included."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)


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
