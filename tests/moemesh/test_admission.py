"""Admission: who waits, who goes first, who is turned away."""

from __future__ import annotations

import pytest

from moemesh.admission import Admission, AdmissionLimits, QueueFull
from moemesh.ledger import Ledger, LedgerEntry
from moemesh.sampling_params import SamplingParams

PARAMS = SamplingParams()


class Queue:
    """An admission over two groups and the ledger behind it."""

    def __init__(self, *, max_num_seqs: int = 1, restart_tokens: int = 100, **limits: float) -> None:
        self.ledger = Ledger(2)
        self.limits = AdmissionLimits(max_num_seqs=max_num_seqs, restart_tokens=restart_tokens, **limits)  # type: ignore[arg-type]
        self.admission = Admission(self.ledger, self.limits)

    def enter(self, size: int = 10, *, now: float = 0.0) -> LedgerEntry:
        entry = self.ledger.admit((1,) * size, PARAMS, max_new_tokens=10)
        self.admission.enter(entry, now)
        return entry

    def take(self, *groups: int, now: float = 0.0) -> list[LedgerEntry]:
        return list(self.admission.take(groups, now))


def test_requests_go_in_order_until_the_groups_are_full() -> None:
    queue = Queue()
    room = 2 * queue.limits.requests_per_group
    entries = [queue.enter() for _ in range(room + 3)]
    assert queue.take() == []
    taken = queue.take(0, 1)
    assert taken == entries[:room]
    assert {entry.group for entry in taken} == {0, 1}
    assert queue.admission.num_waiting == 3
    queue.ledger.close(taken[0].request_id)
    assert queue.take(0, 1) == [entries[room]]


def test_only_groups_that_serve_get_any() -> None:
    queue = Queue()
    queue.enter()
    queue.enter()
    assert [entry.group for entry in queue.take(1)] == [1, 1]


def test_the_queue_is_bounded_by_requests() -> None:
    queue = Queue(max_queued_requests=2)
    for _ in range(2):
        queue.admission.check_room(10)
        queue.enter()
    with pytest.raises(QueueFull, match="2 requests are waiting, at most 2 may"):
        queue.admission.check_room(1)
    queue.take(0)
    queue.admission.check_room(1)


def test_the_queue_is_bounded_by_tokens_but_takes_one_request_of_any_size() -> None:
    queue = Queue(max_queued_tokens=25)
    queue.admission.check_room(99)
    entries = [queue.enter(), queue.enter()]
    queue.admission.check_room(5)
    with pytest.raises(QueueFull, match="requests with 20 tokens are waiting, at most 25 may"):
        queue.admission.check_room(6)
    queue.admission.forget(entries[0].request_id)
    queue.admission.check_room(15)


def test_who_is_refused_hears_how_long_the_queue_will_take() -> None:
    queue = Queue(max_num_seqs=1)
    entries = [queue.enter(now=10.0) for _ in range(queue.limits.requests_per_group + 6)]
    assert len(queue.take(0, now=10.0)) == queue.limits.requests_per_group
    for number, entry in enumerate(entries[:2], start=1):
        queue.ledger.close(entry.request_id)
        assert queue.take(0, now=10.0 + 14 * number)
    waiting, left = queue.admission.num_waiting, queue.limits.requests_per_group + 2
    assert queue.admission.retry_after(38.0) == waiting * 28.0 / left
    unbound = Queue()
    assert unbound.admission.retry_after(0.0) == 1.0


def test_who_waits_too_long_is_named() -> None:
    queue = Queue(queue_timeout=5.0)
    early, late = queue.enter(now=0.0), queue.enter(now=3.0)
    assert queue.admission.expired(5.0) == []
    assert queue.admission.expired(6.0) == [early]
    queue.admission.forget(early.request_id)
    assert queue.admission.expired(9.0) == [late]
    assert Queue().admission.expired(1e9) == []


def test_who_lost_its_group_goes_first_and_in_turn() -> None:
    queue = Queue(max_num_seqs=8, restart_tokens=25)
    lost = [queue.enter() for _ in range(4)]
    queue.take(0)
    fresh = queue.enter()
    queue.admission.restart(reversed(queue.ledger.lose(0, 0.0)))
    assert queue.take(1) == lost[:2], "30 tokens at a time are too many"
    assert queue.take(1) == []
    queue.ledger.accept(lost[0].request_id, 0, [5])
    assert queue.take(1) == [lost[2]]
    for entry in (lost[1], lost[2]):
        queue.ledger.accept(entry.request_id, 0, [5])
    assert queue.take(1) == [lost[3], fresh]


def test_a_long_restart_is_taken_alone() -> None:
    queue = Queue(restart_tokens=25)
    long = queue.enter(100)
    short = queue.enter(1)
    queue.take(0)
    queue.admission.restart(queue.ledger.lose(0, 0.0))
    assert queue.take(1) == [long]
    queue.ledger.close(long.request_id)
    assert queue.take(1) == [short]


def test_restarts_expire_never_and_do_not_count_against_the_queue() -> None:
    queue = Queue(queue_timeout=5.0, max_queued_requests=1)
    queue.enter()
    queue.take(0)
    queue.admission.restart(queue.ledger.lose(0, 0.0))
    assert queue.admission.num_waiting == 1
    queue.admission.check_room(1)
    assert queue.admission.expired(1e9) == []
    queue.admission.forget(1)
    assert queue.admission.num_waiting == 0


def test_who_could_not_be_sent_is_the_next_one_again() -> None:
    queue = Queue(queue_timeout=5.0)
    first, second = queue.enter(now=0.0), queue.enter(now=0.0)
    assert next(queue.admission.take((0,), 0.0)) is first
    queue.admission.put_back(first)
    assert queue.admission.expired(6.0) == [first, second]
    assert queue.take(0) == [first, second]
    queue.admission.restart(queue.ledger.lose(0, 0.0))
    assert next(queue.admission.take((1,), 0.0)) is first
    queue.admission.put_back(first)
    assert queue.take(1) == [first, second]
