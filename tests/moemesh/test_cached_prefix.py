"""What sequences take from the prefix cache and what they leave there, seen through the scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from moemesh.sequence import LOGITS_NOT_FINITE, SamplingError, Sequence
from tests.moemesh.fake_group import BLOCK_SIZE, Group, alone, limits, sequence


def computed(group: Group, seq: Sequence) -> int:
    """Rows that it takes to run one more sequence to its end; its tokens must be those it gets alone."""
    expected = alone(seq, 64)[0][len(seq.output_ids) :]
    before = group.num_rows
    group.scheduler.add(seq)
    group.run()
    assert group.tokens(seq.seq_id) == expected
    return group.num_rows - before


def cached_tokens(group: Group, seq_id: int) -> list[int]:
    return [output.cached_tokens for output in group.outputs[seq_id]]


@pytest.mark.parametrize(("num_prompt", "rows"), [(3, 3), (4, 4), (5, 1), (8, 4), (9, 1), (20, 4), (23, 3)])
def test_of_an_equal_prompt_only_what_no_full_block_holds_and_the_last_token_is_computed(
    num_prompt: int, rows: int
) -> None:
    group = Group.of(32, limits())
    assert computed(group, sequence(1, num_prompt, family=1, max_tokens=1)) == num_prompt
    assert computed(group, sequence(2, num_prompt, family=1, max_tokens=1)) == rows
    assert cached_tokens(group, 1) == [0]
    assert cached_tokens(group, 2) == [num_prompt - rows]
    stats = group.scheduler.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (2 * num_prompt, num_prompt - rows)


def test_the_common_beginning_is_shared_while_both_run() -> None:
    group = Group.of(16, limits())
    group.scheduler.add(sequence(1, 10, family=1))
    group.start()
    group.finish()
    group.scheduler.add(sequence(2, 12, family=1))
    plan = group.start()
    assert plan is not None
    first, second = plan.items
    (admitted,) = plan.admitted
    assert (admitted.num_cached, second.start, second.count) == (8, 8, 4)
    tables = group.flights[0].tables
    assert tables[2][:2] == tables[1][:2]
    assert len(second.new_block_ids) == 3
    assert not first.new_block_ids
    group.run()
    for seq_id, num_prompt in ((1, 10), (2, 12)):
        assert group.tokens(seq_id) == alone(sequence(seq_id, num_prompt, family=1), 64)[0]
    assert sum(cached_tokens(group, 2)) == 8


def test_the_next_turn_of_a_chat_finds_the_answer_too() -> None:
    group = Group.of(32, limits())
    turn = sequence(1, 9, max_tokens=12, ignore_eos=True)
    computed(group, turn)
    # 21 tokens, of which the last was never computed, and 4 new ones.
    prompt = (*turn.prompt_ids, *group.tokens(1), 40, 41, 42, 43)
    following = sequence(2, 1, max_tokens=1)
    following.prompt_ids = prompt
    assert computed(group, following) == len(prompt) - 20
    assert cached_tokens(group, 2) == [20]


def test_where_latents_depend_on_the_role_a_prompt_finds_no_answer_and_an_answer_itself() -> None:
    group = Group.of(32, limits(), by_role=True)
    turn = sequence(1, 9, max_tokens=12, ignore_eos=True)
    computed(group, turn)
    answer = group.tokens(1)
    following = sequence(2, 1, max_tokens=1)
    following.prompt_ids = (*turn.prompt_ids, *answer, 40)
    assert computed(group, following) == 22 - 8  # two blocks of the first prompt; the third has generated tokens
    restarted = sequence(3, 9, output=answer[:11], family=1, max_tokens=12, ignore_eos=True)
    assert computed(group, restarted) == 20 - 16
    # Four tokens more of what was prompt above: the same tokens, of which others were generated.
    other = sequence(4, 1, output=answer[4:11], max_tokens=8, ignore_eos=True)
    other.prompt_ids = (*turn.prompt_ids, *answer[:4])
    assert computed(group, other) == 20 - 12  # the first 12 from the second sequence's prompt


def test_nothing_is_found_of_what_was_not_finite() -> None:
    group = Group.of(32, limits(tokens=32))
    assert computed(group, sequence(1, 9, family=1, max_tokens=1)) == 9
    group.scheduler.add(sequence(2, 14, family=1))
    group.scheduler.add(sequence(3, 10, family=3))
    plan = group.start()
    assert plan is not None
    flight = group.flights.pop()
    for item in plan.items:
        group.write(item, flight)
    group.scheduler.apply(plan, {2: LOGITS_NOT_FINITE, 3: SamplingError(reason="all masked")})
    assert group.scheduler.stats().num_not_finite == 1
    assert computed(group, sequence(4, 14, family=1, max_tokens=1)) == 14
    assert computed(group, sequence(5, 10, family=3, max_tokens=1)) == 2


def test_another_salt_finds_nothing() -> None:
    group = Group.of(32, limits())
    assert computed(group, sequence(1, 9, family=1, salt="a", max_tokens=1)) == 9
    assert computed(group, sequence(2, 9, family=1, salt="b", max_tokens=1)) == 9
    assert computed(group, sequence(3, 9, family=1, max_tokens=1)) == 9
    assert computed(group, sequence(4, 9, family=1, salt="a", max_tokens=1)) == 1


def test_switched_off_nothing_is_kept() -> None:
    group = Group.of(32, limits(), caching=False)
    for seq_id in (1, 2):
        assert computed(group, sequence(seq_id, 9, family=1, max_tokens=1)) == 9
    stats = group.scheduler.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (0, 0)
    assert not group.pool.sealed


def test_a_scored_prompt_is_computed_whole_but_serves_others() -> None:
    group = Group.of(32, limits())
    computed(group, sequence(1, 9, family=1, max_tokens=1))
    assert computed(group, sequence(2, 13, family=1, max_tokens=1, prompt_logprobs=0)) == 13
    assert cached_tokens(group, 2) == [0]
    assert computed(group, sequence(3, 13, family=1, max_tokens=1)) == 1
    assert group.scheduler.stats().num_prefix_queries == 9 + 13


def test_a_preempted_sequence_comes_back_to_what_is_left_of_its_blocks() -> None:
    params: dict[str, Any] = {"max_tokens": 9, "ignore_eos": True}
    # Both prompts take three blocks and leave one to grow into, which the older gets.
    group = Group.of(7, limits(length=20, tokens=32))
    group.scheduler.add(sequence(1, 11, **params))
    group.start()
    group.finish()
    group.scheduler.add(sequence(2, 11, **params))
    while group.scheduler.stats().num_preemptions == 0:
        group.start()
        group.finish()
    returns = None
    while returns is None:
        plan = group.start()
        assert plan is not None
        returns = next((entry for entry in plan.admitted if entry.seq_id == 2), None)
        group.finish()
    # It had filled three blocks, of which the older sequence needed one: the last.
    assert returns.num_cached == 8
    group.run()
    assert cached_tokens(group, 2) == [0] * 9, "its own blocks are nobody's cached prefix"
    for seq_id in (1, 2):
        assert group.tokens(seq_id) == alone(sequence(seq_id, 11, **params), 20)[0]


@pytest.mark.parametrize(("prompt_logprobs", "queries"), [(None, 44), (0, 4)])
def test_what_a_sequence_preempted_in_its_prompt_had_computed_is_no_hit(
    prompt_logprobs: int | None, queries: int
) -> None:
    # Two tokens of the second prompt a step: the first sequence outgrows the room left for it long before its end.
    group = Group.of(12, limits(tokens=3, length=48))
    group.scheduler.add(sequence(1, 4, max_tokens=40, ignore_eos=True))
    group.start()
    group.finish()
    group.scheduler.add(sequence(2, 40, max_tokens=3, ignore_eos=True, prompt_logprobs=prompt_logprobs))
    starts: list[int] = []
    while 2 not in group.outputs:
        plan = group.start()
        assert plan is not None
        starts += [entry.num_cached for entry in plan.admitted if entry.seq_id == 2]
        group.finish()
    first, again = starts
    assert first == 0
    assert (again > 0) == (prompt_logprobs is None), "a prompt that is scored starts anew"
    stats = group.scheduler.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (queries, 0)
    group.run()
    assert cached_tokens(group, 2) == [0, 0, 0]


def test_a_restarted_sequence_finds_its_prompt_but_reports_nothing() -> None:
    group = Group.of(32, limits())
    computed(group, sequence(1, 9, family=1))
    assert computed(group, sequence(2, 9, family=1, output=group.tokens(1)[:2])) < 9
    assert sum(cached_tokens(group, 2)) == 0


def test_cached_blocks_are_free_for_whoever_needs_them() -> None:
    group = Group.of(8, limits())
    for seq_id in range(1, 6):
        computed(group, sequence(seq_id, 20, max_tokens=1))
        assert group.pool.num_used == 0
    assert computed(group, sequence(6, 20, family=5, max_tokens=1)) == BLOCK_SIZE
    assert computed(group, sequence(7, 20, family=1, max_tokens=1)) == 20


def test_many_share_where_as_many_alone_would_not_fit() -> None:
    """Four sequences of 5 blocks in a cache of 8, 4 of them common."""
    group = Group.of(8, limits(tokens=64))
    computed(group, sequence(1, 17, family=1, max_tokens=1))
    for seq_id in range(2, 6):
        group.scheduler.add(sequence(seq_id, 17, family=1, max_tokens=3, ignore_eos=True))
    plan = group.start()
    assert plan is not None
    assert [item.seq_id for item in plan.items] == [2, 3, 4, 5]
    assert group.pool.num_used == 8
    group.run()
    assert group.scheduler.stats().num_preemptions == 0


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    """The choices of `n`: the others wait for the first one's blocks instead of computing them as well."""
    group = Group.of(64, limits(tokens=64))
    for seq_id in range(5):
        group.scheduler.add(sequence(seq_id, 18, family=1, max_tokens=3, ignore_eos=True))
    other = sequence(9, 6, max_tokens=3, ignore_eos=True)
    group.scheduler.add(other)
    plan = group.start()
    assert plan is not None
    assert [item.seq_id for item in plan.items] == [0, 9], "nobody else waits"
    group.finish()
    plan = group.start()
    assert plan is not None
    assert [(item.seq_id, item.count) for item in plan.items] == [(0, 1), (9, 1), *((i, 2) for i in range(1, 5))]
    group.run()
    for seq_id in range(5):
        assert group.tokens(seq_id) == alone(sequence(seq_id, 18, family=1, max_tokens=3, ignore_eos=True), 64)[0]


def test_who_waits_for_a_block_goes_on_as_soon_as_it_is_there_or_its_maker_gone() -> None:
    group = Group.of(64, limits(tokens=8))
    group.scheduler.add(sequence(1, 30, family=1))
    short = sequence(2, 1)
    short.prompt_ids = (*sequence(1, 4, family=1).prompt_ids, 49, 48)
    group.scheduler.add(sequence(3, 30, family=1))
    group.start()
    group.scheduler.add(short)
    assert group.start() is None
    group.finish()
    group.scheduler.cancel(1)
    plan = group.start()
    assert plan is not None
    assert [(item.seq_id, item.start) for item in plan.items] == [(3, 8)]
    group.finish()
    assert group.scheduler.cancel(3)
    plan = group.start()
    assert plan is not None
    assert [(item.seq_id, item.start) for item in plan.items] == [(2, 4)]
    group.run()


def test_those_that_wait_for_a_block_count_as_running() -> None:
    group = Group.of(64, limits(seqs=2))
    for seq_id in range(3):
        group.scheduler.add(sequence(seq_id, 9, family=1))
    group.scheduler.add(sequence(3, 2))
    plan = group.start()
    assert plan is not None
    assert [item.seq_id for item in plan.items] == [0]
    group.run()
