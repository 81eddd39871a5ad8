"""From a step plan to tensors: the rows of one micro-batch.

Shape legend: T rows of the micro-batch, B its sequences.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attention.latent_cache import BLOCK_SIZE
from attention.rope import RotaryTable
from kernels import AttentionBatch
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
    """One forward pass: token ids int64 [T], where the rows stand, and which of them want logits (by ascending row)."""

    index: int
    token_ids: Tensor
    attention: AttentionBatch
    logits_rows: tuple[LogitsRow, ...]


def split_plan(plan: StepPlan, num_parts: int) -> list[tuple[ScheduledSequence, ...]]:
    """Cut a plan's items into at most `num_parts` micro-batches of about the same number of rows, sequences whole."""
    if num_parts == 1 or len(plan.items) < 2:
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
    tokens: list[int] = []
    for item, sequence in zip(items, sequences, strict=True):
        tokens += sequence.token_ids(item.start, item.stop)
    counts = np.fromiter((item.count for item in items), dtype=np.int64, count=len(items))
    starts = np.fromiter((item.start for item in items), dtype=np.int64, count=len(items))
    row_sequence = np.repeat(np.arange(len(items)), counts)
    first_row = np.cumsum(counts) - counts
    positions = starts[row_sequence] + np.arange(len(tokens)) - first_row[row_sequence]
    tables = np.zeros((len(items), max(len(s.block_table) for s in sequences)), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        tables[row, : len(sequence.block_table)] = sequence.block_table
    slots = tables[row_sequence, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    device = rotary.device
    cos, sin = rotary.at(torch.from_numpy(positions).to(device))
    attention = AttentionBatch(
        positions=torch.from_numpy(positions.astype(np.int32)).to(device),
        cos=cos,
        sin=sin,
        slots=torch.from_numpy(slots).to(device),
        row_sequence=torch.from_numpy(row_sequence.astype(np.int32)).to(device),
        block_tables=torch.from_numpy(tables.astype(np.int32)).to(device),
        expanded_until=_prompt_lengths(items, sequences, device) if expand_prompts else None,
    )
    return MicroBatch(
        index=index,
        token_ids=torch.tensor(tokens, dtype=torch.int64, device=device),
        attention=attention,
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
