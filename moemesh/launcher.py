"""Starts the ranks of a mesh and sees to it that all of them end.

    frontend -- keeper -- mpirun -- rank 0, rank 1, ...        (one rank: frontend -- keeper -- rank 0)

The keeper has a session of its own: Ctrl-C reaches the frontend alone. See keeper.py for who ends whom.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from moemesh.mpi_command import ENDS_WITH_A_RANK, LaunchError, find_mpirun
from moemesh.options import EngineOptions
from moemesh.processes import ProcessIdentity, descendants, wait_until_gone
from moemesh.run_directory import RunDirectory

_STDERR = 2
_KILL_SECONDS = 5.0

logger = logging.getLogger(__name__)

_SIGNALS = {int(number) for number in signal.Signals}


MPIRUN_INTERRUPTED = 1
"""What Open MPI's mpirun ends with when SIGTERM, SIGINT or SIGHUP has told it to; else it has a rank's code, or 0."""


class RankProcesses(Protocol):
    """The rank processes of a mesh, as the frontend sees them, whoever started them."""

    @property
    def can_start(self) -> bool:
        """`start` may be called once they have ended."""
        ...

    def start(self, incarnation: int) -> None:
        """Start all ranks again, each as this life: those before have ended."""
        ...

    def poll(self) -> str | None:
        """None while they run; then how they ended, for the log and the user."""
        ...

    async def wait(self) -> str:
        """Until they have ended; how they ended. May be cancelled."""
        ...

    def stop(self, grace: float) -> None:
        """Ask them to end, after `grace` seconds kill them. Blocks until all are gone. Idempotent."""
        ...


class RankLauncher:
    """`options.ranks` rank processes, under an mpirun of ours when there are several.

    `rank_command` is what each rank runs (default: `moemesh.rank_process` on `run_directory`). Its stdout and stderr go
    to our stderr. Nothing is started before `start`; the caller must call `stop`, whatever happens, and then remove the
    run directory. One mesh for each launcher.
    """

    def __init__(
        self, options: EngineOptions, run_directory: RunDirectory, *, rank_command: Sequence[str] | None = None
    ) -> None:
        self._num_ranks = options.ranks
        self._run = run_directory
        self._rank_command = rank_command or module_command(
            "moemesh.rank_process", "--run-directory", str(run_directory.path)
        )
        self._keeper: subprocess.Popen[bytes] | None = None
        self._name = "the rank process"
        self._launch: tuple[list[str], dict[str, str]] | None = None
        self._stopping = False

    @property
    def can_start(self) -> bool:
        """Whether `start` may be called again: not after an mpirun that somebody has killed or told to end."""
        code = self._keeper.poll() if self._keeper is not None else None
        if code is None or self._num_ranks == 1 or self._stopping:
            return True
        return not ended_by_signal(code) and code != MPIRUN_INTERRUPTED

    def start(self, incarnation: int = 0) -> None:
        """Start the processes, again when they have ended; returns at once.

        Raises LaunchError when mpirun is missing or does not run.
        """
        assert self._keeper is None or self._keeper.poll() is not None, "the processes have not ended"
        if self._launch is None:
            self._launch = self._command()
        else:
            self._run.empty()
        command, environment = self._launch
        if incarnation:
            command = [*command, "--incarnation", str(incarnation)]
        self._stopping = False
        try:
            self._keeper = subprocess.Popen(
                module_command("moemesh.keeper", str(os.getpid()), str(self._run.path), *command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"cannot start {sys.executable}: {error}") from error

    @property
    def pid(self) -> int:
        """The keeper's pid, root of the tree of all ranks."""
        assert self._keeper is not None, "not started"
        return self._keeper.pid

    def poll(self) -> str | None:
        """None while the ranks run; then how they ended."""
        assert self._keeper is not None, "not started"
        code = self._keeper.poll()
        return None if code is None else f"{self._name} {describe_exit(code)}"

    async def wait(self) -> str:
        """Until the ranks have ended; how they ended."""
        while (ended := self.poll()) is None:
            await _readable_pidfd(self.pid)
        return ended

    def stop(self, grace: float) -> None:
        """SIGTERM to mpirun (or the rank), SIGKILL to the whole tree `grace` seconds later. Idempotent."""
        if self._keeper is None:
            return
        if self._keeper.poll() is None:
            self._stopping = True
            self._keeper.terminate()
            try:
                self._keeper.wait(grace)
            except subprocess.TimeoutExpired:
                self._kill()
        # Only a keeper that was itself killed can leave anybody: those are no longer in its tree, but they registered.
        end_processes(self._run.processes())

    def _kill(self) -> None:
        assert self._keeper is not None
        end_processes(descendants(self._keeper.pid))
        try:
            self._keeper.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()

    def _command(self) -> tuple[list[str], dict[str, str]]:
        environment = {**package_environment(), "TMPDIR": str(self._run.temporary)}
        if self._num_ranks == 1:
            return list(self._rank_command), environment
        mpirun = find_mpirun()
        if not mpirun.ulfm:
            logger.warning("%s: %s", mpirun.path, ENDS_WITH_A_RANK)
        self._name = "mpirun"
        command = mpirun.command(self._num_ranks, self._rank_command, shared_memory=self._run.shared_memory)
        return command, mpirun.environment(environment, temporary=self._run.temporary)


def end_processes(processes: list[ProcessIdentity]) -> None:
    """SIGKILL them and wait until they are gone."""
    sent = [process for process in processes if process.send(signal.SIGKILL)]
    wait_until_gone(sent, _KILL_SECONDS)


def module_command(module: str, *arguments: str) -> list[str]:
    """Run a module of ours in a new Python; -P: a folder of the user's named `experts` must not come before ours."""
    return [sys.executable, "-P", "-m", module, *arguments]


def package_environment() -> dict[str, str]:
    """Our environment, in which a new Python finds this very moemesh, also when it runs from a source tree."""
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[1])
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if root not in installed:
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = root if not known else os.pathsep.join([root, known])
    return environment


def ended_by_signal(code: int) -> bool:
    """The keeper's command, or the keeper, was ended by a signal: this is what its return code says."""
    return code < 0 or code - 128 in _SIGNALS


def describe_exit(code: int) -> str:
    """What a return code of subprocess, or a shell's 128 + n, says."""
    number = -code if code < 0 else code - 128
    if number in _SIGNALS:
        return f"was ended by {signal.Signals(number).name}"
    return f"ended with exit code {code}"


async def _readable_pidfd(pid: int) -> None:
    """Until the child ends; it stays a zombie, so that its pid cannot be reused before it is polled."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(pid)
    try:
        loop.add_reader(descriptor, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
