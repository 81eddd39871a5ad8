"""What membership never does, whatever it is told and in whatever order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh_config import MeshConfig, even_placement
from moemesh.membership import Membership
from moemesh.membership_records import (
    LIVING,
    TICK_SECONDS,
    Event,
    FailMesh,
    GroupView,
    Heartbeat,
    HelloSeen,
    HostingSeen,
    Instruction,
    MembershipSettings,
    PeerLate,
    PeerLost,
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
    Tick,
    Transition,
    UnfitSeen,
)
from transport.life import Life

RANKS = 5
ranks = st.integers(0, RANKS - 1)


class Story(RuleBasedStateMachine):
    """Events of present, past and future lives in any order, with time passing in between."""

    @initialize(
        tp=st.sampled_from([1, 2, 4]),
        respawn=st.booleans(),
        restarts=st.booleans(),
        grace=st.sampled_from([0.0, 1.0, 15.0]),
        ready=st.booleans(),
    )
    def begin(self, tp: int, respawn: bool, restarts: bool, grace: float, ready: bool) -> None:
        mesh = MeshConfig(num_ranks=RANKS, attention_ranks=4, attention_tp=tp, max_model_len=64)
        placement = even_placement(4, (1,), mesh.expert_ranks, RANKS)
        settings = MembershipSettings(respawn=respawn, restarts=restarts, stop_grace=grace)
        self.membership = Membership(mesh, placement, settings)
        self.restarts = restarts
        self.now = 0.0
        self.epoch = 0
        self.placement_version = 0
        self.lives = [0] * RANKS
        self.said = {Life(rank): set(placement.experts_on(1, rank)) for rank in range(RANKS)}
        self.begun: set[Life] = set()
        self.over: set[Life] = set()
        self.groups: list[GroupView] = list(self.membership.view.groups)
        self.failures = 0
        if ready:
            for rank in range(RANKS):
                self.tell(ReadySeen(Life(rank)))

    def tell(self, event: Event) -> list[Instruction]:
        lives = _lives_of(event)
        stale = bool(lives) and not all(map(self.membership.is_present, lives))
        before = self.membership.view
        out = self.membership.handle(event, self.now)
        if stale:
            assert out == []
            assert self.membership.view == before
        self.check(out)
        return out

    def check(self, out: list[Instruction]) -> None:
        for instruction in out:
            match instruction:
                case PublishView(view, placement):
                    assert placement.version >= self.placement_version
                    self.placement_version = placement.version
                    assert view.epoch == self.epoch + 1
                    assert view == self.membership.view
                    self.epoch = view.epoch
                case Respawn(life, by):
                    self.check_new(life)
                    assert by != life.rank
                case RestartRanks(incarnation):
                    assert self.restarts
                    for rank in range(RANKS):
                        self.check_new(Life(rank, incarnation))
                case Readmit(life, incarnation):
                    assert life in self.over
                    self.check_new(Life(life.rank, incarnation))
                case Transition(life, _, after, _):
                    assert life not in self.over, "the dead stay dead"
                    if after == "dead":
                        self.over.add(life)
                case FailMesh():
                    self.failures += 1
        restarted = {instruction.group for instruction in out if isinstance(instruction, RestartGroup)}
        regrouped = {instruction.group for instruction in out if isinstance(instruction, Regroup)}
        assert not restarted & regrouped
        for group, (before, after) in enumerate(zip(self.groups, self.membership.view.groups, strict=True)):
            assert (after.generation > before.generation) == (before != after)
            assert (group in regrouped) == (before.generation != after.generation and before.since == after.since)
            assert (group in restarted) == (bool(before.members) and before.since != after.since)
            if group in regrouped:
                kept = [member for member in before.members if member in after.members]
                assert after.members[: len(kept)] == tuple(kept), "whoever has the cache leads"
                assert kept
        self.groups = list(self.membership.view.groups)

    def check_new(self, life: Life) -> None:
        assert life not in self.begun, "each life begins once"
        assert self.membership.is_present(life)
        self.begun.add(life)

    def life(self, rank: int, offset: int) -> Life:
        return Life(rank, max(0, self.membership.present(rank).incarnation + offset))

    offsets = st.sampled_from([0, 0, 0, 0, -1, 1])

    @rule(rank=ranks, offset=offsets, kind=st.sampled_from([HelloSeen, ReadySeen, ReadySeen, ProcessEnded]))
    def about_one(self, rank: int, offset: int, kind: type[HelloSeen] | type[ReadySeen] | type[ProcessEnded]) -> None:
        self.tell(kind(self.life(rank, offset)))

    @rule(rank=ranks, offset=offsets, kind=st.sampled_from([RankFailed, SpawnFailed]))
    def fails(self, rank: int, offset: int, kind: type[RankFailed] | type[SpawnFailed]) -> None:
        self.tell(kind(self.life(rank, offset), "no reason"))

    @rule(rank=ranks, offset=offsets, back=st.integers(0, 1))
    def is_unfit(self, rank: int, offset: int, back: int) -> None:
        groups = self.membership.view.groups
        generation = groups[min(rank // (4 // len(groups)), len(groups) - 1)].generation
        self.tell(UnfitSeen(self.life(rank, offset), generation - back, "no memory"))

    @rule(rank=ranks, offset=offsets, experts=st.sets(st.integers(0, 3)), refused=st.sets(st.integers(0, 3)))
    def hosts(self, rank: int, offset: int, experts: set[int], refused: set[int]) -> None:
        life = self.life(rank, offset)
        self.said.setdefault(life, set()).update(experts)
        self.tell(HostingSeen(life, {1: sorted(experts)}, {1: sorted(refused)}, "no"))

    @rule(rank=ranks, offset=offsets, stopped=st.booleans())
    def is_seen(self, rank: int, offset: int, stopped: bool) -> None:
        self.tell(ProcessSeen(self.life(rank, offset), stopped))

    @rule(rank=ranks, offset=offsets, progress=st.integers(0, 3), working=st.booleans())
    def beats(self, rank: int, offset: int, progress: int, working: bool) -> None:
        self.tell(Heartbeat(self.life(rank, offset), progress, working))

    @rule(reporter=ranks, peer=ranks, offset=offsets, other=offsets, kind=st.sampled_from([PeerLate, PeerLost]))
    def accuses(self, reporter: int, peer: int, offset: int, other: int, kind: type[PeerLate] | type[PeerLost]) -> None:
        accuser = self.life(reporter, offset)
        believed = self.membership.believes(accuser)
        out = self.tell(kind(accuser, self.life(peer, other)))
        assert believed or not out

    @precondition(lambda self: self.restarts)
    @rule()
    def all_end(self) -> None:
        self.tell(RanksEnded("all have ended"))

    @rule(ticks=st.integers(1, 60), silent=st.sets(ranks))
    def time_passes(self, ticks: int, silent: set[int]) -> None:
        for _ in range(ticks):
            self.now += TICK_SECONDS
            for rank in set(range(RANKS)) - silent:
                self.tell(Heartbeat(self.membership.present(rank), int(self.now * 100), False))
            self.tell(Tick())

    @rule(seconds=st.floats(0.0, 100.0))
    def nobody_looks(self, seconds: float) -> None:
        for rank in range(RANKS):
            self.tell(Heartbeat(self.membership.present(rank), int(self.now * 100), False))
        self.now += seconds
        out = self.tell(Tick())
        died = [item.reason for item in out if isinstance(item, Transition) and item.after == "dead"]
        assert not any("silent" in reason for reason in died), "it does not know what happened meanwhile"

    @invariant()
    def lives_never_go_back(self) -> None:
        for rank, record in enumerate(self.membership.view.ranks):
            assert record.incarnation >= self.lives[rank]
            self.lives[rank] = record.incarnation
            believed = [life for life in range(record.incarnation + 2) if self.membership.believes(Life(rank, life))]
            assert believed == ([record.incarnation] if record.state in LIVING else [])

    @invariant()
    def the_dead_host_nothing(self) -> None:
        for rank, record in enumerate(self.membership.view.ranks):
            assert record.state != "dead" or not self.membership.placement.experts_of(rank)

    @invariant()
    def nothing_is_placed_before_it_is_loaded(self) -> None:
        for rank in range(RANKS):
            said = self.said.get(self.membership.present(rank), set())
            assert set(self.membership.placement.experts_on(1, rank)) <= said

    @invariant()
    def only_the_living_are_asked_to_load(self) -> None:
        assert set(self.membership.homes.orders) <= set(self.membership.view.living())

    @invariant()
    def the_end_comes_once(self) -> None:
        assert self.failures <= 1

    @invariant()
    def groups_serve_only_whole(self) -> None:
        living = set(self.membership.view.living())
        for group in self.membership.serving_groups():
            assert set(self.membership.view.groups[group].members) <= living


def _lives_of(event: Event) -> list[Life]:
    if isinstance(event, Tick | RanksEnded):
        return []
    return [event.reporter, event.peer] if isinstance(event, PeerLate | PeerLost) else [event.life]


Story.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStory = Story.TestCase
