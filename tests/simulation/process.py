"""A rank's process in virtual time: the production engine and heart, and what the startup code does around them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from moemesh.heads import HeadLoader
from moemesh.heart import Heart
from moemesh.idle import IdleWait
from moemesh.membership_records import BEAT_SECONDS
from moemesh.neighbours import Neighbours
from moemesh.rank_build import build_rank
from moemesh.rank_engine import RankEngine
from tests.simulation.control_plane import VirtualPort
from tests.simulation.loading import Loading, VirtualExecutor, VirtualTakeOver
from tests.simulation.tiny_model import CPU
from transport import messages
from transport.control import ControlClient
from transport.life import Life
from transport.local_link import LocalLink

if TYPE_CHECKING:
    from tests.simulation.mesh import SimulatedMesh

TURN_SECONDS = (0.001, 0.01)
"""What a turn takes in which something was computed."""
LOAD_SECONDS = (0.005, 0.05)


class Process:
    """One process of a rank. It runs, or is stopped, or has ended."""

    def __init__(self, mesh: SimulatedMesh, link: LocalLink, pid: int) -> None:
        self._mesh, self._time = mesh, mesh.time
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
            clock=mesh.time.clock,
        )
        self.engine: RankEngine | None = None
        self.stopped = self.ended = False
        self.slowness = 1.0
        self._busy_until = 0.0
        self._due: float | None = None
        host = mesh.scenario.host_of(self.rank)
        self.control.send(messages.Started(pid, host))
        self.control.send(
            messages.Hello(
                rank=self.rank,
                pid=pid,
                incarnation=life.incarnation,
                host=host,
                num_threads=1,
                isa="virtual",
            )
        )
        self._time.after(0.0, self._beat)

    @property
    def life(self) -> Life:
        """The life that the process speaks as."""
        return self.control.life

    def generation(self) -> int | None:
        """That of the attention group, as far as the rank has heard."""
        member = None if self.engine is None else self.engine._member
        return None if member is None else member.generation

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
        if self.ended or self.stopped:
            return
        due = max(at, self._busy_until, self._time.now)
        if self._due is None or due < self._due:
            self._due = due
            self._time.at(due, lambda: self._turn(due))

    def _control_came(self) -> None:
        if self.engine is not None:
            self.wake()
        elif any(isinstance(message, messages.Start) for message in self.control.receive_all()):
            seconds = self._rng.uniform(*LOAD_SECONDS) * self.slowness
            self._time.after(seconds, self._loaded)

    def _loaded(self) -> None:
        if self.ended:
            return
        if self.stopped:
            self._time.after(0.05, self._loaded)
            return
        mesh = self._mesh
        model, loader = mesh.model.share(mesh.config, mesh.placement, self.rank)
        loading = Loading(self._time, self._rng, self.wake)
        self.engine = build_rank(
            model,
            mesh.config,
            mesh.placement,
            link=self.link,
            control=self.control,
            device=CPU,
            idle=IdleWait(self.control, bell=None, alone=True, crowded=mesh.scenario.crowded),
            heart=self.heart,
            neighbours=Neighbours(self.rank, born=0, met=dict.fromkeys(range(mesh.config.num_ranks), 0)),
            head_loader=HeadLoader(loader.mla, mesh.model.checkpoint, free_memory=lambda: 1 << 40),
            executor=VirtualExecutor(loading),
            make_take_over=lambda service: VirtualTakeOver(loading, service, mesh.model.checkpoint, loader.ffns),
            clock=self._time.clock,
        )
        self.engine.announce()
        self.wake()

    def _turn(self, due: float) -> None:
        if due != self._due or self.ended or self.stopped or self.engine is None:
            return
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
        if rest is None:
            self._busy_until = now + self._rng.uniform(*TURN_SECONDS) * self.slowness
            self.wake()
        else:
            self._busy_until = now + 0.0001 * self.slowness
            self.wake(now + max(rest, 0.001))
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
