"""From plans to rows: positions, cache slots and the rows that want logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention.rope import RotaryTable
from mesh_config import parse_model_config
from moemesh.batch import build_micro_batch, split_plan
from moemesh.sampling_params import SamplingParams
from moemesh.step_plan import AdmittedSequence, PlanMirror, ScheduledSequence, StepPlan
from tests.random_checkpoint import BASE_FIELDS


def _item(seq_id: int, start: int, count: int, **fields: object) -> ScheduledSequence:
    return ScheduledSequence(seq_id=seq_id, start=start, count=count, sample=True, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "parts"),
    [
        ([1, 1, 1, 1], [2, 2]),
        ([9, 1, 1], [1, 2]),
        ([1, 1, 9], [2, 1]),
        ([5], [1]),
        ([1, 1], [1, 1]),
    ],
)
def test_micro_batches_are_halves_of_whole_sequences(counts: list[int], parts: list[int]) -> None:
    plan = StepPlan(step=0, items=tuple(_item(i, 0, count) for i, count in enumerate(counts)), micro_batches=2)
    assert [len(part) for part in split_plan(plan)] == parts
    assert [item for part in split_plan(plan) for item in part] == list(plan.items)
    assert split_plan(replace(plan, micro_batches=1)) == [plan.items]


def _mirror(*prompts: tuple[int, tuple[int, ...]]) -> tuple[PlanMirror, RotaryTable]:
    """A mirror that has been told of these sequences, (id, prompt)."""
    config = parse_model_config({"architectures": ["DeepseekV3ForCausalLM"], **BASE_FIELDS})
    admitted = tuple(
        AdmittedSequence(
            seq_id=seq_id, prompt_ids=prompt, output_ids=(), params=SamplingParams(), seed=0, eos_ids=(), num_cached=0
        )
        for seq_id, prompt in prompts
    )
    mirror = PlanMirror()
    mirror.follow(StepPlan(step=0, admitted=admitted))
    return mirror, RotaryTable(config, 128, torch.device("cpu"))


def test_rows_know_their_positions_slots_and_logits() -> None:
    mirror, rotary = _mirror((4, tuple(range(100, 140))), (9, (7, 8, 9)))
    items = (
        _item(4, 0, 40, new_block_ids=(5, 2), logprob_start=31, logprob_stop=33),
        _item(9, 0, 3, new_block_ids=(1,)),
    )
    mirror.follow(StepPlan(step=1, items=items))
    batch = build_micro_batch(1, items, mirror, rotary)
    assert batch.index == 1
    assert batch.token_ids.tolist() == [*range(100, 140), 7, 8, 9]
    assert batch.attention.rows.positions.tolist() == [*range(40), 0, 1, 2]
    assert batch.attention.rows.slots.tolist() == [*range(160, 192), *range(64, 72), 32, 33, 34]
    assert batch.attention.rows.row_sequence.tolist() == [0] * 40 + [1] * 3
    assert batch.attention.rows.block_tables.tolist() == [[5, 2], [1, 0]]
    assert batch.attention.rows.expanded_until is None
    wanted = [(row.row, row.sequence.seq_id, row.position, row.sample) for row in batch.logits_rows]
    assert wanted == [(31, 4, 31, False), (32, 4, 32, False), (39, 4, 39, True), (42, 9, 2, True)]


def test_rows_of_prompts_are_told_from_generated_ones() -> None:
    mirror, rotary = _mirror((1, (5, 6, 7)), (2, (8, 9)))
    first = (_item(1, 0, 2, new_block_ids=(3,)), _item(2, 0, 2, new_block_ids=(4,)))
    second = (_item(1, 2, 1), _item(2, 2, 1, new_token_ids=(50,)))
    third = (_item(1, 3, 1, new_token_ids=(51,)), _item(2, 3, 1, new_token_ids=(52,)))
    found = []
    for step, items in enumerate((first, second, third), start=1):
        mirror.follow(StepPlan(step=step, items=items))
        until = build_micro_batch(0, items, mirror, rotary, expand_prompts=True).attention.rows.expanded_until
        found.append(None if until is None else until.tolist())
    assert found == [[3, 2], [3, 2], None]
