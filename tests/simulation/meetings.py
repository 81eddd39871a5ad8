"""How processes that come later get to know the others, in virtual time; implements Meetings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.mesh import SimulatedMesh
    from tests.simulation.process import Process

MEET_SECONDS = (0.003, 0.05)
SPAWN_SECONDS = (0.05, 0.5)
FAILURES = 0.1
"""The chance that a process cannot be started."""

Born = tuple[int, int]
"""A process: its rank, and the incarnation that it began as."""


class VirtualMeetings:
    """Those of one process. Two meet when both of them want to, a moment later."""

    def __init__(self, mesh: SimulatedMesh, process: Process) -> None:
        self._mesh, self._process = mesh, process
        self._wanted: set[Born] = set()
        self._failed: list[tuple[int, int, str]] = []

    def spawn(self, rank: int, incarnation: int, command: Sequence[str]) -> None:
        mesh = self._mesh

        def spawned() -> None:
            if self._process.ended:
                return
            if mesh.rng.random() < FAILURES:
                self._failed.append((rank, incarnation, "there are no slots"))
                self._process.wake()
            else:
                mesh.begin_process(rank, incarnation, parent=self._process)

        mesh.time.after(mesh.rng.uniform(*SPAWN_SECONDS), spawned)

    def accept(self, rank: int, incarnation: int) -> None:
        self._want((rank, incarnation))

    def connect(self, lives: Iterable[Born]) -> None:
        for life in lives:
            self._want(life)

    def take_failed(self) -> list[tuple[int, int, str]]:
        failed, self._failed = self._failed, []
        return failed

    def meet(self, other: Process) -> None:
        """From now on frames go between the two processes, if both are there still."""
        mesh, process = self._mesh, self._process

        def met() -> None:
            if not process.ended and not other.ended:
                mesh.network.introduce(process.rank, other.rank)
                process.wake()
                other.wake()

        mesh.time.after(mesh.rng.uniform(*MEET_SECONDS), met)

    def _want(self, life: Born) -> None:
        self._wanted.add(life)
        other = self._mesh.processes[life[0]]
        if other.born == life and not other.ended and self._process.born in other.meetings._wanted:
            self.meet(other)
