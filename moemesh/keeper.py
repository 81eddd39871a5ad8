"""`python -m moemesh.keeper`: between the frontend and mpirun (or the only rank), so that nobody stays behind.

It starts one command and waits. Whatever ends first - the command, or the frontend, by whichever signal - it kills
every process of the tree below it and exits with the command's code. It adopts orphans, so that ranks remain in its
tree when mpirun is killed. If the frontend is gone, it removes the run directory as well, for nobody else will.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from moemesh.processes import become_subreaper, descendants, die_with_parent
from moemesh.run_directory import RunDirectory, RunDirectoryError

_WAKE_ON = (signal.SIGCHLD, signal.SIGTERM)
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_POLL_SECONDS = 0.2
_HIGHEST_CODE = 127


def main(arguments: Sequence[str]) -> int:
    """`PARENT_PID RUN_DIRECTORY COMMAND...`; returns COMMAND's exit code, at most 127, or 128 + n for signal n."""
    parent, run_directory, *command = arguments
    become_subreaper()
    # Blocked signals wait for sigtimedwait: no handler can interrupt anything between two lines.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_WAKE_ON, *_IGNORED})
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_before_command)
    status = _wait(child.pid, int(parent))
    _kill_tree()
    if os.getppid() != int(parent):
        _remove(run_directory)
    return _exit_code(status)


def _before_command() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    die_with_parent()


def _wait(child: int, parent: int) -> int | None:
    """The child's exit status, or None when the frontend was lost first. SIGTERM is passed on to the child."""
    while os.getppid() == parent:
        received = signal.sigtimedwait(_WAKE_ON, _POLL_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM:
            os.kill(child, signal.SIGTERM)  # not reaped yet, so the pid is still the child's
        status = _reap(child)
        if status is not None:
            return status
    return None


def _reap(child: int | None = None) -> int | None:
    """Collect all zombies, adopted ones too; the status of `child` if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status


def _kill_tree() -> None:
    """SIGKILL everything below, until nothing is: who is killed may just have started somebody."""
    while living := descendants(os.getpid()):
        for process in living:
            process.send(signal.SIGKILL)
        signal.sigtimedwait({signal.SIGCHLD}, 0.01)
        _reap()


def _remove(run_directory: str) -> None:
    try:
        RunDirectory.open(run_directory).remove()
    except RunDirectoryError:
        return  # somebody else has removed it


def _exit_code(status: int | None) -> int:
    """As shells have it: 128 + n for signal n. An mpirun that ends with such a code speaks of a rank, not of itself."""
    if status is None:
        return 1
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else min(code, _HIGHEST_CODE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
