"""Who is in the mesh: events in, instructions out. The one writer of the view. No I/O, no clock.

    loading --ready--> up <--> suspect                      each of them --evidence, or time--> dead
                       up <--ready-- joining <--a new life-- dead

A new life begins in a new process, or in the old one when that was fenced and is heard of again. Nothing that a dead
life says or does counts any more.

Suspicion is cheap: a suspect rank is a member still. Death needs evidence: MPI's report, the end or the stop of the
process seen by the controller itself, or deadlines missed while the controller hears nothing of the rank or of its
progress. Only `Tick` judges by time, after taking off what the controller itself was late.
"""

from __future__ import annotations

from mesh_config.mesh import MeshConfig
from mesh_config.placement import Placement
from moemesh.attention_groups import AttentionGroups
from moemesh.detection import Detection, suspicion
from moemesh.expert_homes import ExpertHomes, Orders, count_experts
from moemesh.healing import Healing
from moemesh.membership_records import (
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
    RankState,
    RankView,
    Readmit,
    ReadySeen,
    Respawn,
    RestartRanks,
    SpawnFailed,
    Tick,
    TookOver,
    UnfitSeen,
    View,
)
from moemesh.rank_record import RankRecord
from moemesh.standstill import Standstill
from transport.life import Life


class Membership:
    """Feed it every event with the time; carry out what it returns, in order."""

    def __init__(self, mesh: MeshConfig, placement: Placement, settings: MembershipSettings) -> None:
        self._mesh = mesh
        self.homes = ExpertHomes(placement)
        """Which living rank hosts what, and who loads the rest."""
        self._settings = settings
        self._ranks = [RankRecord(rank=rank) for rank in range(mesh.num_ranks)]
        self._healing = Healing(self._ranks, settings)
        self._detection = Detection(mesh, self._ranks, settings)
        self._groups = AttentionGroups(mesh, self._ranks, comes_back=self._healing.respawns)
        self._standstill = Standstill(len(mesh.groups))
        self._epoch = 0
        self._started = False
        self._failed = False
        self._out: list[Instruction] = []
        self._changed = False
        self._published: tuple[int, Orders] = (placement.version, {})

    # --- what is known

    @property
    def view(self) -> View:
        """The view in force."""
        ranks = (
            RankView(incarnation=r.incarnation, state=r.state, reason=r.reason, born=r.born if r.can_be_met else -1)
            for r in self._ranks
        )
        return View(epoch=self._epoch, ranks=tuple(ranks), groups=self._groups.views)

    @property
    def started(self) -> bool:
        """Every rank has been up: the mesh is, or was, whole."""
        return self._started

    @property
    def degraded(self) -> bool:
        """Something is missing that was there."""
        return self._started and not all(record.living for record in self._ranks)

    @property
    def may_restart(self) -> bool:
        """When no rank is left, the frontend starts all of them again."""
        return self._started and self._healing.respawns and self._settings.restarts

    @property
    def all_lost(self) -> bool:
        """No process is left, and none is to come."""
        return self._healing.all_lost

    def is_present(self, life: Life) -> bool:
        """The life is the rank's present one, dead or not."""
        return 0 <= life.rank < len(self._ranks) and self._ranks[life.rank].life == life

    def believes(self, life: Life) -> bool:
        """What this life says of requests counts."""
        return self.is_present(life) and self._ranks[life.rank].living

    def believes_of(self, life: Life, group: int | None, generation: int) -> bool:
        """What this life says it has computed for an attention group counts. A generation that is over may have gone on
        for a while, but some of its words were not heard: what follows them must not be either."""
        return group is not None and self._groups.views[group].generation == generation and self.believes(life)

    def present(self, rank: int) -> Life:
        """The rank's present life."""
        return self._ranks[rank].life

    def serving_groups(self) -> tuple[int, ...]:
        """Attention groups that can compute sequences."""
        return self._groups.serving()

    def leader(self, group: int) -> Life | None:
        """Who schedules a group's sequences; None while the group computes nothing."""
        members = self._groups.views[group].members
        return self._ranks[members[0]].life if members else None

    def expert_hosts(self) -> tuple[int, ...]:
        """Ranks that may host experts and are not lost."""
        return tuple(rank for rank in self._mesh.expert_ranks if self._ranks[rank].state not in ("dead", "joining"))

    @property
    def placement(self) -> Placement:
        """Which living rank hosts what."""
        return self.homes.placement

    def missing_experts(self) -> tuple[int, ...]:
        """Ranks that are lost and hosted experts that nobody else has."""
        lost = [rank for rank in self._mesh.expert_ranks if not self._ranks[rank].living]
        return tuple(lost) if self.homes.missing else ()

    @property
    def stranded(self) -> str:
        """Why nobody can compute anything for now: experts are missing, and neither loaded nor about to come back."""
        if not self._started or not self.homes.stranded or self._healing.worth_waiting_for():
            return ""
        why = "; ".join(f"rank {rank}: {problem}" for rank, problem in sorted(self.homes.problems.items()))
        return f"{self.homes.missing} experts were lost and cannot be loaded again: {why}"

    # --- events

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """What is to be done about an event."""
        match event:
            case Tick():
                self._tick(now)
            case Heartbeat(life, progress, working, group, effort) if self.is_present(life):
                self._beat(self._ranks[life.rank], progress, working, now)
                self._standstill.beat(life.rank, progress, group, now)
                self._detection.note_effort(self._ranks[life.rank], effort)
            case ProcessBegan(life) if self.is_present(life):
                self._begun(self._ranks[life.rank])
            case HelloSeen(life, host) if self.is_present(life):
                self._greet(self._ranks[life.rank], host, now)
            case ReadySeen(life) if self.is_present(life):
                self._ready(self._ranks[life.rank], now)
            case PeerLost(reporter, peer) if self.believes(reporter) and self.is_present(peer):
                self._end(self._ranks[peer.rank], f"{reporter} was told by MPI that it has failed", now)
            case PeerLate(reporter, peer) if self.believes(reporter) and self.believes(peer):
                self._late(self._ranks[peer.rank], reporter, now)
            case ProcessEnded(life) if self.is_present(life):
                self._end(self._ranks[life.rank], "its process has ended", now)
            case ProcessSeen(life, stopped) if self.is_present(life):
                self._seen(self._ranks[life.rank], stopped, now)
            case RankFailed(life, error) if self.is_present(life):
                self._die(self._ranks[life.rank], error, now)
                self._kill(self._ranks[life.rank], now)
            case HostingSeen(life) if self.is_present(life):
                self._host(self._ranks[life.rank], event, now)
            case UnfitSeen(life, generation, error) if self.believes(life):
                self._unfit(self._ranks[life.rank], generation, error, now)
            case SpawnFailed(life, error) if self.is_present(life):
                self._end(self._ranks[life.rank], f"cannot respawn: {error}", now)
            case RanksEnded(reason):
                for record in self._ranks:
                    self._end(record, reason, now)
                self._healing.note_launcher_ended()
        return self._conclude(now)

    def _begun(self, record: RankRecord) -> None:
        record.began = True
        if record.state == "dead":  # given up before it came
            self._out.append(Kill(record.life))

    def _greet(self, record: RankRecord, host: str, now: float) -> None:
        record.heard_at, record.host = now, host
        record.said_hello = True
        self._changed |= record.state == "joining"  # the others are to meet it

    def _ready(self, record: RankRecord, now: float) -> None:
        if record.state in ("loading", "joining"):
            record.forgive(now)
            record.attempts = 0
            self._move(record, "up", "", now)
            self.homes.host(record.rank, record.hosting)

    def _host(self, record: RankRecord, seen: HostingSeen, now: float) -> None:
        """What a rank has before it serves counts as soon as it does."""
        if record.state == "joining":
            record.hosting = seen.experts
            self._changed = True  # it listens now, and is to know whom it must meet
        if not record.living:
            return
        self._out.append(TookOver(record.life, count_experts(seen.experts), count_experts(seen.refused), seen.problem))
        self.homes.host(record.rank, seen.experts)
        if seen.refused:
            self.homes.refuse(record.rank, seen.refused, seen.problem, now)

    def _late(self, record: RankRecord, reporter: Life, now: float) -> None:
        record.note_late(reporter.rank, now)
        self._suspect(record, now)

    def _seen(self, record: RankRecord, stopped: bool, now: float) -> None:
        if not stopped:
            record.seen_running_at = now
        elif record.state == "suspect":
            self._die(record, "its process is stopped", now)

    def _beat(self, record: RankRecord, progress: int, working: bool, now: float) -> None:
        record.beat(progress, working, now)
        if self._started and self._healing.readmits(record, now):
            before = record.life
            record.begin_life(now)
            self._move(record, "joining", "alive again: readmitted", now)
            self._out.append(Readmit(before, record.incarnation))

    # --- time

    def _tick(self, now: float) -> None:
        if late_by := self._detection.excuse_itself(now):
            self._out.append(Note(f"the frontend itself was {late_by:.1f} s late: deadlines wait as long"))
            self._standstill.forget()
        settled = self._started and not self.homes.orders and self._healing.nobody_may_come
        self._detection.compare(now, settled=settled, can_spare=self._can_spare)
        for record in self._ranks:
            record.forget_late(now, self._settings.late_memory)
            self._suspect(record, now)
            if record.state == "suspect":
                self._out.append(Look(record.life))
        for verdict in self._detection.verdicts(now):
            self._die(verdict.record, verdict.reason, now)
            if verdict.alive:
                self._kill(verdict.record, now)
            if verdict.slow:
                self._out.append(GaveUpSlow(verdict.record.life))
        self._restart_steps(now)
        for record in self._ranks:
            self._bring_back(record, now)
        if (incarnation := self._healing.begin_all(now)) is not None:
            for record in self._ranks:
                self._move(record, "joining", "started again with all others", now)
            self._out.append(RestartRanks(incarnation))

    def _suspect(self, record: RankRecord, now: float) -> None:
        if not record.living:
            return
        reason = suspicion(record, now, self._settings)
        if reason and record.state == "up":
            self._move(record, "suspect", reason, now)
        elif not reason and record.state == "suspect":
            self._move(record, "up", "", now)
        elif reason and reason == record.slow != record.reason:
            record.reason, self._changed = reason, True
            self._out.append(Note(f"{record.life} is suspect: {reason}"))

    def _can_spare(self, record: RankRecord) -> bool:
        """The mesh survives the death of a living rank: it is replaced, or there are others that serve."""
        others = [rank for rank in self._mesh.expert_ranks if self._ranks[rank].living and rank != record.rank]
        return self._healing.may_be_replaced(record) or (bool(others) and self._groups.compute_without(record.rank))

    def _restart_steps(self, now: float) -> None:
        """Groups whose members wait for each other run their step again; where that helps none of them, without the one
        that the others wait for."""
        for group, reason, broken in self._standstill.found(self._groups.views):
            if broken is None:
                self._out.append(self._groups.run_again(group, reason))
                self._changed = True
            elif self._ranks[broken].living:
                self._die(self._ranks[broken], f"its group cannot work with it: {reason}", now)
                self._kill(self._ranks[broken], now)

    def _bring_back(self, record: RankRecord, now: float) -> None:
        """Kill a fenced rank whose grace is over; begin the next life of one that has ended."""
        if record.state == "joining":
            self._watch_joining(record, now)
            return
        if record.state != "dead" or not self._started:
            return
        if not record.ended:
            if self._healing.grace_is_over(record, now):
                self._kill(record, now)
            record.ended = self._healing.out_of_sight(record, now)
        elif self._healing.begin_process(record, now):
            assert record.spawner is not None
            self._move(record, "joining", "respawned", now)
            self._out.append(Respawn(record.life, record.spawner))

    def _watch_joining(self, record: RankRecord, now: float) -> None:
        """A new process that does not come is not waited for: another one takes its place."""
        if reason := self._healing.fell_silent(record, now):
            self._die(record, reason, now)
        elif reason := self._healing.given_up(record, now):
            self._kill(record, now)
            self._end(record, f"cannot respawn: {reason}", now)

    # --- changes

    def _end(self, record: RankRecord, reason: str, now: float) -> None:
        record.ended = True
        self._die(record, reason, now)

    def _kill(self, record: RankRecord, now: float) -> None:
        if not record.ended and record.killed_at is None:
            record.killed_at = now
            self._out.append(Kill(record.life))

    def _die(self, record: RankRecord, reason: str, now: float) -> None:
        if record.state == "dead":
            return
        self._move(record, "dead", self._healing.note_death(record, reason, now), now)
        self.homes.lose(record.rank)

    def _move(self, record: RankRecord, state: RankState, reason: str, now: float) -> None:
        self._out.append(record.move(state, reason, now))
        self._changed = True

    def _conclude(self, now: float) -> list[Instruction]:
        """Experts and groups follow the ranks, the view follows all."""
        if self._started and not self._healing.beginning_all:
            self._have_loaded(now)
        if self._changed or self._published != (self.placement.version, self.homes.orders):
            self._started = self._started or all(record.state == "up" for record in self._ranks)
            self._out += self._groups.follow()
            self._epoch += 1
            self._out.append(PublishView(self.view, self.placement, self.homes.orders))
            self._changed, self._published = False, (self.placement.version, self.homes.orders)
        self._check_hope()
        out, self._out = self._out, []
        return out

    def _have_loaded(self, now: float) -> None:
        """What is nowhere is loaded by who lives."""
        able = {rank for rank in self._mesh.expert_ranks if self._ranks[rank].living}
        shares = self.homes.assign(able, now)
        if shares:
            who = ", ".join(f"rank {rank} loads {share}" for rank, share in sorted(shares.items()))
            self._out.append(Note(f"{self.homes.missing} experts are on no living rank: {who}"))

    def _unfit(self, record: RankRecord, generation: int, error: str, now: float) -> None:
        """The group begins anew; a rank that cannot be in it even then is of no use."""
        group = self._mesh.group_of(record.rank)
        if group is None or not self._groups.views[group].members or self._groups.views[group].generation != generation:
            return
        if self._groups.views[group].since == generation:
            self._die(record, error, now)
            self._kill(record, now)
        else:
            self._out.append(self._groups.restart(group, f"{record.life}: {error}"))
            self._changed = True

    def _check_hope(self) -> None:
        """FailMesh when it cannot serve and nothing can change that."""
        dead = [record for record in self._ranks if record.state == "dead"]
        if self._failed or not dead:
            return
        if not self._settings.fault_tolerance or not self._started:
            self._fail(f"{dead[0].life}: {dead[0].reason}")
            return
        missing = self.missing_experts()
        nowhere = missing and not any(self._ranks[rank].living for rank in self._mesh.expert_ranks)
        if (self.serving_groups() and not nowhere) or self._healing.may_return():
            return
        lost = self._ranks[missing[0]] if nowhere else dead[0]
        what = "experts that no rank can load" if nowhere else "the last attention group"
        none_left = self._healing.all_lost and self._healing.respawns and not self._settings.restarts
        why_over = (
            "; no rank is left, and those of a user's own mpirun cannot all be started again" if none_left else ""
        )
        self._fail(f"{lost.life}, with {what}: {lost.reason}{why_over}")

    def _fail(self, reason: str) -> None:
        self._failed = True
        self._out.append(FailMesh(reason))
