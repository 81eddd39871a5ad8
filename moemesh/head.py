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


class Head:
    """Logits, and what comes of them, for the rows of one member. It owns the memory that the logits are put into."""

    def __init__(self, model: AttentionModel) -> None:
        self._model = model
        self._most = max(1, MAX_LOGITS // model.config.vocab_size)
        self._room = kernels.Room(model.config.vocab_size, model.final_norm.device)

    def evaluate(self, x_OH: Tensor, first_row: int, rows: SequenceOf[LogitsRow]) -> RowResults:
        """Head and sampling for `rows`, all of them owned here; `x_OH` starts at row `first_row` of the micro-batch."""
        results = RowResults()
        for start in range(0, len(rows), self._most):
            self._evaluate(x_OH, first_row, rows[start : start + self._most], results)
        return results

    def _evaluate(self, x_OH: Tensor, first_row: int, rows: SequenceOf[LogitsRow], results: RowResults) -> None:
        """Add what the rows give to `results`."""
        sampled = [row for row in rows if row.sample]
        ordered = [*sampled, *(row for row in rows if not row.sample)]
        sample_rows = [SampleRow(row.sequence, row.position + 1) for row in sampled]
        logits_RV = self._room.rows(len(rows))
        places, draws = [row.row - first_row for row in ordered], draws_of(sample_rows, logits_RV.shape[1])
        tokens = self._model.sample(x_OH, places, draws, out=logits_RV)
        for row, result in zip(sampled, describe_samples(tokens, logits_RV, sample_rows), strict=True):
            results.sampled[row.sequence.seq_id] = result
        scored = [(row.row, i) for i, row in enumerate(ordered) if row.score_prompt]
        if scored:
            _score(logits_RV, ordered, [i for _, i in sorted(scored)], results)


def _score(logits_RV: Tensor, rows: SequenceOf[LogitsRow], scored: list[int], results: RowResults) -> None:
    """Add the log-probabilities of the prompt tokens that follow the rows at `scored`, in this order."""
    next_ids = [rows[i].sequence.prompt_ids[rows[i].position + 1] for i in scored]
    num_top = [rows[i].sequence.params.prompt_logprobs or 0 for i in scored]
    for i, entry in zip(scored, prompt_logprobs(logits_RV[scored], next_ids, num_top), strict=True):
        results.prompt_logprobs.setdefault(rows[i].sequence.seq_id, []).append(entry)
