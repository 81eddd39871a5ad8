"""Real processes for tests of the launcher: who is left, and waiting for it without sleeping blindly."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from moemesh.launcher import package_environment

HERE = Path(__file__).parent
ROOT_CONSENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def eventually(condition: Callable[[], object], *, timeout_s: float = 20.0, what: str = "") -> float:
    """Seconds until `condition` held; fails the test when it does not in time."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise AssertionError(f"not within {timeout_s} s: {what or condition}")
        time.sleep(0.02)
    return time.monotonic() - started


class RunningMesh:
    """A mesh of scripted processes; `tell()` reads the next JSON line that its frontend printed."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.errors = folder / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**package_environment(), **ROOT_CONSENT, "TMPDIR": str(folder), "XDG_RUNTIME_DIR": ""},
                text=True,
                start_new_session=True,
            )
        self._folder = folder
        self._seen: dict[int, psutil.Process] = {}

    def tell(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise AssertionError(f"it ended: {self.errors.read_text()}")

    def remember(self, *pids: int) -> None:
        """Note all processes of the mesh: those given, and all below them."""
        for pid in pids:
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                self._seen[process.pid] = process

    def seen(self) -> list[psutil.Process]:
        return list(self._seen.values())

    def left(self) -> list[object]:
        """Processes, shared-memory folders and temporary folders that are still there."""
        alive = [process for process in self._seen.values() if _lives(process)]
        folders = [path for path in self._folder.iterdir() if path.is_dir()]
        segments = [path for path in self.shared_memory if path.exists()]
        return [*alive, *folders, *segments]

    shared_memory: tuple[Path, ...] = ()

    def end(self) -> None:
        for process in self._seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def running_mesh(folder: Path, command: Sequence[str]) -> Iterator[RunningMesh]:
    """Start it, and leave nothing behind when the test ends."""
    mesh = RunningMesh(command, folder)
    try:
        yield mesh
    finally:
        mesh.end()


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", str(HERE / "scripts" / name), *arguments]


def mpirun(num_ranks: int) -> list[str]:
    return [str(Path(sys.executable).parent / "mpirun"), "--with-ft", "ulfm", "--oversubscribe", "--bind-to", "none",
            "-n", str(num_ranks)]  # fmt: skip
