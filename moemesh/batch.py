"""From a step plan to tensors: the rows of one micro-batch.

Shape legend: T rows of the micro-batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

from attention.rope import RotaryTable
from kernels import AttentionBatch, Span, lay_out
from moemesh.sequence import Sequence
from moemesh.step_plan import PlanMirror, ScheduledSequence, StepPlan


class LogitsRow(NamedTuple):
    """A row of the micro-batch whose logits are wanted: to sample the next token, or to score a prompt token.

    `position` is the row's place in the sequence.
    """

    row: int
    sequence: Sequence
    position: int
    sample: bool
    score_prompt: bool


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward pass: token ids int32 [T], where the rows stand, and which of them want logits (by ascending row)."""

    index: int
    token_ids: array[int]
    attention: AttentionBatch
    logits_rows: tuple[LogitsRow, ...]


def split_plan(plan: StepPlan) -> list[tuple[ScheduledSequence, ...]]:
    """Cut a plan's items into its micro-batches, sequences whole: two are of about the same number of rows."""
    if plan.micro_batches == 1 or len(plan.items) < 2:
        return [plan.items]
    half, rows = plan.num_tokens / 2, 0
    for cut, item in enumerate(plan.items):
        rows += item.count
        if rows >= half:
            cut = min(cut + 1, len(plan.items) - 1)
            return [plan.items[:cut], plan.items[cut:]]
    return [plan.items]


def build_micro_batch(
    index: int,
    items: SequenceOf[ScheduledSequence],
    mirror: PlanMirror,
    rotary: RotaryTable,
    *,
    expand_prompts: bool = False,
) -> MicroBatch:
    """Lay the items' positions out as rows, item after item; with `expand_prompts` those of prompts take that form."""
    tokens = array("i")
    spans: list[Span] = []
    logits_rows: list[LogitsRow] = []
    for item in items:
        sequence = mirror.sequences[item.seq_id]
        logits_rows += _logits_rows(item, sequence, len(tokens))
        tokens.extend(sequence.token_ids(item.start, item.stop))
        until = len(sequence.prompt_ids) if expand_prompts else 0
        spans.append(Span(item.start, item.count, sequence.block_table, until))
    return MicroBatch(
        index=index, token_ids=tokens, attention=lay_out(spans, rotary.angles), logits_rows=tuple(logits_rows)
    )


def _logits_rows(item: ScheduledSequence, sequence: Sequence, first_row: int) -> list[LogitsRow]:
    first, last = first_row - item.start, item.stop - 1
    rows = [
        LogitsRow(first + position, sequence, position, item.sample and position == last, True)
        for position in range(item.logprob_start, item.logprob_stop)
    ]
    if item.sample and not (rows and rows[-1].sample):
        rows.append(LogitsRow(first + last, sequence, last, True, False))
    return rows
