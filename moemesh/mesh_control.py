"""The controller's side of the ranks: tells membership what happens and carries out what it says.

The only writer of the mesh's view. Lives on the frontend's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from mesh_config.arithmetic import arithmetics_differ
from mesh_config.mesh import MeshConfig
from mesh_config.model_config import ModelConfig
from mesh_config.placement import Placement
from moemesh.expert_homes import Orders
from moemesh.membership import Membership
from moemesh.membership_records import (
    LIVING,
    Event,
    FailMesh,
    GaveUpSlow,
    Heartbeat,
    HelloSeen,
    HostingSeen,
    Instruction,
    Kill,
    Look,
    MembershipSettings,
    Note,
    PeerLate,
    PeerLost,
    ProcessBegan,
    ProcessEnded,
    ProcessSeen,
    PublishView,
    RankFailed,
    RanksEnded,
    Readmit,
    ReadySeen,
    Regroup,
    Respawn,
    RestartGroup,
    RestartRanks,
    SpawnFailed,
    TookOver,
    Transition,
    UnfitSeen,
    View,
)
from moemesh.mesh_view import MeshView
from moemesh.metrics import Metrics
from moemesh.slowness import Effort
from transport import messages
from transport.control import Channel
from transport.errors import Overloaded
from transport.life import Life

HEARD_SECONDS = 0.35
"""A heart is answered about so often, however often it beats: five times in a lease."""

logger = logging.getLogger(__name__)


class ControlPlane(Protocol):
    """The frontend's end of the control plane; `ControlServer` is the real one."""

    def send(self, life: Life, message: messages.Message, channel: Channel = "rank") -> None: ...

    async def receive(self) -> tuple[Life, messages.Message]: ...


class Watch(Protocol):
    """The frontend's eyes on the processes of ranks; `ProcessWatch` is the real one."""

    def watch(self, life: Life, pid: int, host: str) -> None: ...

    def rename(self, before: Life, after: Life) -> None: ...

    def look(self, life: Life) -> ProcessSeen | None: ...

    def kill(self, life: Life) -> bool: ...

    def close(self) -> None: ...


class MeshListener(Protocol):
    """Who has requests on the mesh."""

    def group_lost(self, group: int, reason: str) -> None:
        """The group's sequences are to be computed again, elsewhere or when it is back."""

    def group_regrouped(self, group: int, reason: str, *, lost: bool) -> None:
        """The group's sequences go on with what is cached of them: when the view is published, the group's leader is
        to be told them. `lost`: a member that computed them is gone."""

    def mesh_failed(self, reason: str) -> None:
        """The mesh can serve no longer."""

    def mesh_changed(self) -> None:
        """There is a new view."""


