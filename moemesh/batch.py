"""From a step plan to tensors: the rows of one micro-batch.

Shape legend: T rows of the micro-batch, B its sequences.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.rope import RotaryTable
from kernels import AttentionBatch, lay_out
from moemesh.sequence import Sequence
from moemesh.step_plan import PlanMirror, ScheduledSequence, StepPlan


@dataclass(frozen=True, kw_only=True)
class LogitsRow:
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
    sequences = [mirror.sequences[item.seq_id] for item in items]
    tokens = array("i")
    for item, sequence in zip(items, sequences, strict=True):
        tokens.extend(sequence.token_ids(item.start, item.stop))
    ranges = [(item.start, item.count) for item in items]
    return MicroBatch(
        index=index,
        token_ids=tokens,
        attention=lay_out(
            ranges,
            _block_tables(sequences).to(rotary.device),
            rotary.angles,
            expanded_until=_prompt_lengths(items, sequences, rotary.device) if expand_prompts else None,
        ),
        logits_rows=tuple(_logits_rows(items, sequences)),
    )


def _prompt_lengths(
    items: SequenceOf[ScheduledSequence], sequences: SequenceOf[Sequence], device: torch.device
) -> Tensor | None:
    """Int32 [B]; None where no row is one of a prompt."""
    lengths = [len(sequence.prompt_ids) for sequence in sequences]
    if all(item.start >= length for item, length in zip(items, lengths, strict=True)):
        return None
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def _block_tables(sequences: SequenceOf[Sequence]) -> Tensor:
    """Int32 [B, blocks], as wide as the longest; what the others lack is 0."""
    width = max(len(sequence.block_table) for sequence in sequences)
    blocks = array("i")
    for sequence in sequences:
        blocks.extend(sequence.block_table)
        blocks.extend([0] * (width - len(sequence.block_table)))
    return torch.frombuffer(blocks, dtype=torch.int32).view(len(sequences), width)


def _logits_rows(items: SequenceOf[ScheduledSequence], sequences: SequenceOf[Sequence]) -> list[LogitsRow]:
    rows: list[LogitsRow] = []
    first_row = 0
    for item, sequence in zip(items, sequences, strict=True):
        scored = range(item.logprob_start, item.logprob_stop)
        last = item.stop - 1
        wanted = sorted({*scored, last}) if item.sample else scored
        rows += [
            LogitsRow(
                row=first_row + position - item.start,
                sequence=sequence,
                position=position,
                sample=item.sample and position == last,
                score_prompt=position in scored,
            )
            for position in wanted
        ]
        first_row += item.count
    return rows
