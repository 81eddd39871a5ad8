"""Credit windows, as a pair of state machines under any schedule."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.errors import Overloaded, ProtocolError
from transport.flow_control import CreditWindow


@given(
    window=st.integers(1, 20),
    schedule=st.lists(st.tuples(st.booleans(), st.sampled_from(["post", "poll"])), max_size=300),
)
def test_any_schedule_delivers_in_order_within_the_window(window: int, schedule: list[tuple[bool, str]]) -> None:
    ends: list[CreditWindow[int]] = [CreditWindow(window, 1000), CreditWindow(window, 1000)]
    wires: list[deque[tuple[int | None, int]]] = [deque(), deque()]
    posted, received = [0, 0], [0, 0]

    def pump(side: int) -> None:
        while (item := ends[side].pop()) is not None:
            wires[1 - side].append((item, ends[side].take_owed()))
        assert ends[side].in_flight <= window
        assert sum(item is not None for item, _ in wires[1 - side]) <= window

    def poll(side: int) -> None:
        while wires[side]:
            item, credits = wires[side].popleft()
            ends[side].returned(credits)
            if item is not None:
                assert item == received[side]
                received[side] += 1
                ends[side].consumed()
        pump(side)
        due = ends[side].take_due()
        if due:
            wires[1 - side].append((None, due))

    for side, action in schedule:
        if action == "post":
            ends[side].push(posted[side])
            posted[side] += 1
            pump(side)
        else:
            poll(side)
    while any(wires):
        poll(0)
        poll(1)
    assert received == posted[::-1]
    assert [end.queued for end in ends] == [0, 0]


def test_full_queue_is_refused_with_both_numbers() -> None:
    window: CreditWindow[str] = CreditWindow(2, max_queued=3)
    for _ in range(5):
        window.push("frame")
        window.pop()
    with pytest.raises(Overloaded, match=r"3 frames \(at most 3\) already wait behind 2"):
        window.push("frame")
    assert window.queued == 3


def test_too_many_credits_are_refused_and_leave_the_window_open() -> None:
    window: CreditWindow[str] = CreditWindow(1)
    window.push("first")
    window.push("second")
    assert window.pop() == "first"
    assert window.pop() is None
    with pytest.raises(ProtocolError, match="returned 2 credits while 1"):
        window.returned(2)
    assert window.pop() == "second"


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
