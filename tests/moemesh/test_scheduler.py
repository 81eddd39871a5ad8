"""What the scheduler gives to whom and when; and that what a sequence gets does not depend on the others, on chunks,
pre-emptions, cancellations, cached prefixes or the number of steps in flight.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moemesh.scheduler_records import SchedulerLimits
from moemesh.sequence import Sampled, SamplingError, Sequence
from tests.moemesh.fake_group import Group, alone, limits, row_logprob, sequence


def test_decodes_come_before_prompts_and_prompts_in_chunks() -> None:
    group = Group.of(32, limits(tokens=8))
    group.scheduler.add(sequence(1, 3))
    group.start()
    group.finish()
    group.scheduler.add(sequence(2, 20))
    group.scheduler.add(sequence(3, 2))
    plan = group.start()
    assert plan is not None
    assert [(i.seq_id, i.start, i.count, i.sample) for i in plan.items] == [(1, 3, 1, True), (2, 0, 7, False)]
    assert [a.seq_id for a in plan.admitted] == [2]
    group.finish()
    plan = group.start()
    assert plan is not None
    assert [(i.seq_id, i.start, i.count) for i in plan.items] == [(1, 4, 1), (2, 7, 7)]
    assert plan.num_tokens == 8
    group.run()


def test_max_num_seqs_bounds_the_running() -> None:
    group = Group.of(64, limits(seqs=2))
    for seq_id in range(5):
        group.scheduler.add(sequence(seq_id, 1))
    plan = group.start()
    assert plan is not None
    assert [item.seq_id for item in plan.items] == [0, 1]
    stats = group.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 3)
    group.run()


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    # Both prompts fill two blocks each and leave one to grow into: the older gets it, the newer goes.
    group = Group.of(5, limits(length=16))
    group.scheduler.add(sequence(1, 7, max_tokens=9, ignore_eos=True))
    group.start()
    group.finish()
    group.scheduler.add(sequence(2, 7, max_tokens=9, ignore_eos=True))
    while group.scheduler.stats().num_preemptions == 0:
        plan = group.start()
        group.finish()
    assert plan is not None
    assert plan.released == (2,)
    assert [item.seq_id for item in plan.items] == [1]
    group.scheduler.add(sequence(3, 1))
    group.run()
    for seq_id in (1, 2):
        assert group.tokens(seq_id) == alone(sequence(seq_id, 7, max_tokens=9, ignore_eos=True), 16)[0]


def test_a_restarted_sequence_goes_on_before_those_that_wait() -> None:
    seq = sequence(1, 5, max_tokens=8, ignore_eos=True)
    whole = alone(seq, 64)[0]
    group = Group.of(32, limits(seqs=1))
    group.scheduler.add(sequence(2))
    group.scheduler.add(sequence(1, 5, output=whole[:3], max_tokens=8, ignore_eos=True))
    plan = group.start()
    assert plan is not None
    assert [(i.seq_id, i.start, i.count, i.sample) for i in plan.items] == [(1, 0, 8, True)]
    group.run()
    assert group.tokens(1) == whole[3:]
    assert [output.position for output in group.outputs[1]] == list(range(8, 13))


@pytest.mark.parametrize(
    ("params", "num_prompt", "story"),
    [
        ({"max_tokens": 30}, 20, "may grow to 50 tokens .* 13 cache blocks of 4 tokens, the cache has 8"),
        ({"max_tokens": None}, 20, "may grow to 64 tokens .* 16 cache blocks"),
        ({}, 0, "empty prompt"),
        ({}, 64, "has 64 tokens, at most 63 fit a context of 64"),
        ({"max_tokens": 0}, 65, "has 65 tokens, at most 64 fit"),
    ],
)
def test_what_can_never_be_served_is_refused(params: dict[str, Any], num_prompt: int, story: str) -> None:
    group = Group.of(8, limits())
    with pytest.raises(ValueError, match=story):
        group.scheduler.add(sequence(1, num_prompt, **params))
    assert not group.scheduler.has_work


def test_what_just_fits_is_served() -> None:
    # 33 tokens, of which the last is never computed, in 8 blocks of 4.
    group = Group.of(8, limits())
    group.scheduler.add(sequence(1, 20, max_tokens=13, ignore_eos=True))
    group.run()
    assert len(group.tokens(1)) == 13


def test_a_sequence_that_has_ended_or_is_known_is_refused() -> None:
    group = Group.of(8, limits())
    with pytest.raises(ValueError, match="ended already: 6 tokens of at most 6"):
        group.scheduler.add(sequence(1, output=[2] * 6))
    group.scheduler.add(sequence(1))
    with pytest.raises(ValueError, match="known already"):
        group.scheduler.add(sequence(1))


def test_stop_tokens_wait_for_min_tokens_and_ignore_eos() -> None:
    seq = sequence(1)
    seq.output_ids.append(1)
    assert seq.finish_reason(64) == "stop"
    assert sequence(1, output=[1], ignore_eos=True).finish_reason(64) is None
    assert sequence(1, output=[1], min_tokens=2).finish_reason(64) is None
    assert sequence(1, output=[9], stop_token_ids=(9,), ignore_eos=True).finish_reason(64) == "stop"
    assert sequence(1, output=[2] * 5 + [1]).finish_reason(64) == "stop"
    assert sequence(1, output=[2] * 6).finish_reason(64) == "length"
    assert sequence(1, 7, max_tokens=None, output=[2]).finish_reason(8) == "length"


def test_a_sequence_cancelled_in_flight_keeps_its_blocks_until_then() -> None:
    group = Group.of(8, limits())
    group.scheduler.add(sequence(1, 10))
    group.start()
    assert group.scheduler.cancel(1)
    assert not group.scheduler.cancel(1)
    assert group.pool.num_used == 3
    assert group.scheduler.has_work
    assert group.finish() == []
    assert group.pool.num_used == 0
    assert not group.scheduler.cancel(1)
    group.run()


def test_cancelled_while_waiting_or_running() -> None:
    group = Group.of(8, limits(seqs=1))
    for seq_id in (1, 2):
        group.scheduler.add(sequence(seq_id))
    group.start()
    group.finish()
    assert group.scheduler.cancel(1)
    assert group.scheduler.cancel(2)
    assert not group.scheduler.has_work
    plan = group.scheduler.release_plan()
    assert plan is not None
    assert plan.released == (1,)
    assert not plan.items


def test_a_sampling_error_ends_its_sequence_alone() -> None:
    group = Group.of(16, limits(tokens=32))
    group.scheduler.add(sequence(1))
    group.scheduler.add(sequence(2, prompt_logprobs=0))
    group.scheduler.add(sequence(3))
    plan = group.start()
    assert plan is not None
    fine, bad = Sampled(token_id=3), SamplingError(reason="not finite")
    outputs = group.scheduler.apply(plan, {1: bad, 2: fine, 3: fine}, {2: [bad] * 4})
    assert [(o.seq_id, o.error, o.sampled, o.finished) for o in outputs] == [
        (1, "not finite", None, True),
        (2, "not finite", None, True),
        (3, None, fine, False),
    ]
    assert group.scheduler.stats().num_running == 1


def test_a_prompt_alone_is_scored_without_a_token() -> None:
    group = Group.of(16, limits(tokens=4))
    seq = sequence(1, 10, max_tokens=0, prompt_logprobs=1)
    group.scheduler.add(seq)
    group.run()
    (output,) = group.outputs[1]
    assert (output.sampled, output.finish_reason, output.position) == (None, "length", 10)
    expected = [row_logprob(list(seq.prompt_ids[: p + 1]), seq.prompt_ids[p + 1]) for p in range(9)]
    assert output.prompt_logprobs == (None, *expected)


def test_prompt_logprobs_come_once_although_the_prompt_is_computed_twice() -> None:
    # Two tokens of the second prompt a step: the first sequence outgrows the room left for it long before its end.
    group = Group.of(12, limits(tokens=3, length=48))
    group.scheduler.add(sequence(1, 4, max_tokens=40, ignore_eos=True))
    group.start()
    group.finish()
    group.scheduler.add(sequence(2, 40, max_tokens=3, ignore_eos=True, prompt_logprobs=0))
    wanted: list[int] = []
    while 2 not in group.outputs:
        plan = group.start()
        assert plan is not None
        wanted += [p for item in plan.items for p in range(item.logprob_start, item.logprob_stop)]
        group.finish()
    assert group.scheduler.stats().num_preemptions > 0
    assert wanted == list(range(39))
    group.run()
    first, *others = group.outputs[2]
    prompt = sequence(2, 40).prompt_ids
    assert first.prompt_logprobs == (None, *(row_logprob(list(prompt[: p + 1]), prompt[p + 1]) for p in range(39)))
    assert all(output.prompt_logprobs is None for output in others)
    assert group.tokens(2) == alone(sequence(2, 40, max_tokens=3, ignore_eos=True), 48)[0]


def test_prompt_logprobs_are_not_given_again_after_a_preemption() -> None:
    group = Group.of(6, limits(length=20))
    group.scheduler.add(sequence(1, 7, max_tokens=13, ignore_eos=True))
    group.scheduler.add(sequence(2, 7, max_tokens=13, ignore_eos=True, prompt_logprobs=0))
    group.run()
    assert group.scheduler.stats().num_preemptions > 0
    assert [output.prompt_logprobs is None for output in group.outputs[2]] == [False] + [True] * 12


def test_admission_leaves_the_running_room_to_grow_and_keeps_the_order() -> None:
    group = Group.of(6, limits(length=20))
    group.scheduler.add(sequence(1, 4, max_tokens=16, ignore_eos=True))
    group.scheduler.add(sequence(2, 19, max_tokens=1))
    group.scheduler.add(sequence(3, 1, max_tokens=1))
    plan = group.start()
    assert plan is not None
    # The second fits the 5 blocks left, but not with one for the first to grow into; the third does not overtake it.
    assert [item.seq_id for item in plan.items] == [1]
    group.run()
    assert group.scheduler.stats().num_preemptions == 0


def test_a_sequence_waits_rather_than_preempt_one_in_flight() -> None:
    group = Group.of(6, limits(tokens=4, length=20))
    group.scheduler.add(sequence(1, 4, max_tokens=13, ignore_eos=True))
    group.start()
    group.finish()
    group.start()
    group.scheduler.add(sequence(2, 12, max_tokens=1))
    second = group.start()
    assert second is not None
    assert [item.seq_id for item in second.items] == [2]
    group.finish(0)
    while group.start() is not None:
        group.finish(-1)
    # The second keeps its 3 blocks while its step writes them; the first has the other 3 and lacks one.
    assert [flight.plan for flight in group.flights] == [second]
    assert (group.pool.num_free, group.scheduler.stats().num_preemptions) == (0, 0)
    group.run()
    assert group.scheduler.stats().num_preemptions == 1
    assert group.tokens(1) == alone(sequence(1, 4, max_tokens=13, ignore_eos=True), 20)[0]
    assert group.tokens(2) == alone(sequence(2, 12, max_tokens=1), 20)[0]


def test_a_restarted_sequence_does_not_score_its_prompt_again() -> None:
    group = Group.of(16, limits())
    group.scheduler.add(sequence(1, 6, output=[2], prompt_logprobs=0))
    plan = group.start()
    assert plan is not None
    assert plan.items[0].num_logprob_rows == 0
    group.run()
    assert all(output.prompt_logprobs is None for output in group.outputs[1])


def test_illegal_transitions_tell_their_story() -> None:
    group = Group.of(16, limits())
    group.scheduler.add(sequence(1))
    plan = group.start()
    assert plan is not None
    with pytest.raises(
        AssertionError, match=r"no sampled token came for sequence 1 \(in flight, 0 of 5 tokens computed"
    ):
        group.scheduler.apply(plan, {})
    with pytest.raises(AssertionError, match="1 prompt log-probabilities, not 0"):
        group.scheduler.apply(plan, {1: Sampled(token_id=2)}, {1: [Sampled(token_id=2)]})
    group.finish()
    with pytest.raises(AssertionError, match=r"step 0 was applied, the steps in flight are \[\]"):
        group.scheduler.apply(plan, {1: Sampled(token_id=2)})
    used = sequence(2)
    used.num_computed = 1
    with pytest.raises(AssertionError, match="sequence 2 was added with tokens computed"):
        group.scheduler.add(used)


@pytest.mark.parametrize("name", ["max_num_batched_tokens", "max_num_seqs", "max_model_len"])
def test_limits_are_positive(name: str) -> None:
    bounds = {"max_num_batched_tokens": 1, "max_num_seqs": 1, "max_model_len": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        SchedulerLimits(**bounds)


PARAMS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 12), "ignore_eos": st.booleans(), "family": st.integers(0, 3)},
    optional={"prompt_logprobs": st.just(1), "stop_token_ids": st.just((2, 3, 5, 7)), "min_tokens": st.just(1)},
)


@given(
    st.lists(st.tuples(st.integers(1, 20), PARAMS), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(8, 40),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None)
def test_every_sequence_gets_what_it_gets_alone(
    requests: list[tuple[int, dict[str, Any]]], tokens: int, seqs: int, num_blocks: int, overlap: bool, caching: bool
) -> None:
    group = Group.of(num_blocks, limits(tokens=tokens, seqs=seqs), caching=caching)
    for seq_id, (num_prompt, params) in enumerate(requests):
        group.scheduler.add(sequence(seq_id, num_prompt, **params))
        if overlap and group.start() is not None and len(group.flights) > 1:
            group.finish()
    group.run()
    for seq_id, (num_prompt, params) in enumerate(requests):
        expected, reason = alone(sequence(seq_id, num_prompt, **params), 64)
        assert group.tokens(seq_id) == expected
        assert [output.finish_reason for output in group.outputs[seq_id]] == [None] * (len(expected) - 1) + [reason]


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of adding, cancelling, stepping, with up to two steps in flight and applied in any order.

    Sequences begin alike within a family, so that they share blocks, also those they generated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.group = Group.of(10, limits(tokens=6, seqs=4, length=40))
        self.added: dict[int, Sequence] = {}
        self.cancelled: set[int] = set()

    @rule(num_prompt=st.integers(1, 20), restarted=st.integers(0, 3), params=PARAMS)
    def add(self, num_prompt: int, restarted: int, params: dict[str, Any]) -> None:
        seq_id = len(self.added)
        whole = alone(sequence(seq_id, num_prompt, **params), 40)[0]
        output = whole[: min(restarted, len(whole) - 1)]
        self.group.scheduler.add(sequence(seq_id, num_prompt, output=list(output), **params))
        self.added[seq_id] = sequence(seq_id, num_prompt, output=list(output), **params)

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.added)))
        if self.group.scheduler.cancel(seq_id):
            self.cancelled.add(seq_id)

    @precondition(lambda self: len(self.group.flights) < 2)
    @rule()
    def start(self) -> None:
        must_move = self.group.scheduler.has_work and not self.group.flights
        plan = self.group.start()
        assert plan is not None or not must_move
        if plan is not None:
            assert 1 <= plan.num_tokens <= 6

    @precondition(lambda self: self.group.flights)
    @rule(last=st.booleans())
    def finish(self, last: bool) -> None:
        self.group.finish(-1 if last else 0)

    @invariant()
    def blocks_are_written_by_one_owner_only(self) -> None:
        held = [block for flight in self.group.flights for table in flight.tables.values() for block in table]
        assert len(set(held)) <= self.group.pool.num_used
        assert all(held.count(block) == 1 for flight in self.group.flights for block in flight.written())
        assert self.group.scheduler.stats().num_running <= 4

    def teardown(self) -> None:
        self.group.run()
        for seq_id, seq in self.added.items():
            expected = alone(seq, 40)[0][len(seq.output_ids) :]
            tokens = self.group.tokens(seq_id)
            assert tokens == (expected[: len(tokens)] if seq_id in self.cancelled else expected)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
