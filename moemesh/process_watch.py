"""The frontend's own eyes: the rank processes of its host, by pidfd."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

from moemesh.membership_records import ProcessEnded, ProcessSeen
from moemesh.processes import ProcessIdentity
from transport.life import Life


@dataclass(frozen=True, kw_only=True)
class _Watched:
    process: ProcessIdentity
    descriptor: int


class ProcessWatch:
    """Says when a process ends, whether it is stopped, and kills it. Of other hosts' processes it knows nothing.

    Lives on one running event loop; `on_end` is called there, at once for a process that is gone already.
    """

    def __init__(self, on_end: Callable[[ProcessEnded], None]) -> None:
        self._on_end = on_end
        self._watched: dict[Life, _Watched] = {}

    def watch(self, life: Life, pid: int, host: str) -> None:
        """Have an eye on the process of a life from now on; a former life's in the same process is over."""
        if host != socket.gethostname():
            return
        for other in [other for other, watched in self._watched.items() if watched.process.pid == pid]:
            self._forget(other)
        process = ProcessIdentity.of(pid)
        try:
            descriptor = os.pidfd_open(pid) if process is not None else None
        except ProcessLookupError:
            descriptor = None
        if process is None or descriptor is None:
            self._on_end(ProcessEnded(life))
            return
        self._watched[life] = _Watched(process=process, descriptor=descriptor)
        asyncio.get_running_loop().add_reader(descriptor, self._ended, life)

    def rename(self, before: Life, after: Life) -> None:
        """The process goes on as another life."""
        watched = self._watched.get(before)
        if watched is not None:
            self.watch(after, watched.process.pid, socket.gethostname())

    def look(self, life: Life) -> ProcessSeen | None:
        """What can be seen of it; None for one that is not watched."""
        watched = self._watched.get(life)
        return None if watched is None else ProcessSeen(life, watched.process.stopped())

    def kill(self, life: Life) -> bool:
        """SIGKILL; whether the process is watched."""
        watched = self._watched.get(life)
        if watched is not None:
            watched.process.send(signal.SIGKILL)
        return watched is not None

    def close(self) -> None:
        """Look no more."""
        for life in list(self._watched):
            self._forget(life)

    def _ended(self, life: Life) -> None:
        self._forget(life)
        self._on_end(ProcessEnded(life))

    def _forget(self, life: Life) -> None:
        watched = self._watched.pop(life)
        asyncio.get_running_loop().remove_reader(watched.descriptor)
        os.close(watched.descriptor)
