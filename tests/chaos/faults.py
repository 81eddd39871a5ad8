"""Carries events out, on the very mesh: who is struck, with what, and how it is undone."""

from __future__ import annotations

import heapq
import itertools
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.chaos import damage, hosts, scenario
from tests.chaos.history import History, Occurrence, Refusal
from tests.chaos.resources import measure
from tests.chaos.scenario import Event, Role
from tests.chaos.slowness import slowed
from tests.chaos.streams import Clients
from tests.end_to_end.harness import SMALL_CACHE, Mesh, run_to_end

POLL_SECONDS = 0.02
CROWD_FINISH_SECONDS = 60.0
REFUSAL_SECONDS = 60.0
VICTIM_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Site:
    """What events act upon."""

    mesh: Mesh
    frontend: psutil.Process
    draw: random.Random
    folder: Path
    requests: Sequence[dict[str, Any]]
    checkpoint: Path | None = None
    two_hosts: hosts.TwoHosts | None = None


class Player:
    """Plays events at their times and notes them in the history; leaving its block undoes what is still done."""

    def __init__(self, site: Site, history: History) -> None:
        self._site = site
        self._history = history
        self._struck: dict[int, psutil.Process] = {}
        self._lives: dict[int, int] = {}
        self._undo = ExitStack()
        self._order = itertools.count()
        self._delay = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def play(self, events: Sequence[Event], *, given_up: Callable[[], bool]) -> None:
        """All events, their times counted from now; ends early when `given_up`."""
        start = time.monotonic()
        for event in events:
            self._later(start + event.at, lambda event=event: self._carry_out(event))  # type: ignore[misc]
        while self._agenda:
            moment, _, action = heapq.heappop(self._agenda)
            if not wait_until(moment, unless=given_up):
                self._note(f"given up, {len(self._agenda) + 1} events before the end: nobody streams any more")
                return
            action()
            self._agenda = [(later + self._delay, order, doing) for later, order, doing in self._agenda]
            self._delay = 0.0

    def _later(self, moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (moment, next(self._order), action))

    def _note(self, what: str, *, ends_life: bool = False, victims: dict[int, int] | None = None) -> None:
        occurrence = Occurrence(moment=time.monotonic(), what=what, ends_life=ends_life, victims=victims or {})
        self._history.occurrences.append(occurrence)

    def _carry_out(self, event: Event) -> None:
        match event:
            case scenario.Signal(number=number, who=who, count=count):
                self._signal(number, who, count)
            case scenario.Slow(who=who, factor=factor, for_s=for_s):
                self._slow(who, factor, for_s)
            case scenario.KillMpirun(number=number):
                self._kill(self._find_mpirun(), "mpirun", number)
            case scenario.KillFrontend():
                self._kill(self._site.frontend, "the frontend", signal.SIGKILL)
            case scenario.CutLink(for_s=for_s):
                self._cut(for_s)
            case scenario.Overload(factor=factor, for_s=for_s):
                self._crowd(factor, for_s)
            case scenario.DamageCheckpoint(how=how):
                self._damage(how)
            case scenario.StartFrom(how=how):
                self._start_from(how)
            case scenario.FillDisk():
                filler = hosts.fill(self._site.mesh.temporary)
                self._undo.callback(filler.unlink, missing_ok=True)
                self._note(f"{filler.parent} is full")
            case _:
                raise AssertionError(f"nobody carries out a {type(event).__name__}")

    # --- ranks

    def _signal(self, number: signal.Signals, who: Role, count: int) -> None:
        ranks = self._choose(who, count)
        for process in ranks.values():
            with suppress(psutil.NoSuchProcess):  # fenced in the meantime
                process.send_signal(number)
        if number == signal.SIGSTOP:
            for process in ranks.values():
                self._undo.callback(_continue, process)
        shown = ", ".join(f"rank {rank} (pid {process.pid})" for rank, process in ranks.items())
        ends_life = number == signal.SIGKILL
        self._note(
            f"{number.name} to {shown}", ends_life=ends_life, victims={rank: self._lives[rank] for rank in ranks}
        )

    def _slow(self, who: Role, factor: float, for_s: float) -> None:
        for rank, process in self._choose(who, 1).items():
            slow = ExitStack()
            means = slow.enter_context(slowed(process, factor))
            self._undo.push(slow)
            self._note(f"rank {rank} {factor:g} times slower for {for_s:g} s: {means}")
            self._end_later(for_s, slow, f"rank {rank} as fast as before")

    def _end_later(self, after_s: float, doing: ExitStack, what: str) -> None:
        def end() -> None:
            doing.close()
            self._note(what)

        self._later(time.monotonic() + after_s, end)

    def _view(self) -> dict[str, Any]:
        view: dict[str, Any] = self._site.mesh.get("/mesh").body
        return view

    def _choose(self, who: Role, count: int) -> dict[int, psutil.Process]:
        """Processes by rank, each one of the mesh's own. Where so many are not up they are waited for, and
        whatever comes later waits as long."""
        if who is Role.SAME:
            return self._struck
        begun = time.monotonic()
        wait_until(begun + VICTIM_SECONDS, unless=lambda: len(scenario.candidates(who, self._view())) >= count)
        self._delay += time.monotonic() - begun
        view, ours = self._view(), self._ours()
        ranks = scenario.choose(who, view, count, self._site.draw)
        self._struck = {rank: ours[view["ranks"][rank]["pid"]] for rank in ranks}
        self._lives = {rank: view["ranks"][rank]["incarnation"] for rank in ranks}
        return self._struck

    def _ours(self) -> dict[int, psutil.Process]:
        """The mesh's own processes: no other may ever be struck."""
        return {process.pid: process for process in self._site.mesh.processes()}

    # --- others

    def _find_mpirun(self) -> psutil.Process:
        names = ("mpirun", "prterun")
        return next(one for one in self._site.mesh.processes() if Path(one.cmdline()[0]).name in names)

    def _kill(self, process: psutil.Process, name: str, number: signal.Signals) -> None:
        process.send_signal(number)
        self._note(f"{number.name} to {name} (pid {process.pid})")

    def _cut(self, for_s: float) -> None:
        link = self._site.two_hosts
        assert link is not None, "the scenario has no two hosts"
        link.cut()
        healing = ExitStack()
        healing.callback(link.heal)
        self._undo.push(healing)
        self._note(f"the link between the hosts is cut for {for_s:g} s")
        self._end_later(for_s, healing, "the link is whole again")

    def _crowd(self, factor: int, for_s: float) -> None:
        requests = self._site.requests
        crowd = Clients(self._site.mesh.url, requests, num_clients=factor * len(requests))
        self._undo.enter_context(crowd)
        self._note(f"a crowd of {factor * len(requests)} clients for {for_s:g} s")

        def disperse() -> None:
            self._history.resources["fault"] = measure(self._site.mesh)
            self._history.crowd = crowd.finish(CROWD_FINISH_SECONDS)
            self._note("the crowd has gone")

        self._later(time.monotonic() + for_s, disperse)

    # --- checkpoints

    def _damage(self, how: scenario.Damage) -> None:
        folder = self._site.checkpoint
        assert folder is not None, "the scenario serves from no checkpoint of its own"
        self._history.refusals.append(Refusal(words=damage.damage(folder, how), said=""))
        self._note(f"the checkpoint that is being served: {how}")

    def _start_from(self, how: scenario.Damage) -> None:
        folder = damage.copy_of_demo(self._site.folder / "damaged")
        words = damage.damage(folder, how)
        arguments = ("serve", str(folder), "--ranks", "2", "--port", "0", *SMALL_CACHE)
        try:
            done = run_to_end(*arguments, timeout_s=REFUSAL_SECONDS)
            refusal = Refusal(words=words, said=done.stderr, exit_code=done.returncode)
        except subprocess.TimeoutExpired:
            refusal = Refusal(words=words, said="", exit_code=0)
        self._history.refusals.append(refusal)
        self._note(f"another mesh started from a checkpoint with a {how}: {refusal.said.strip() or 'it serves'}")


def wait_until(moment: float, *, unless: Callable[[], bool]) -> bool:
    """Whether the moment came before `unless` held."""
    while (left := moment - time.monotonic()) > 0:
        if unless():
            return False
        time.sleep(min(left, POLL_SECONDS))
    return not unless()


def _continue(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGCONT)
