"""What the processes of a mesh hold at a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import psutil

from tests.chaos.history import Resources
from tests.end_to_end.harness import Mesh


def measure(mesh: Mesh) -> Resources:
    """Of the frontend, of all living ranks together, and of the folders of the run."""
    view = mesh.get("/mesh").body
    processes = {process.pid: process for process in mesh.processes()}
    frontend = processes[view["frontend_pid"]]
    ranks = [processes[rank["pid"]] for rank in view["ranks"] if rank["pid"] in processes]
    mesh.remember_segments()
    return Resources(
        frontend_rss=_rss([frontend]),
        ranks_rss=_rss(ranks),
        frontend_descriptors=_descriptors([frontend]),
        ranks_descriptors=_descriptors(ranks),
        shared_memory=sum(_bytes_in(folder) for folder in mesh.segments),
        run_files=sum(1 for _ in _files(mesh.temporary)),
        num_processes=len(processes),
    )


def _rss(processes: Iterable[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes)


def _descriptors(processes: Iterable[psutil.Process]) -> int:
    return sum(process.num_fds() for process in processes)


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in _files(folder):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total
