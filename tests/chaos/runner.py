"""Runs a scenario once: steady, fault, recovered, the end. Nothing of it stays, whatever happens."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from tests.chaos import damage, hosts
from tests.chaos.checks import judge_all
from tests.chaos.faults import Player, Site, wait_until
from tests.chaos.history import Answer, History, MeshEnd, Phase, Stream, Verdict, Window
from tests.chaos.resources import measure
from tests.chaos.scenario import Load, Scenario
from tests.chaos.streams import Clients
from tests.chaos.watcher import Watcher, take_sample
from tests.end_to_end.harness import ANSWER_SECONDS, Mesh, moemesh_command, serving, started

BEGIN_SECONDS = 60.0  # in which every client must have its first tokens
FIRST_TOKENS = 8
STEADY_SECONDS = (1.5, 4.0)
FINISH_SECONDS = 120.0
MOST_LATE_SECONDS = 1.0
PATIENT_SECONDS = 30.0  # for processes to go; the bar is the checks'
RIVAL_ROUNDS = 16  # of two to three seconds each
LOG_SHOWN = 4000


class Obstacle(RuntimeError):
    """The scenario cannot be run on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One repetition."""

    scenario: Scenario
    seed: int
    history: History
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        return not self.history.problem and all(verdict.passed for verdict in self.verdicts)


class References:
    """The answers of a mesh of one rank on which nothing fails; each load is asked once."""

    def __init__(self) -> None:
        self._known: dict[Load, tuple[Answer, ...]] = {}

    def of(self, load: Load) -> tuple[Answer, ...]:
        if load not in self._known:
            with (
                serving("--num-gpu-blocks-override", "2048") as mesh,
                Clients(mesh.url, load.requests(), rounds=1) as clients,
            ):
                streams = clients.finish(ANSWER_SECONDS)
                mesh.stop()
            assert all(stream.ending == "complete" for stream in streams), [stream.detail for stream in streams]
            self._known[load] = tuple(stream.answer for stream in sorted(streams, key=lambda one: one.kind))
        return self._known[load]


def run_scenario(scenario: Scenario, seed: int, references: References) -> Result:
    """One repetition. Raises Obstacle; whatever else goes wrong is in the result."""
    reason = (scenario.two_hosts and hosts.no_namespaces()) or (scenario.small_disk and hosts.no_mounts())
    if reason:
        raise Obstacle(reason)
    history = History(reference=references.of(scenario.load))
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    try:
        run = _Run(scenario, random.Random(f"{scenario.name} {seed}"), history, folder)
        run.compare() if scenario.rival is not None else run.carry_out()
    except (AssertionError, LookupError, OSError, psutil.Error, subprocess.SubprocessError) as error:
        history.problem = f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)
    verdicts = tuple(judge_all(scenario.all_checks(), history))
    return Result(scenario=scenario, seed=seed, history=history, verdicts=verdicts)


class _Run:
    """One repetition in progress."""

    def __init__(self, scenario: Scenario, draw: random.Random, history: History, folder: Path) -> None:
        self._scenario = scenario
        self._draw = draw
        self._history = history
        self._folder = folder
        self._requests: Sequence[dict[str, Any]] = scenario.load.requests()

    def carry_out(self) -> None:
        with ExitStack() as stack:
            site = self._start(stack)
            watcher = stack.enter_context(Watcher(site.mesh.url))
            clients = stack.enter_context(Clients(site.mesh.url, self._requests))
            try:
                with Player(site, self._history) as player:
                    self._phases(site.mesh, clients, watcher, player)
            finally:
                self._history.streams = clients.finish(0.0)
                self._history.lateness = clients.lateness
                self._history.views = watcher.samples
                self._note_what_was_said(site.mesh)
            self._end(site)
        late = self._history.lateness
        assert late < MOST_LATE_SECONDS, f"the harness itself stood still for {late:.1f} s: nothing it measured holds"

    def compare(self) -> None:
        """Rounds of the load on the mesh and on its rival, in turn; the one that waits computes nothing.

        Never two rounds of one in a row: the second of them is up to 15 % faster, its pages being warm."""
        assert self._scenario.rival is not None
        begun = time.monotonic()
        with serving(*self._scenario.flags) as mesh, serving(*self._scenario.rival) as rival:
            for number in range(RIVAL_ROUNDS + 1):
                for name, one in (("mesh", mesh), ("rival", rival)):
                    with Clients(one.url, self._requests, rounds=1) as clients:
                        streams = clients.finish(FINISH_SECONDS)
                    self._history.streams += streams
                    if number:  # the first round warms up
                        self._history.rates.setdefault(name, []).append(_rate(streams))
            mesh.stop()
            rival.stop()
        self._history.windows["steady"] = Window(start=begun, end=time.monotonic())

    # --- start

    def _start(self, stack: ExitStack) -> Site:
        scenario, checkpoint, link, temporary = self._scenario, None, None, None
        flags = scenario.flags
        if scenario.own_checkpoint:
            checkpoint = damage.copy_of_demo(self._folder / "model")
            flags = (str(checkpoint), *flags)
        if scenario.small_disk:
            temporary = stack.enter_context(hosts.small_disk(self._folder / "tmp"))
        if scenario.two_hosts:
            temporary = self._folder / "tmp"
            temporary.mkdir()
            link = stack.enter_context(hosts.two_hosts(self._folder, temporary))
            command = link.serve_command(flags, num_ranks=8)
        else:
            command = moemesh_command("serve", "--port", "0", *flags)
        mesh = stack.enter_context(started(command, temporary=temporary))
        mesh.wait_ready()
        return Site(
            mesh=mesh,
            frontend=psutil.Process(mesh.get("/mesh").body["frontend_pid"]),
            draw=self._draw,
            folder=self._folder,
            requests=self._requests,
            checkpoint=checkpoint,
            two_hosts=link,
        )

    # --- phases

    def _phases(self, mesh: Mesh, clients: Clients, watcher: Watcher, player: Player) -> None:
        begun = _wait_for(lambda: min(clients.snapshot()) >= FIRST_TOKENS, BEGIN_SECONDS, unless=clients.all_stopped)
        assert begun, f"not all clients got tokens within {BEGIN_SECONDS:g} s: {clients.snapshot()}"
        with self._phase("steady"):
            wait_until(time.monotonic() + self._draw.uniform(*STEADY_SECONDS), unless=clients.all_stopped)
        self._history.resources["steady"] = measure(mesh)
        with self._phase("fault"):
            player.play(self._scenario.events, given_up=clients.all_stopped)
            self._settle(mesh, clients, watcher)
        with self._phase("recovered"):
            wait_until(time.monotonic() + self._scenario.recovered_s, unless=clients.all_stopped)
        if self._scenario.outcome != "gone" and take_sample(mesh.url).reachable:
            self._history.resources["recovered"] = measure(mesh)
        clients.drain(FINISH_SECONDS)

    def _phase(self, phase: Phase) -> _Phase:
        return _Phase(self._history, phase)

    def _settle(self, mesh: Mesh, clients: Clients, watcher: Watcher) -> None:
        """Until the outcome is there, or nobody streams any more, or patience ends."""
        if self._scenario.outcome == "gone":
            _wait_for(lambda: clients.all_stopped() and not mesh.left(), self._scenario.settle_s)
            return
        before = clients.snapshot()

        def done() -> bool:
            flows = all(now > then for now, then in zip(clients.snapshot(), before, strict=True))
            return flows and (self._scenario.outcome == "degraded" or self._whole(watcher))

        _wait_for(done, self._scenario.settle_s, unless=clients.all_stopped)

    def _whole(self, watcher: Watcher) -> bool:
        """As the history will see it; without an event, there is nothing to recover from."""
        if not self._history.occurrences:
            return True
        return replace(self._history, views=watcher.samples).back_at() < float("inf")

    # --- end

    def _note_what_was_said(self, mesh: Mesh) -> None:
        """Where a damaged checkpoint had to be refused by the serving mesh: all that it has said."""
        self._history.log = mesh.log[-LOG_SHOWN:]
        said = mesh.log + take_sample(mesh.url).health_body
        refusals = self._history.refusals
        self._history.refusals = [one if one.said else replace(one, said=said) for one in refusals]

    def _end(self, site: Site) -> None:
        """Tell it to end, if the fault has not, and see what is left."""
        mesh, told = site.mesh, time.monotonic()
        if self._scenario.outcome == "gone":
            told = self._history.last_event
        else:
            mesh.remember_segments()
            with suppress(psutil.NoSuchProcess):  # the fault has ended it
                site.frontend.terminate()

        def left() -> list[object]:
            return [*mesh.left(), *(site.two_hosts.left() if site.two_hosts is not None else ())]

        _wait_for(lambda: not left() and mesh.process.poll() is not None, PATIENT_SECONDS)
        seconds = time.monotonic() - told
        self._history.end = MeshEnd(exit_code=mesh.process.poll(), left=tuple(map(str, left())), seconds=seconds)


class _Phase:
    """Notes from when to when; also when the phase breaks off."""

    def __init__(self, history: History, phase: Phase) -> None:
        self._history = history
        self._phase: Phase = phase
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._history.windows[self._phase] = Window(start=self._start, end=time.monotonic())


def _wait_for(condition: Callable[[], bool], timeout_s: float, *, unless: Callable[[], bool] = lambda: False) -> bool:
    """Whether the condition came to hold in time."""
    wait_until(time.monotonic() + timeout_s, unless=lambda: condition() or unless())
    return condition()


def _rate(streams: Sequence[Stream]) -> float:
    tokens = sum(len(stream.answer.tokens) for stream in streams)
    return tokens / (max(stream.ended for stream in streams) - min(stream.sent for stream in streams))
