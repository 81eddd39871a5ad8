"""A rank's process in virtual time: the production engine and heart, and what the startup code does around them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from moemesh.heads import HeadLoader
from moemesh.heart import Heart, Pulse
from moemesh.idle import IdleWait
from moemesh.membership_records import BEAT_SECONDS
from moemesh.neighbours import Neighbours
from moemesh.rank_build import build_rank
from moemesh.rank_engine import RankEngine
from moemesh.slowness import Effort
from tests.simulation.control_plane import VirtualPort
from tests.simulation.loading import Loading, VirtualExecutor, VirtualTakeOver, WeakCheckpoint
from tests.simulation.meetings import VirtualMeetings
from tests.simulation.tiny_model import CPU
from tests.simulation.virtual_time import Action
from transport import messages
from transport.control import ControlClient
from transport.life import Life
from transport.local_link import LocalLink

if TYPE_CHECKING:
    from tests.simulation.mesh import SimulatedMesh

TURN_SECONDS = (0.001, 0.01)
"""What a turn takes in which something was computed."""
LOAD_SECONDS = (0.005, 0.05)
IMPORT_SECONDS = (0.05, 0.5)
ABANDONED_SECONDS = 25.0


class VirtualPulse(Pulse):
    """Virtual time passes between turns, not in them: the process notes its efforts itself."""

    def note_turn(self, seconds: float, now: float) -> None:
        """See Pulse."""


class Process:
    """One process of a rank. It runs, or is stopped, or has ended."""

    def __init__(self, mesh: SimulatedMesh, link: LocalLink, pid: int, parent: Process | None = None) -> None:
        """`parent`: the process that has started this one while the mesh was serving."""
        self._mesh, self._time, self._parent = mesh, mesh.time, parent
        self._rng = random.Random(mesh.rng.random())
        self.link, self.rank, self.pid = link, link.rank, pid
        life = Life(link.rank, link.incarnation)
        self.control = VirtualPort(mesh.server, life, "rank", self._control_came)
        self.heart_port = VirtualPort(mesh.server, life, "heart", lambda: None)
        self.control.note = self.generation
        self.heart = Heart(
            _never,
            life,
            end=lambda reason: mesh.end_process(self.rank, f"ends: {reason}", pid=pid),
            is_gone=lambda: mesh.frontend_gone,
            abandoned_s=ABANDONED_SECONDS,
            clock=mesh.time.clock,
            pulse=VirtualPulse(),
        )
        self.engine: RankEngine | None = None
        self.stopped = self.ended = False
        self.slowness = 1.0
        self.born = (life.rank, life.incarnation)
        self.meetings = VirtualMeetings(mesh, self)
        self._neighbours = self._make_neighbours()
        self._earlier: list[messages.Message] = []
        self._starting = False
        self._busy_until = 0.0
        self._due: float | None = None
        self.control.send(messages.Started(pid=pid, host=mesh.scenario.host_of(self.rank)))
        self._later(0.0 if parent is None else self._rng.uniform(*IMPORT_SECONDS), self._begin)

    def _make_neighbours(self) -> Neighbours:
        others = [rank for rank in range(self._mesh.config.num_ranks) if rank != self.rank]
        return Neighbours(
            self.rank,
            born=self.born[1],
            met=dict.fromkeys(others, 0) if self._parent is None else {},
            meetings=self.meetings if others else None,
            command=lambda order: (),
        )

    def _later(self, seconds: float, action: Action) -> None:
        """After so much time of its own, unless it has ended."""

        def act() -> None:
            if self.stopped:
                self._time.after(0.05, act)
            elif not self.ended:
                action()

        self._time.after(seconds, act)

    def _begin(self) -> None:
        """Its heart beats, it has met its parent, and says hello."""
        self._beat()
        if self._parent is not None:
            self.meetings.meet(self._parent)
        host = self._mesh.scenario.host_of(self.rank)
        self.control.send(
            messages.Hello(
                rank=self.rank,
                pid=self.pid,
                incarnation=self.life.incarnation,
                host=host,
                num_threads=1,
                isa="virtual",
            )
        )

    @property
    def life(self) -> Life:
        """The life that the process speaks as."""
        return self.control.life

    def generation(self) -> int | None:
        """That of the attention group, as far as the rank has heard."""
        seat = None if self.engine is None else self.engine._seat
        return None if seat is None else seat.member.generation

    def hosts(self, layer: int) -> frozenset[int]:
        """The experts of a layer that can be asked for here."""
        return frozenset() if self.engine is None else frozenset(self.engine._experts.hosted().get(layer, ()))

    # --- what befalls it

    def end(self) -> None:
        """SIGKILL, or the end of its own making."""
        self.ended = True
        self.control.close()
        self.heart_port.close()

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def resume(self) -> None:
        """SIGCONT."""
        self.stopped = False
        self._due = None
        self.wake()
        self._time.after(0.0, self._beat)

    # --- its threads

    def wake(self, at: float = 0.0) -> None:
        """There may be something to do at that time."""
        if self.ended or self.stopped or self.engine is None:
            return
        due = max(at, self._busy_until, self._time.now)
        if self._due is None or due < self._due:
            self._due = due
            self._time.at(due, lambda: self._turn(due))

    def _control_came(self) -> None:
        if self.engine is not None:
            self.wake()
        if self._starting:
            return
        received = self.control.receive_all()
        self._earlier += [message for message in received if not isinstance(message, messages.Start)]
        if any(isinstance(message, messages.Start) for message in received):
            self._starting = True
            self._later(self._rng.uniform(*LOAD_SECONDS) * self.slowness, self._loaded)

    def _loaded(self) -> None:
        if self.rank in self._mesh.unreadable:
            self.control.send(messages.Failed(rank=self.rank, error="the checkpoint cannot be read"))
            self._mesh.end_process(self.rank, "ends: it cannot read the checkpoint")
            return
        for message in self._earlier:
            if isinstance(message, messages.View):
                self._neighbours.follow(message)
        mesh = self._mesh
        model, loader = mesh.model.share(mesh.config, mesh.placement, self.rank, mesh.scenario.quantization)
        loading = Loading(self._time, self._rng, self.wake)
        checkpoint = WeakCheckpoint(mesh.model.checkpoint, lambda: self.rank in mesh.unreadable)
        self.engine = build_rank(
            model,
            mesh.config,
            mesh.placement,
            link=self.link,
            control=self.control,
            device=CPU,
            idle=IdleWait(self.control, bell=None, alone=True, crowded=mesh.scenario.crowded),
            heart=self.heart,
            neighbours=self._neighbours,
            head_loader=HeadLoader(loader.mla, checkpoint, free_memory=self._free_memory),
            executor=VirtualExecutor(loading),
            make_take_over=lambda service: VirtualTakeOver(
                loading, service, checkpoint, loader.ffns, free_memory=self._free_memory
            ),
            clock=self._time.clock,
        )
        self.engine.hear(self._earlier)
        if self._parent is None:
            self.engine.announce()
        self.wake()

    def _free_memory(self) -> int:
        return 0 if self.rank in self._mesh.without_memory else 1 << 40

    def _turn(self, due: float) -> None:
        if due != self._due or self.ended or self.stopped:
            return
        assert self.engine is not None
        self._due = None
        mesh, now = self._mesh, self._time.now
        mesh.network.advance(now - mesh.network.now)
        try:
            self.engine.cycle()
        except Exception as error:
            mesh.crashed(self, error)
            return
        if self.engine.stopping:
            mesh.end_process(self.rank, "has been told to end")
            return
        rest = self.control.take_rest()
        took = 0.0001 if rest is not None else self._rng.uniform(*TURN_SECONDS)
        self._busy_until = now + took * self.slowness
        effort = self.heart.pulse.effort
        self.heart.pulse.effort = Effort(effort.awake + took * self.slowness, effort.processor + took)
        self.wake(0.0 if rest is None else now + max(rest, 0.001))
        mesh.wake_receivers()

    def _beat(self) -> None:
        if self.ended or self.stopped:
            return
        self.heart.listen(self.heart_port)
        if self.ended:
            return
        self.heart.beat(self.heart_port)
        self._time.after(BEAT_SECONDS * self._rng.uniform(1.0, 1.2), self._beat)


def _never(life: Life) -> ControlClient:
    raise AssertionError(f"the heart of {life} is beaten from outside")