class MeshControl:
    """Ranks in, view out. `listener` hears what concerns requests."""

    def __init__(
        self,
        server: ControlPlane,
        listener: MeshListener,
        *,
        model: ModelConfig,
        mesh: MeshConfig,
        placement: Placement,
        expert_bytes: int,
        settings: MembershipSettings,
        metrics: Metrics,
        frontend_pid: int,
        clock: Callable[[], float],
        make_watch: Callable[[Callable[[ProcessEnded], None]], Watch],
    ) -> None:
        self._server = server
        self._listener = listener
        self._model = model.fingerprint
        self._mesh = mesh
        self._metrics = metrics
        self._clock = clock
        self._watch = make_watch(self.tell)
        self._events: deque[Event] = deque()
        self._placed: dict[Life, tuple[int, Mapping[int, tuple[int, ...]]]] = {}
        self._unstarted: list[Life] = []
        self._answered: dict[int, tuple[Life, float]] = {}
        self._stopping = False
        self._restarts: asyncio.Queue[int] = asyncio.Queue(1)
        self.membership = Membership(mesh, placement, settings)
        self.view = MeshView(mesh, self.membership, expert_bytes=expert_bytes, frontend_pid=frontend_pid)

    def close(self) -> None:
        """Watch nobody any more."""
        self._watch.close()

    def hear(self, life: Life, message: messages.Message) -> None:
        """A message of a rank about itself or its peers."""
        if not self.membership.is_present(life):
            self._metrics.stale_messages.inc()
            if isinstance(message, messages.Started):  # it was given up before it came
                self._watch.watch(life, message.pid, message.host)
                self._watch.kill(life)
            return
        match message:
            case messages.Heartbeat(progress, working, group, awake, processor):
                self.tell(Heartbeat(life, progress, working, group, Effort(awake, processor)))
                self._answer_heart(life)
            case messages.Started(pid=pid, host=host):
                self._watch.watch(life, pid, host)
                self.tell(ProcessBegan(life))
            case messages.Hello():
                self._hello(life, message)
            case messages.Progress(stage=stage, done=done, total=total):
                self.view.note_progress(life.rank, stage, done, total)
            case messages.Ready(num_blocks=num_blocks):
                self.view.note_ready(life.rank, num_blocks)
                self.tell(ReadySeen(life))
            case messages.Failed(error=error):
                self.tell(RankFailed(life, error))
            case messages.Hosting(experts=experts, refused=refused, problem=problem):
                self.tell(HostingSeen(life, experts, refused, problem))
            case messages.Unfit(generation=generation, error=error):
                self.tell(UnfitSeen(life, generation, error))
            case messages.NotSpawned(rank=rank, incarnation=incarnation, error=error):
                self.tell(SpawnFailed(Life(rank, incarnation), error))
            case messages.PeerReport(peer=peer, incarnation=incarnation, evidence=evidence):
                kind = PeerLost if evidence == "failed" else PeerLate
                self.tell(kind(life, Life(peer, incarnation)))
            case _:
                logger.warning("%s sent a %s, which only the frontend sends", life, type(message).__name__)

    def _answer_heart(self, life: Life) -> None:
        """Renew the life's lease, where that was not done just now."""
        now, (answered, at) = self._clock(), self._answered.get(life.rank, (None, 0.0))
        if (answered != life or now - at >= HEARD_SECONDS) and self.send(life, messages.Heard(), "heart"):
            self._answered[life.rank] = (life, now)

    def tell(self, event: Event) -> None:
        """Something has happened: see to what is to be done about it.

        What is found out while doing so waits its turn, or an older view would be published after a newer one.
        """
        if self._stopping:
            return
        self._events.append(event)
        if len(self._events) > 1:
            return
        while self._events:
            for instruction in self.membership.handle(self._events[0], self._clock()):
                self._carry_out(instruction)
            self._events.popleft()

    def send(self, life: Life, message: messages.Message, channel: Channel = "rank") -> bool:
        """Whether the message is on its way; a life that is over takes none."""
        try:
            self._server.send(life, message, channel)
        except Overloaded:
            return False
        return True

    def send_leader(self, group: int, message: messages.Message) -> bool:
        """The same, to the leader of an attention group."""
        leader = self.membership.leader(group)
        return leader is not None and self.send(leader, message)

    def stop_ranks(self) -> None:
        """Tell every rank to end; what happens to them from here on is no news."""
        self._stopping = True
        for rank in self.view.known_ranks():
            self.send(self.membership.present(rank), messages.Stop())

    async def next_start(self, ended: str) -> int:
        """All processes have ended, like this: the incarnation to start all of them as, when membership says so."""
        self.tell(RanksEnded(ended))
        return await self._restarts.get()

    def _hello(self, life: Life, hello: messages.Hello) -> None:
        """Give a rank the plan it loads by, unless its arithmetic differs from the others'. If that is not settled yet,
        those who come first wait for the others."""
        self.view.note_hello(hello)
        self.tell(HelloSeen(life, hello.host))
        difference = self._difference(hello)
        if difference:
            self.tell(RankFailed(life, f"{difference}: tokens would depend on who computes them"))
            self._watch.kill(life)
            return
        self._unstarted.append(life)
        if self.view.arithmetic != "auto":
            plan = replace(self._mesh, arithmetic=self.view.arithmetic).to_dict()
            for each in self._unstarted:
                self.send(each, messages.Start(config=plan, model=self._model))
            self._unstarted.clear()

    def _difference(self, hello: messages.Hello) -> str:
        """In what the rank's arithmetic differs from that of the others; empty: in nothing."""
        sets = self.view.instruction_sets()
        if arithmetics_differ(sets.values()):
            return f"some ranks compute with the C kernels, others without ({sets})"
        if hello.arithmetic not in ("auto", self.view.arithmetic):
            return f"rank {hello.rank} was started to compute in {hello.arithmetic}, the mesh in {self.view.arithmetic}"
        return ""

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case PublishView(view, placement, orders):
                self._publish(view, placement, orders)
            case Transition():
                self._note_transition(instruction)
            case RestartGroup(group, reason):
                self._listener.group_lost(group, reason)
            case Regroup(group, reason, lost):
                self._listener.group_regrouped(group, reason, lost=lost)
            case Look(life):
                seen = self._watch.look(life)
                if seen is not None:
                    self.tell(seen)
            case Kill(life):
                if not self._watch.kill(life):  # it is out of sight, on another host
                    self.send(life, messages.Stop(), "heart")
            case Readmit(life, incarnation):
                self._watch.rename(life, Life(life.rank, incarnation))
                self._metrics.ranks.rename(life.rank, incarnation)
                self.send(life, messages.Readmit(incarnation=incarnation))
            case Respawn(life, by):
                self._metrics.respawns.labels(str(life.rank)).inc()
                self._respawn(life, by)
            case RestartRanks(incarnation):
                for rank in range(self._mesh.num_ranks):
                    self._metrics.respawns.labels(str(rank)).inc()
                self._restarts.put_nowait(incarnation)
            case TookOver():
                self._note_take_over(instruction)
            case GaveUpSlow(life):
                self._metrics.slow_ranks.labels(str(life.rank)).inc()
            case FailMesh(reason):
                self._listener.mesh_failed(reason)
            case Note(text):
                logger.warning("%s", text)

    def _respawn(self, life: Life, by: int) -> None:
        local_rank, ranks_on_host = self.view.place_on_host(life.rank)
        order = messages.Respawn(life.rank, life.incarnation, local_rank, ranks_on_host)
        if not self.send(self.membership.present(by), order):
            self.tell(SpawnFailed(life, f"rank {by} cannot be told to start it"))

    def _publish(self, view: View, placement: Placement, orders: Orders) -> None:
        self._metrics.epoch.set(view.epoch)
        self._metrics.experts_missing.set(self.membership.homes.missing)
        message = messages.View(
            epoch=view.epoch,
            incarnations=[record.incarnation for record in view.ranks],
            states=[record.state for record in view.ranks],
            born=[record.born for record in view.ranks],
            groups=[messages.GroupMembers(group.generation, list(group.members), group.since) for group in view.groups],
        )
        hosts = {layer: [list(ranks) for ranks in placement.hosts_of(layer)] for layer in placement.moe_layers}
        for rank in view.listening():
            life = Life(rank, view.ranks[rank].incarnation)
            # Everybody plans the first placement alike.
            news = (placement.version, orders.get(rank, {}))
            order = {layer: list(experts) for layer, experts in news[1].items()}
            known = self._placed.get(life, (0, {})) == news
            if known or self.send(life, messages.Place(placement.version, hosts, order)):
                self._placed[life] = news
                self.send(life, message)
        self._listener.mesh_changed()

    def _note_take_over(self, done: TookOver) -> None:
        rank = done.life.rank
        if done.num_loaded:
            logger.info("%s: has taken over %d experts", done.life, done.num_loaded)
            self._metrics.experts_taken_over.labels(str(rank)).inc(done.num_loaded)
        if done.num_refused:
            logger.error("%s: cannot take over %d experts: %s", done.life, done.num_refused, done.problem)
            self._metrics.experts_refused.labels(str(rank)).inc(done.num_refused)

    def _note_transition(self, change: Transition) -> None:
        level = logging.INFO if change.after in ("up", "joining") else logging.WARNING
        reason = f": {change.reason}" if change.reason else ""
        logger.log(level, "%s: %s -> %s%s", change.life, change.before, change.after, reason)
        rank = change.life.rank
        self._metrics.transitions.labels(str(rank), change.after).inc()
        self._metrics.set_rank_up(rank, change.after in LIVING)
