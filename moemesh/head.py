"""From hidden states to tokens: the head, sampling and prompt log-probabilities of the rows one member owns.

Whole rows of logits exist only at the member that owns the token, so that no sum over the vocabulary is ever split.

Shape legend: O rows this member owns, H hidden, R rows of them that want logits, V vocabulary.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import msgpack
import torch
from torch import Tensor

import kernels
from moemesh.batch import LogitsRow
from moemesh.model import AttentionModel
from moemesh.sampling import SampleRow, describe_samples, draws_of, prompt_logprobs
from moemesh.sequence import Sampled, SamplingError

MAX_LOGITS = 1 << 24
"""Logits held at a time (64 MiB): scoring a long prompt walks through its rows in pieces."""


@dataclass(kw_only=True)
class RowResults:
    """What rows with logits gave: one token per sampled sequence, and scores of prompt tokens in ascending position."""

    sampled: dict[int, Sampled | SamplingError] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[Sampled | SamplingError]] = field(default_factory=dict)

    def add(self, other: "RowResults") -> None:
        """Append the results of later rows."""
        self.sampled |= other.sampled
        for seq_id, entries in other.prompt_logprobs.items():
            self.prompt_logprobs.setdefault(seq_id, []).extend(entries)

    def to_tensor(self) -> Tensor:
        """Msgpack bytes in a uint8 tensor, as they travel to the group's leader."""
        wire = [
            [[seq_id, _entry_to_wire(entry)] for seq_id, entry in self.sampled.items()],
            [[seq_id, [_entry_to_wire(e) for e in entries]] for seq_id, entries in self.prompt_logprobs.items()],
        ]
        return torch.frombuffer(bytearray(msgpack.packb(wire)), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, data: Tensor) -> "RowResults":
        """The inverse of to_tensor. Raises ValueError for anything else."""
        sampled, scored = msgpack.unpackb(data.numpy().tobytes())
        return cls(
            sampled={seq_id: _entry_from_wire(entry) for seq_id, entry in sampled},
            prompt_logprobs={seq_id: [_entry_from_wire(e) for e in entries] for seq_id, entries in scored},
        )


def _entry_to_wire(entry: Sampled | SamplingError) -> Any:
    return entry.reason if isinstance(entry, SamplingError) else entry.to_wire()


def _entry_from_wire(wire: Any) -> Sampled | SamplingError:
    return SamplingError(reason=wire) if isinstance(wire, str) else Sampled.from_wire(wire)


@dataclass(kw_only=True)
class HeadCall:
    """Rows that want logits, those that are sampled first, and what makes both of the hidden states."""

    rows: list[LogitsRow]
    samples: list[SampleRow]
    logits_RV: Tensor
    sampler: kernels.RowSampler


class Head:
    """Logits, and what comes of them, for the rows of one member. It owns the memory that the logits are put into."""

    def __init__(self, model: AttentionModel) -> None:
        self._model = model
        self._most = max(1, MAX_LOGITS // model.config.vocab_size)
        self._room = kernels.Room(model.config.vocab_size, model.final_norm.device)

    def prepare(self, owned: tuple[int, int], rows: SequenceOf[LogitsRow]) -> list[HeadCall]:
        """Head and sampling for `rows` before there are hidden states, which will be those of the micro-batch's rows
        from owned[0] up to owned[1]."""
        # Before the layers and not after: they push everything out of the processor's caches, and Python with it.
        return [self._prepare(owned, rows[i : i + self._most]) for i in range(0, len(rows), self._most)]

    def _prepare(self, owned: tuple[int, int], rows: SequenceOf[LogitsRow]) -> HeadCall:
        ordered = [row for row in rows if row.sample]
        samples = [SampleRow(row.sequence, row.position + 1) for row in ordered]
        if len(ordered) < len(rows):
            ordered += [row for row in rows if not row.sample]
        logits_RV = self._room.rows(len(rows))
        draws = draws_of(samples, self._model.config.vocab_size)
        start, stop = owned
        places = [row.row - start for row in ordered]
        sampler = self._model.sampler(places, draws, num_rows=stop - start, out=logits_RV)
        return HeadCall(rows=ordered, samples=samples, logits_RV=logits_RV, sampler=sampler)

    def evaluate(self, x_OH: Tensor, calls: SequenceOf[HeadCall]) -> RowResults:
        """What the rows of `calls` give."""
        results = RowResults()
        for call in calls:
            tokens = call.sampler.run(x_OH)
            for row, result in zip(call.samples, describe_samples(tokens, call.logits_RV, call.samples), strict=True):
                results.sampled[row.sequence.seq_id] = result
            scored = [(row.row, i) for i, row in enumerate(call.rows) if row.score_prompt]
            if scored:
                _score(call.logits_RV, call.rows, [i for _, i in sorted(scored)], results)
        return results


def _score(logits_RV: Tensor, rows: SequenceOf[LogitsRow], scored: list[int], results: RowResults) -> None:
    """Add the log-probabilities of the prompt tokens that follow the rows at `scored`, in this order."""
    next_ids = [rows[i].sequence.prompt_ids[rows[i].position + 1] for i in scored]
    num_top = [rows[i].sequence.params.prompt_logprobs or 0 for i in scored]
    for i, entry in zip(scored, prompt_logprobs(logits_RV[scored], next_ids, num_top), strict=True):
        results.prompt_logprobs.setdefault(rows[i].sequence.seq_id, []).append(entry)
