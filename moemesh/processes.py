"""Processes by identity: a pid may be reused, a pid with its start time means one process as long as the host is up."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process of this host; `start_time` is in clock ticks since boot, as in /proc/PID/stat."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The living process with this pid, or None. A zombie is not living."""
        stat = _read_stat(pid)
        return None if stat is None else cls(pid, stat.start_time)

    @classmethod
    def current(cls) -> ProcessIdentity:
        """This process."""
        identity = cls.of(os.getpid())
        assert identity is not None, "/proc does not list this very process"
        return identity

    @classmethod
    def parse(cls, text: str) -> ProcessIdentity:
        """The inverse of str(). Raises ValueError."""
        pid, _, start_time = text.strip().partition(":")
        return cls(int(pid), int(start_time))

    def __str__(self) -> str:
        return f"{self.pid}:{self.start_time}"

    def alive(self) -> bool:
        """Whether this very process lives, and not another one that got its pid."""
        return ProcessIdentity.of(self.pid) == self

    def stopped(self) -> bool:
        """A signal has stopped it, and none has continued it."""
        stat = _read_stat(self.pid)
        return stat is not None and stat.start_time == self.start_time and stat.state in "Tt"

    def send(self, signal_number: int) -> bool:
        """Signal this very process; False when it is gone."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            # The descriptor is one process, for good: if that is the right one now, the signal reaches the right one.
            if not self.alive():
                return False
            signal.pidfd_send_signal(descriptor, signal_number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    parent: int
    start_time: int


def _read_stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The command name stands in parentheses and may itself contain spaces and parentheses (proc(5)).
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else _Stat(state=fields[0], parent=int(fields[1]), start_time=int(fields[19]))


def descendants(pid: int) -> list[ProcessIdentity]:
    """All living children of `pid`, their children and so on, parents first."""
    children: dict[int, list[ProcessIdentity]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (stat := _read_stat(int(entry))) is not None:
            children.setdefault(stat.parent, []).append(ProcessIdentity(int(entry), stat.start_time))
    found: list[ProcessIdentity] = []
    frontier = [pid]
    while frontier:
        born = children.get(frontier.pop(), [])
        found += born
        frontier += [child.pid for child in born]
    return found


def wait_until_gone(processes: list[ProcessIdentity], timeout_s: float) -> list[ProcessIdentity]:
    """Those still alive after at most `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        processes = [process for process in processes if process.alive()]
        if not processes or time.monotonic() >= deadline:
            return processes
        time.sleep(_POLL_SECONDS)


def become_subreaper() -> None:
    """From now on orphans among our descendants become our children instead of init's: none can leave the tree."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel for `signal_number` when the *thread* that started this process ends (prctl(2))."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}, {value}) failed: {os.strerror(error)}")
