"""Plans on the wire, and the mirrors that follow them."""

from __future__ import annotations

import msgpack
import pytest

from moemesh.sequence import Sampled
from moemesh.step_plan import PlanMirror, ScheduledSequence, StepPlan
from tests.moemesh.fake_group import Group, limits, sequence


def test_a_pure_decode_step_is_small_on_the_wire() -> None:
    group = Group.of(64, limits(tokens=64))
    for seq_id in range(8):
        group.scheduler.add(sequence(seq_id, 4, max_tokens=30, ignore_eos=True))
    group.start()
    group.finish()
    group.start()
    group.finish()
    plan = group.start()
    assert plan is not None
    assert len(msgpack.packb(plan.to_wire())) < 8 * len(plan.items) + 16
    group.run()


def test_sampled_survives_the_wire() -> None:
    plain = Sampled(token_id=5)
    rich = Sampled(token_id=5, logprob=-0.5, rank=2, top_ids=(7, 5), top_logprobs=(-0.25, -0.5))
    for entry in (plain, rich):
        assert Sampled.from_wire(msgpack.unpackb(msgpack.packb(entry.to_wire()))) == entry
    with pytest.raises(ValueError, match="1 or 5 fields"):
        Sampled.from_wire([1, 2.0])


@pytest.mark.parametrize(
    ("wire", "story"),
    [
        (None, "5 fields"),
        ([0, [], []], "5 fields"),
        ([0, ["a"], [], [], 1], "released of a step plan"),
        ([0, [], [], [True], 1], "items of a step plan"),
        ([0, [], [], [1, 0, 1, 1], 1], "want 5 more numbers, 4 are left"),
        ([0, [], [], [1, 0, 1, 1, -1, 0], 1], "want -1 more"),
        ([0, [], [], [1, 0, 1, 1, 9, 0], 1], "want 9 more"),
        ([0, [], [], [1, 0, 0, 1, 0, 0], 1], "count=0"),
        ([0, [], [], [1, 0, 1, 8, 0, 0], 1], "flags=8"),
        ([0, [], [[1, [2], []]], [], 1], "7 fields"),
        ([0, [], [], [], 3], "1 or 2 micro-batches, not 3"),
        ([0, [], [[1, [2], [], {"bogus": 1}, 0, [], 0]], [], 1], "unknown sampling parameter"),
    ],
)
def test_a_malformed_plan_is_refused(wire: object, story: str) -> None:
    with pytest.raises(ValueError, match=story):
        StepPlan.from_wire(wire)


def test_micro_batches_survive_the_wire() -> None:
    for count in (1, 2):
        plan = StepPlan(step=0, micro_batches=count)
        assert StepPlan.from_wire(plan.to_wire()).micro_batches == count


def test_a_mirror_that_missed_a_plan_says_so() -> None:
    mirror = PlanMirror()
    item = ScheduledSequence(seq_id=4, start=0, count=1, sample=True)
    for plan in (StepPlan(step=3, items=(item,)), StepPlan(step=3, released=(4,))):
        with pytest.raises(ValueError, match="step 3 names sequence 4, which is not here"):
            mirror.follow(plan)
    group = Group.of(8, limits(tokens=2))
    group.scheduler.add(sequence(1))
    group.start()
    with pytest.raises(ValueError, match="computes positions 4 to 5 of sequence 1, which has 5 tokens and 2 computed"):
        group.mirror.follow(StepPlan(step=1, items=(ScheduledSequence(seq_id=1, start=4, count=1, sample=True),)))
    with pytest.raises(ValueError, match="admits sequence 1, which is here already"):
        group.mirror.follow(group.flights[0].plan)
