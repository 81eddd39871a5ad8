"""The thread that ends a rank whose mesh is gone: nobody is left behind, whoever was killed and how.

It watches two processes: the frontend, and the parent (mpirun or the keeper). When one is gone, the mesh is over: it
removes the run's folders, kills the other ranks of this host, stopped ones too, and its own process. SIGKILL,
because with any other end MPI would wait for the dead in its exit handlers. A frontend on another host cannot be
watched; there the rank's heart ends it when the frontend has not been heard for long.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from moemesh.processes import ProcessIdentity
from moemesh.run_directory import RunDirectory, RunDirectoryError

POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


class Watchdog:
    """Ends this rank process when the frontend or the parent goes. Start it before anything that takes time.

    `started_by` is the parent's pid as the process found it first. `on_lost` is what to do with the reason, once, from
    the watchdog's thread; the default, `end_mesh`, never returns.
    """

    def __init__(
        self,
        run_directory: RunDirectory,
        *,
        started_by: int | None = None,
        on_lost: Callable[[RunDirectory, str], None] | None = None,
    ) -> None:
        self._run = run_directory
        self._parent = os.getppid() if started_by is None else started_by
        self._on_lost = on_lost or end_mesh
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Register this process in the run directory and watch from now on."""
        try:
            self._frontend = self._run.frontend
            self._run.register(ProcessIdentity.current())
            self._removed = False
        except (RunDirectoryError, OSError):
            self._removed = True
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer; for a process that outlives its mesh."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while (reason := self._lost()) is None:
            if self._stopped.wait(POLL_SECONDS):
                return
        self._on_lost(self._run, reason)

    def _lost(self) -> str | None:
        if os.getppid() != self._parent:
            return f"its parent (pid {self._parent}) is gone"
        if self._removed:
            return f"the run directory {self._run.path} is gone"
        if self._frontend is not None and not self._frontend.alive():
            return f"the frontend (pid {self._frontend.pid}) is gone"
        return None


def end_mesh(run_directory: RunDirectory, reason: str) -> NoReturn:
    """Remove the run's folders, kill all other ranks of this host, kill this process. Never returns."""
    logger.error("rank process %d ends: %s", os.getpid(), reason)
    ranks = run_directory.processes()
    # First the folders, then the ranks: all of them notice at about the same time, and whoever kills another has by
    # then removed what that one may have been about to remove.
    run_directory.remove()
    for process in ranks:
        if process.pid != os.getpid():
            process.send(signal.SIGKILL)
    end_failed()


def end_alone(run_directory: RunDirectory, reason: str) -> NoReturn:
    """Kill this process, which has lost the frontend or been given up; the last rank of its host removes the run's
    folders. Never returns."""
    logger.error("rank process %d ends: %s", os.getpid(), reason)
    others = [process for process in run_directory.processes() if process.pid != os.getpid()]
    if not any(process.alive() for process in others):
        run_directory.remove()
    end_failed()


def end_failed() -> NoReturn:
    """How a rank ends that failed: flushed, and by a signal that MPI's failure detection sees. Never returns."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    os._exit(1)  # not reached: the kernel acts before kill returns
