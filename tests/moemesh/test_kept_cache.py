"""What the survivors of a group believe of their cache."""

from __future__ import annotations

import msgpack
import pytest

from moemesh.kept_cache import KeptBlocks, KeptCache, KeptSequence, latest
from moemesh.sequence import Sequence
from moemesh.step_plan import PlanMirror, StepPlan
from tests.moemesh.fake_group import Group, limits, sequence


def kept(group: Group, generation: int = 0) -> KeptCache:
    last = group.mirror.last
    assert last is not None
    return KeptCache.of(generation, group.mirror, last)


def test_before_the_step_that_was_begun_last_everything_is_there() -> None:
    group = Group.of(16, limits())
    group.scheduler.add(sequence(1, num_prompt=6))
    group.start()
    first = kept(group)
    assert first.sequences == (KeptSequence(1, (0, 1), 0, 6, sample=True),)
    assert first.blocks({1: 6}) == {1: KeptBlocks((0, 1), 0)}, "nobody knows whether the step came to its end"
    assert first.blocks({1: 7}) == {1: KeptBlocks((0, 1), 6)}, "its token was sent"
    assert first.blocks({2: 9}) == {}, "nobody wants it any more"
    group.finish()
    group.start()
    second = kept(group)
    assert second.blocks({1: 7}) == {1: KeptBlocks((0, 1), 6)}
    assert latest([first, second, KeptCache(0)]) is second
    assert latest([second, KeptCache(1)]) == KeptCache(1)


def test_one_sequences_token_shows_that_the_whole_step_was_finished() -> None:
    group = Group.of(16, limits(tokens=10))
    for seq_id in (1, 2):
        group.scheduler.add(sequence(seq_id, num_prompt=8))
    group.start()
    assert [(item.start, item.stop) for item in group.flights[0].plan.items] == [(0, 8), (0, 2)]
    cache = kept(group)
    computed = {seq_id: blocks.num_computed for seq_id, blocks in cache.blocks({1: 8, 2: 8}).items()}
    assert computed == {1: 0, 2: 0}, "that a prompt is longer than its chunk shows nothing"
    computed = {seq_id: blocks.num_computed for seq_id, blocks in cache.blocks({1: 9, 2: 8}).items()}
    assert computed == {1: 8, 2: 2}


def test_a_plan_that_only_releases_leaves_the_others_whole() -> None:
    mirror = PlanMirror()
    group = Group.of(16, limits(), caching=False)
    group.mirror = mirror
    group.scheduler.add(sequence(1, max_tokens=2, ignore_eos=True))
    group.start()
    group.finish()
    mirror.follow(StepPlan(step=9))
    assert kept(group).blocks({1: 6}) == {1: KeptBlocks((0, 1), 5)}


def test_it_travels() -> None:
    cache = KeptCache(3, 7, (KeptSequence(5, (4, 2), 3, 6, sample=True), KeptSequence(6, (), 0, 0, sample=False)))
    assert KeptCache.from_wire(msgpack.unpackb(msgpack.packb(cache.to_wire()))) == cache


@pytest.mark.parametrize("wire", [7, [1, 2], [1, 2, 3], [0, 0, [[1, 2, 3]]], [0, 0, [[1, 2, 3, 1.5]]], [True, 0, []]])
def test_nothing_else_is_accepted(wire: object) -> None:
    with pytest.raises(ValueError, match="what is kept of a cache"):
        KeptCache.from_wire(wire)


def given(seq_id: int, output: list[int] | None = None) -> Sequence:
    """Two of one family, which share blocks, then two of the next."""
    return sequence(seq_id, num_prompt=5, output=output, family=(1 + seq_id) // 2, ignore_eos=True)


def moved(group: Group, *, known: dict[int, int]) -> Group:
    """The same caches under a new leader, who knows so many tokens of the sequences."""
    after = Group.of(group.pool.num_blocks, limits())
    after.cache = group.cache
    for seq_id, num_tokens in known.items():
        after.scheduler.add(given(seq_id, output=group.tokens(seq_id)[:num_tokens]))
    after.scheduler.resume(kept(group).blocks(after.scheduler.lengths()))
    return after


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("under_way", [False, True])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_another_leader_goes_on(steps: int, under_way: bool, lost: int) -> None:
    """Of three sequences nobody wants the last any more."""
    undisturbed = Group.of(16, limits())
    group = Group.of(16, limits())
    for one in (undisturbed, group):
        for seq_id in (1, 2, 3):
            one.scheduler.add(given(seq_id))
    undisturbed.run()
    for _ in range(steps):
        group.start()
        group.finish()
    if under_way:
        group.start()
    known = {seq_id: max(0, len(group.tokens(seq_id)) - lost) for seq_id in (1, 2)}
    after = moved(group, known=known)
    after.run()
    for seq_id, num_tokens in known.items():
        assert group.tokens(seq_id)[:num_tokens] + after.tokens(seq_id) == undisturbed.tokens(seq_id)
    assert after.num_rows <= sum(6 - num_tokens for num_tokens in known.values()) + 5, "at most one prompt"


def test_a_resumed_sequence_can_be_cancelled_before_anybody_was_told_of_it() -> None:
    group = Group.of(8, limits())
    for seq_id in (1, 3):
        group.scheduler.add(given(seq_id))
    group.start()
    group.finish()
    after = moved(group, known={1: 1, 3: 1})
    assert after.scheduler.stats().num_blocks_used == 4
    after.scheduler.cancel(1)
    after.run()
    assert not after.tokens(1)
    assert len(after.tokens(3)) == 5


def test_prompts_that_are_scored_begin_anew() -> None:
    group = Group.of(8, limits(tokens=3))
    scored = sequence(1, num_prompt=6, prompt_logprobs=0)
    group.scheduler.add(scored)
    group.start()
    group.finish()
    after = Group.of(8, limits())
    after.scheduler.add(sequence(1, num_prompt=6, prompt_logprobs=0))
    assert after.scheduler.resume({1: KeptBlocks((0, 1), 3)}) == []
    plan = after.start()
    assert plan is not None
    assert plan.items[0].start == 0
