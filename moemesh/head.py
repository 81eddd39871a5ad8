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

from moemesh.batch import LogitsRow
from moemesh.model import AttentionModel
from moemesh.sampling import SampleRow, prompt_logprobs, sample
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


class Head:
    """Logits, and what comes of them, for the rows of one member. It owns the memory that the logits are put into."""

    def __init__(self, model: AttentionModel) -> None:
        self._model = model
        self._most = max(1, MAX_LOGITS // model.config.vocab_size)
        self._room = model.final_norm.new_empty((1, model.config.vocab_size))
        self._views: dict[int, Tensor] = {}

    def evaluate(self, x_OH: Tensor, first_row: int, rows: SequenceOf[LogitsRow]) -> RowResults:
        """Head and sampling for `rows`, all of them owned here; `x_OH` starts at row `first_row` of the micro-batch."""
        results = RowResults()
        for start in range(0, len(rows), self._most):
            piece = rows[start : start + self._most]
            places = [row.row - first_row for row in piece]
            logits_RV = self._model.logits(x_OH, places, out=self._room_for(len(piece)))
            results.add(_evaluate(logits_RV, piece))
        return results

    def _room_for(self, num_rows: int) -> Tensor:
        """Fresh memory for each step would be given back to the system, and its pages asked for again."""
        if num_rows > self._room.shape[0]:
            self._room = self._room.new_empty((num_rows, self._room.shape[1]))
            self._views.clear()
        if num_rows not in self._views:
            self._views[num_rows] = self._room[:num_rows]
        return self._views[num_rows]


def _evaluate(logits_RV: Tensor, rows: SequenceOf[LogitsRow]) -> RowResults:
    results = RowResults()
    sampled = [i for i, row in enumerate(rows) if row.sample]
    if sampled:
        sample_rows = [SampleRow(rows[i].sequence, rows[i].position + 1) for i in sampled]
        tokens = sample(logits_RV if len(sampled) == len(rows) else logits_RV[sampled], sample_rows)
        results.sampled = {rows[i].sequence.seq_id: token for i, token in zip(sampled, tokens, strict=True)}
    scored = [i for i, row in enumerate(rows) if row.score_prompt]
    if scored:
        next_ids = [rows[i].sequence.prompt_ids[rows[i].position + 1] for i in scored]
        num_top = [rows[i].sequence.params.prompt_logprobs or 0 for i in scored]
        for i, entry in zip(scored, prompt_logprobs(logits_RV[scored], next_ids, num_top), strict=True):
            results.prompt_logprobs.setdefault(rows[i].sequence.seq_id, []).append(entry)
    return results
