"""The table of what a mesh must survive, as data; and which of it CI runs."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from tests.chaos.checks import (
    Check,
    Complete,
    Crippled,
    CrowdRefused,
    Degraded,
    EndsWith,
    FlatResources,
    Flowing,
    Identical,
    LongestGap,
    NeverStill,
    NothingLeft,
    Rate,
    RateOfRival,
    RefusedByName,
    Told,
    Undisturbed,
    WholeAgain,
)
from tests.chaos.history import Phase
from tests.chaos.scenario import (
    CutLink,
    Damage,
    DamageCheckpoint,
    Event,
    FillDisk,
    KillFrontend,
    KillMpirun,
    Load,
    Overload,
    Role,
    Scenario,
    Signal,
    Slow,
    StartFrom,
)

Checks = dict[Phase, Sequence[Check]]

# Meshes of four ranks. The cache holds all streams at once, so that nothing is computed twice but after a fault.
CACHE = ("--num-gpu-blocks-override", "1024")
FOUR = ("--ranks", "4", *CACHE)
TWO_GROUPS = (*FOUR, "--attention-tp", "2")
ONE_GROUP = (*FOUR, "--attention-tp", "4")
ONE_LEADER = (*FOUR, "--attention-ranks", "1", "--attention-tp", "1")
EXPERTS_APART = (*FOUR, "--attention-ranks", "2", "--attention-tp", "2")
GROUPS_APART = (*FOUR, "--attention-ranks", "2", "--attention-tp", "1")
REPLICAS = ("--redundant-experts", "256")  # of the demo model's 256: every expert has a second host
FEW_AT_ONCE = ("--max-num-seqs", "8")  # in each of two groups: the 16 streams are just what it computes at a time

RESPAWN_SECONDS = 20.0
KILL, STOP, CONTINUE = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT


def survives(*fault: Check, back_s: float = RESPAWN_SECONDS, recovered: Sequence[Check] = ()) -> Checks:
    """No failed stream, every token as without the fault, full strength again, and nothing left at the end."""
    return {
        "steady": (Flowing(),),
        "fault": (WholeAgain(back_s), *fault),
        "recovered": (Flowing(), Complete(), Identical(), *recovered, NothingLeft(10), EndsWith(zero=True)),
    }


def ends(*recovered: Check) -> Checks:
    """The mesh is gone within ten seconds, and every client knows."""
    return {
        "steady": (Flowing(),),
        "fault": (Told(10),),
        "recovered": (Identical(), NothingLeft(10), EndsWith(zero=False), *recovered),
    }


def serves_on(*checks: Check, recovered: Sequence[Check] = ()) -> Checks:
    """Nobody notices anything."""
    return {
        "steady": (Flowing(),),
        "fault": checks,
        "recovered": (Flowing(), Complete(), Identical(), *recovered, NothingLeft(10), EndsWith(zero=True)),
    }


def kill(who: Role, *, count: int = 1) -> tuple[Event, ...]:
    return (Signal(number=KILL, who=who, count=count),)


def stop_and_continue(who: Role) -> tuple[Event, ...]:
    return (Signal(number=STOP, who=who), Signal(number=CONTINUE, who=Role.SAME, at=5.0))


def join_after(how: Damage) -> tuple[Event, ...]:
    """The rank that replaces the killed one finds another checkpoint than the mesh serves from."""
    return (DamageCheckpoint(how=how), *kill(Role.EXPERTS_ONLY))


NO_FAULT = tuple(
    Scenario(
        name=f"no-fault-{name}",
        row="no fault",
        flags=flags,
        checks=serves_on() | {"steady": (Flowing(), LongestGap(1))},
    )
    for name, flags in (("two-groups", TWO_GROUPS), ("one-group", ONE_GROUP), ("experts-apart", EXPERTS_APART))
)

KILLS = (
    Scenario(
        name="kill-experts-with-replicas",
        row="SIGKILL a rank hosting experts whose experts have replicas",
        flags=(*EXPERTS_APART, *REPLICAS),
        events=kill(Role.EXPERTS_ONLY),
        checks=survives(LongestGap(0.5)),
    ),
    Scenario(
        name="kill-experts",
        row="the same without replicas",
        flags=EXPERTS_APART,
        events=kill(Role.EXPERTS_ONLY),
        checks=survives(LongestGap(2)),
    ),
    *(
        Scenario(
            name=f"kill-{name}",
            row="SIGKILL an attention leader, a TP peer, rank 0, with two groups",
            flags=TWO_GROUPS,
            events=kill(role),
            checks=survives(LongestGap(2)),
        )
        for name, role in (("leader", Role.LEADER), ("peer", Role.PEER), ("rank-0", Role.FIRST))
    ),
    *(
        Scenario(
            name=f"kill-{name}",
            row="SIGKILL with a single attention group (TP 4 and TP 1)",
            flags=flags,
            events=kill(role),
            checks=survives(LongestGap(5)),
        )
        for name, flags, role in (
            ("only-leader-of-4", ONE_GROUP, Role.LEADER),
            ("peer-of-4", ONE_GROUP, Role.PEER),
            ("only-leader-of-1", ONE_LEADER, Role.LEADER),
        )
    ),
    Scenario(
        name="kill-one-of-two-groups",
        row="Traffic between live ranks never stalls because of a dead or stopped one",
        flags=GROUPS_APART,
        events=kill(Role.LEADER),
        checks=survives(LongestGap(2), Undisturbed(share=0.4, seconds=0.3)),
    ),
    Scenario(
        name="kill-two-with-replicas",
        row="two ranks killed at once, replicas spread",
        flags=(*TWO_GROUPS, *REPLICAS),
        events=kill(Role.ANY, count=2),
        checks=survives(),
    ),
    Scenario(
        name="kill-30",
        row="30 kills, one every 3 s, under load, with respawn",
        flags=TWO_GROUPS,
        events=tuple(Signal(number=KILL, who=Role.ANY, at=3.0 * number) for number in range(30)),
        # A newcomer has a socket for each peer where the first four share memory, and MPI keeps two files for its job.
        checks=survives(recovered=(FlatResources(descriptors=8 + 4 * 3, run_files=4 * 2),)),
    ),
    Scenario(
        name="kill-without-respawn",
        row="--respawn off stays degraded",
        flags=(*TWO_GROUPS, "--respawn", "off"),
        events=kill(Role.EXPERTS),
        outcome="degraded",
        checks=serves_on(LongestGap(5), recovered=(Degraded(),)),
    ),
)

STOPS = (
    Scenario(
        name="stop-experts-with-replicas",
        row="SIGSTOP a rank; SIGCONT 5 s later",
        flags=(*EXPERTS_APART, *REPLICAS),
        events=stop_and_continue(Role.EXPERTS_ONLY),
        checks=survives(LongestGap(1), NeverStill(1), back_s=10),
    ),
    Scenario(
        name="stop-experts",
        row="SIGSTOP a rank; SIGCONT 5 s later",
        flags=EXPERTS_APART,
        events=stop_and_continue(Role.EXPERTS_ONLY),
        checks=survives(LongestGap(1), NeverStill(1), back_s=10),
    ),
    Scenario(
        name="stop-rank",
        row="SIGSTOP a rank; SIGCONT 5 s later",
        flags=TWO_GROUPS,
        events=stop_and_continue(Role.ANY),
        checks=survives(LongestGap(1), back_s=10),
    ),
    Scenario(
        name="stop-one-of-two-groups",
        row="Traffic between live ranks never stalls because of a dead or stopped one",
        flags=GROUPS_APART,
        events=stop_and_continue(Role.LEADER),
        checks=survives(LongestGap(1), Undisturbed(share=0.4, seconds=0.3), back_s=10),
    ),
    Scenario(
        name="slow-rank",
        row="a rank slowed 20 times (cgroup quota or equivalent)",
        flags=TWO_GROUPS,
        events=(Slow(who=Role.ANY, factor=20, for_s=10),),
        checks=survives(Rate(0.6 * 3 / 4)),
    ),
)

PARTITION = (
    Scenario(
        name="cut-link",
        row="network namespaces as two hosts (4 + 4 ranks), the link between them cut for 5 s",
        flags=("--attention-tp", "4", *CACHE, *REPLICAS),
        events=(CutLink(for_s=5),),
        two_hosts=True,
        checks=survives(LongestGap(5)),
    ),
)

CHECKPOINTS = (
    *(
        Scenario(
            name=f"start-from-{how.replace(' ', '-')}",
            row="truncated shard, missing tensor: refused by name; the mesh that was serving serves on",
            flags=("--ranks", "2", *CACHE),
            events=(StartFrom(how=how),),
            checks=serves_on(RefusedByName()),
        )
        for how in ("truncated shard", "missing tensor")
    ),
    *(
        Scenario(
            name=f"join-with-{how.replace(' ', '-')}",
            row="rank joining with another checkpoint: refused by name; the mesh that was serving serves on",
            flags=(*EXPERTS_APART, *REPLICAS),
            events=join_after(how),
            outcome="degraded",
            own_checkpoint=True,
            checks=serves_on(RefusedByName(), recovered=(Degraded(),)),
        )
        for how in ("truncated shard", "flipped byte", "missing tensor", "another checkpoint", "another config")
    ),
    Scenario(
        name="unlinked-at-take-over",
        row="an unlinked checkpoint at take-over leaves the mesh degraded and saying so, not dead",
        flags=(*EXPERTS_APART, "--respawn", "off"),
        events=join_after("unlinked"),
        outcome="degraded",
        own_checkpoint=True,
        checks=serves_on(LongestGap(5), recovered=(Degraded(),)),
    ),
    Scenario(
        name="truncated-at-take-over",
        row="a checkpoint that cannot be read at take-over leaves the mesh degraded and saying so, not dead",
        flags=(*EXPERTS_APART, "--respawn", "off"),
        events=join_after("truncated shard"),
        outcome="degraded",
        own_checkpoint=True,
        settle_s=5.0,
        checks={
            "steady": (Flowing(),),
            "fault": (Told(10),),
            "recovered": (Identical(), RefusedByName(), Crippled(), NothingLeft(10), EndsWith(zero=True)),
        },
    ),
    Scenario(
        name="full-disk-at-take-over",
        row="a full disk at take-over leaves the mesh degraded and saying so, not dead",
        flags=(*EXPERTS_APART, "--respawn", "off"),
        events=(FillDisk(), *kill(Role.EXPERTS_ONLY)),
        outcome="degraded",
        small_disk=True,
        checks=serves_on(LongestGap(5), recovered=(Degraded(),)),
    ),
)

ENDS = (
    *(
        Scenario(
            name=name,
            row="mpirun killed: no process left after 10 s; clients got an error, not silence",
            flags=TWO_GROUPS,
            events=(KillMpirun(number=number),),
            outcome="gone",
            checks=ends(),
        )
        for name, number in (("kill-mpirun", signal.SIGKILL), ("terminate-mpirun", signal.SIGTERM))
    ),
    Scenario(
        name="kill-frontend",
        row="frontend killed: no process left after 10 s; clients got an error, not silence",
        flags=TWO_GROUPS,
        events=(KillFrontend(),),
        outcome="gone",
        checks=ends(),
    ),
)

LOADS = (
    Scenario(
        name="overload",
        row="10x overload for 30 s",
        flags=(*TWO_GROUPS, *FEW_AT_ONCE),
        events=(Overload(factor=10, for_s=30),),
        checks={
            "steady": (Flowing(),),
            "fault": (CrowdRefused(), FlatResources(at="fault", descriptors=1000), FlatResources()),
            "recovered": (Flowing(), Complete(refused=True), Identical(), NothingLeft(10), EndsWith(zero=True)),
        },
    ),
    Scenario(
        name="cost-of-fault-tolerance",
        row="throughput with everything on and nothing failing, against --fault-tolerance off",
        flags=TWO_GROUPS,
        load=Load(tokens=(96, 96)),  # all to the end of a round: its last seconds would measure a few streams only
        rival=(*TWO_GROUPS, "--fault-tolerance", "off"),
        checks={"steady": (Complete(), Identical(), RateOfRival(0.97))},
    ),
)

SCENARIOS = {one.name: one for group in (NO_FAULT, KILLS, STOPS, PARTITION, CHECKPOINTS, ENDS, LOADS) for one in group}

# What `tests/chaos/test_chaos.py` runs, once each. `python -m tests.chaos` runs them all.
IN_CI = (
    "no-fault-two-groups",
    "no-fault-experts-apart",
    "kill-experts-with-replicas",
    "kill-only-leader-of-4",
    "start-from-truncated-shard",
    "start-from-missing-tensor",
    "kill-without-respawn",
    "unlinked-at-take-over",
    "truncated-at-take-over",
    "kill-mpirun",
    "kill-frontend",
    "cut-link",
)
