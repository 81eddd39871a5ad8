"""Credit windows, as a pair of state machines under any schedule, over wires that keep their promises and others."""

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.errors import Overloaded, ProtocolError
from transport.flow_control import (
    FIRST_PROBE_SECONDS,
    LAST_PROBE_SECONDS,
    MAX_MISSING,
    MAX_WINDOW,
    CreditWindow,
)

Parcel = tuple[int | None, int, int, bool]
"""Item, its number, acknowledgement, whether it is a probe."""


@dataclass
class End:
    """One of two ends: what it posted and received, and the wire towards it."""

    window: CreditWindow[int]
    wire: deque[Parcel] = field(default_factory=deque)
    posted: int = 0
    received: list[int] = field(default_factory=list)

    def post(self, peer: "End") -> None:
        self.window.push(self.posted)
        self.posted += 1
        self.pump(peer)

    def pump(self, peer: "End") -> None:
        while (item := self.window.pop()) is not None:
            peer.wire.append((item, self.window.sequence, self.window.tell(), False))

    def poll(self, peer: "End", now: float = 0.0) -> None:
        while self.wire:
            item, sequence, acknowledgement, probe = self.wire.popleft()
            self.window.acknowledged(acknowledgement)
            if item is not None and self.window.arrived(sequence):
                self.received.append(item)
            if probe:
                self.window.probed(sequence)
        self.pump(peer)
        if self.window.must_tell():
            peer.wire.append((None, 0, self.window.tell(), False))
        if self.window.probe_due(now):
            peer.wire.append((None, self.window.sequence, self.window.tell(), True))


def two_ends(size: int) -> tuple[End, End]:
    return End(CreditWindow(size, 10_000)), End(CreditWindow(size, 10_000))


@given(
    size=st.integers(1, 20),
    schedule=st.lists(st.tuples(st.booleans(), st.sampled_from(["post", "poll"])), max_size=300),
)
def test_any_schedule_delivers_in_order_within_the_window(size: int, schedule: list[tuple[bool, str]]) -> None:
    ends = two_ends(size)
    for side, action in schedule:
        end, peer = ends[side], ends[1 - side]
        end.post(peer) if action == "post" else end.poll(peer)
        assert end.window.in_flight <= size
        assert sum(item is not None for item, *_ in peer.wire) <= size
    while any(end.wire for end in ends):
        ends[0].poll(ends[1])
        ends[1].poll(ends[0])
    assert [end.received for end in ends] == [list(range(end.posted)) for end in reversed(ends)]
    assert [end.window.queued for end in ends] == [0, 0]


@given(size=st.integers(1, 20), seed=st.integers(0, 2**32), loss=st.floats(0, 0.6), doubling=st.floats(0, 0.9))
def test_no_credit_is_lost_on_wires_that_lose_double_and_reorder(
    size: int, seed: int, loss: float, doubling: float
) -> None:
    """Everything leaves in the end, nothing is taken twice, and what arrived at all was taken."""
    rng = random.Random(seed)
    ends = two_ends(size)
    arrived: list[set[int]] = [set(), set()]

    def poll(side: int, now: float) -> None:
        suffer(ends[side].wire, rng, loss, doubling)
        arrived[side] |= {item for item, *_ in ends[side].wire if item is not None}
        ends[side].poll(ends[1 - side], now)

    for turn in range(100):
        side = rng.randrange(2)
        ends[side].post(ends[1 - side])
        poll(rng.randrange(2), turn / 100)
    for turn in range(10_000):
        if not any(end.window.queued for end in ends):
            break
        poll(turn % 2, 1.0 + turn)
    assert [end.window.queued for end in ends] == [0, 0]
    for end, frames in zip(ends, arrived, strict=True):
        assert sorted(end.received) == sorted(frames)


def suffer(wire: deque[Parcel], rng: random.Random, loss: float, doubling: float) -> None:
    """Some of the parcels are lost, some come twice, in any order."""
    parcels = [parcel for parcel in wire for _ in range(1 + (rng.random() < doubling)) if rng.random() >= loss]
    rng.shuffle(parcels)
    wire.clear()
    wire.extend(parcels)


def test_full_queue_is_refused_with_both_numbers() -> None:
    window: CreditWindow[str] = CreditWindow(2, max_queued=3)
    for _ in range(5):
        window.push("frame")
        window.pop()
    with pytest.raises(Overloaded, match=r"3 frames \(at most 3\) already wait behind 2"):
        window.push("frame")
    assert window.queued == 3


def test_what_was_never_sent_cannot_be_acknowledged() -> None:
    window: CreditWindow[str] = CreditWindow(1)
    window.push("first")
    window.push("second")
    assert window.pop() == "first"
    assert window.pop() is None
    with pytest.raises(ProtocolError, match="acknowledged frame 2 and was sent 1"):
        window.acknowledged(2)
    assert window.pop() is None
    window.acknowledged(1)
    assert window.pop() == "second"


def test_late_acknowledgements_take_nothing_back() -> None:
    window: CreditWindow[int] = CreditWindow(4)
    for number in range(4):
        window.push(number)
        window.pop()
    window.acknowledged(3)
    window.acknowledged(1)
    assert window.in_flight == 1


def test_numbers_beyond_any_window_are_refused() -> None:
    window: CreditWindow[int] = CreditWindow(4)
    with pytest.raises(ProtocolError, match=f"frame {MAX_WINDOW + 1} is beyond any window after frame 0"):
        window.arrived(MAX_WINDOW + 1)
    with pytest.raises(ProtocolError, match="beyond any window"):
        window.probed(MAX_WINDOW + 1)
    assert window.arrived(1)


def test_what_is_missing_for_long_is_refused_and_the_memory_of_it_bounded() -> None:
    window: CreditWindow[int] = CreditWindow(4)
    assert window.arrived(MAX_MISSING + 10)
    assert not window.arrived(1)
    assert window.arrived(MAX_MISSING + 9)
    assert not window.arrived(MAX_MISSING + 9)


def test_probes_leave_only_when_the_window_stays_full_and_ever_more_rarely() -> None:
    window: CreditWindow[int] = CreditWindow(1)
    window.push(0)
    window.push(1)
    window.pop()
    times = [step * FIRST_PROBE_SECONDS / 4 for step in range(10_000)]
    probes = [now for now in times if window.probe_due(now)]
    gaps = [after - before for before, after in pairwise(probes)]
    assert gaps[:4] == pytest.approx([2 * FIRST_PROBE_SECONDS * 2**power for power in range(4)], rel=0.05)
    assert max(gaps) == pytest.approx(LAST_PROBE_SECONDS, rel=0.01)
    window.acknowledged(1)
    assert not window.probe_due(times[-1] + 1000)
    window.pop()
    assert not window.probe_due(times[-1] + 2000)


def test_a_probe_is_answered_at_once() -> None:
    window: CreditWindow[int] = CreditWindow(100)
    assert window.arrived(1)
    assert not window.must_tell()
    window.probed(7)
    assert window.must_tell()
    assert window.tell() == 7
    assert not window.must_tell()
    assert window.arrived(5)


def test_clear_returns_what_never_left() -> None:
    window: CreditWindow[int] = CreditWindow(1)
    for number in range(3):
        window.push(number)
    assert window.pop() == 0
    assert window.clear() == [1, 2]
    assert (window.queued, window.in_flight) == (0, 0)


@pytest.mark.parametrize(("size", "max_queued"), [(0, 1), (65536, 1), (1, 0)])
def test_impossible_sizes_are_refused(size: int, max_queued: int) -> None:
    with pytest.raises(ValueError, match="credit window"):
        CreditWindow(size, max_queued)
