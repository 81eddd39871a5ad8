"""The plan of one step: which tokens of which sequences are computed, and all that a TP peer needs in order to follow.

The leader of an attention group makes the plans; every member, the leader included, keeps a PlanMirror in step with
them, so that all of them build the same batch from the same record. A plan carries only what is new since the
previous one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moemesh.sampling_params import SamplingParams
from moemesh.sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledSequence:
    """The tokens at positions start <= position < start + count of one sequence are computed in this step.

    - `new_block_ids` are appended to its block table, `new_token_ids` to its output, since the plan that had it last.
    - `sample`: the last of these positions is the sequence's last token, and the next one is sampled from its logits.
    - `logprob_start`, `logprob_stop`: the rows at these positions (within the chunk, often none) are wanted as prompt
      log-probabilities: the row at position p scores prompt token p + 1.
    """

    seq_id: int
    start: int
    count: int
    sample: bool
    new_block_ids: tuple[int, ...] = ()
    new_token_ids: tuple[int, ...] = ()
    logprob_start: int = 0
    logprob_stop: int = 0

    @property
    def stop(self) -> int:
        """The position after the last one computed."""
        return self.start + self.count

    @property
    def num_logprob_rows(self) -> int:
        """How many rows are wanted as prompt log-probabilities."""
        return self.logprob_stop - self.logprob_start


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmittedSequence:
    """A sequence that enters the mirrors with this plan (for the first time, or again after a pre-emption).

    `num_cached` of its tokens are in the cache already: the first of the blocks that its first item brings hold them.
    """

    seq_id: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    eos_ids: tuple[int, ...]
    num_cached: int

    @classmethod
    def of(cls, sequence: Sequence) -> AdmittedSequence:
        """The sequence as it stands, before anything of it is computed."""
        return cls(
            seq_id=sequence.seq_id,
            prompt_ids=sequence.prompt_ids,
            output_ids=tuple(sequence.output_ids),
            params=sequence.params,
            seed=sequence.seed,
            eos_ids=tuple(sorted(sequence.eos_ids)),
            num_cached=sequence.num_computed,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One step, the `step`-th of a scheduler. A mirror drops `released`, enters `admitted`, then extends by `items`.

    Rows of the batch are the items' positions, item after item, cut into at most `micro_batches`. A plan without items
    only releases.
    """

    step: int
    items: tuple[ScheduledSequence, ...] = ()
    admitted: tuple[AdmittedSequence, ...] = ()
    released: tuple[int, ...] = ()
    micro_batches: int = field(default=1, compare=False)  # the leader's choice, behind the scheduler's

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return sum(item.count for item in self.items)

    def to_wire(self) -> list[Any]:
        """Lists of ints, and a dict of parameters per admitted sequence, for msgpack: 7 small ints per decoding row."""
        admitted = [
            [
                a.seq_id,
                list(a.prompt_ids),
                list(a.output_ids),
                a.params.to_wire(),
                a.seed,
                list(a.eos_ids),
                a.num_cached,
            ]
            for a in self.admitted
        ]
        items: list[int] = []
        for item in self.items:
            items += _item_to_ints(item)
        return [self.step, list(self.released), admitted, items, self.micro_batches]

    @classmethod
    def from_wire(cls, wire: object) -> StepPlan:
        """The inverse of to_wire; ValueError for anything else."""
        if not isinstance(wire, list) or len(wire) != 5 or not isinstance(wire[2], list):
            raise ValueError("a step plan has 5 fields: step, released, admitted, items, micro-batches")
        step, released, admitted, items, micro_batches = wire
        if micro_batches not in (1, 2):
            raise ValueError(f"a step plan has 1 or 2 micro-batches, not {micro_batches!r}")
        return cls(
            step=_ints([step], "step")[0],
            released=_ints(released, "released"),
            admitted=tuple(_admitted_from_wire(entry) for entry in admitted),
            items=_items_from_ints(_ints(items, "items")),
            micro_batches=micro_batches,
        )


class PlanMirror:
    """The sequences of a group as its plans describe them: tokens, parameters and block tables. One per group member.

    `num_computed` of a mirrored sequence is where its latest chunk ends. The mirror owns its Sequence objects; read
    them only.
    """

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}
        self._last: StepPlan | None = None

    @property
    def last(self) -> StepPlan | None:
        """The plan followed last."""
        return self._last

    @property
    def sequences(self) -> Mapping[int, Sequence]:
        """By seq_id, those that can still be scheduled."""
        return self._sequences

    def follow(self, plan: StepPlan) -> None:
        """Bring the mirror up to `plan` before its batch is built; each plan once, in order. ValueError on a misfit."""
        for seq_id in plan.released:
            self._known(seq_id, plan)
            del self._sequences[seq_id]
        for entry in plan.admitted:
            if entry.seq_id in self._sequences:
                raise ValueError(f"step {plan.step} admits sequence {entry.seq_id}, which is here already")
            self._sequences[entry.seq_id] = Sequence(
                seq_id=entry.seq_id,
                prompt_ids=entry.prompt_ids,
                params=entry.params,
                seed=entry.seed,
                eos_ids=frozenset(entry.eos_ids),
                output_ids=list(entry.output_ids),
                num_computed=entry.num_cached,
            )
        for item in plan.items:
            self._extend(item, self._known(item.seq_id, plan), plan)
        self._last = plan

    def _known(self, seq_id: int, plan: StepPlan) -> Sequence:
        if seq_id not in self._sequences:
            raise ValueError(f"step {plan.step} names sequence {seq_id}, which is not here: a plan was missed")
        return self._sequences[seq_id]

    def _extend(self, item: ScheduledSequence, sequence: Sequence, plan: StepPlan) -> None:
        sequence.output_ids += item.new_token_ids
        sequence.block_table += item.new_block_ids
        if item.start != sequence.num_computed or item.stop > sequence.num_tokens:
            raise ValueError(
                f"step {plan.step} computes positions {item.start} to {item.stop} of sequence {item.seq_id}, "
                f"which has {sequence.num_tokens} tokens and {sequence.num_computed} computed: a plan was missed"
            )
        sequence.num_computed = item.stop


_HAS_LOGPROBS = 2  # bit 0 is `sample`


def _item_to_ints(item: ScheduledSequence) -> list[int]:
    """seq_id, start, count, flags, number of blocks, blocks, number of tokens, tokens[, logprob start and stop]."""
    has_logprobs = item.num_logprob_rows > 0
    flags = item.sample + has_logprobs * _HAS_LOGPROBS
    ints = [item.seq_id, item.start, item.count, flags, len(item.new_block_ids), *item.new_block_ids]
    ints += [len(item.new_token_ids), *item.new_token_ids]
    return [*ints, item.logprob_start, item.logprob_stop] if has_logprobs else ints


def _items_from_ints(ints: tuple[int, ...]) -> tuple[ScheduledSequence, ...]:
    items: list[ScheduledSequence] = []
    at = 0

    def take(count: int) -> tuple[int, ...]:
        nonlocal at
        if not 0 <= count <= len(ints) - at:
            raise ValueError(f"a step plan's items want {count} more numbers, {len(ints) - at} are left")
        at += count
        return ints[at - count : at]

    while at < len(ints):
        seq_id, start, count, flags, num_blocks = take(5)
        blocks = take(num_blocks)
        tokens = take(take(1)[0])
        logprob_start, logprob_stop = take(2) if flags & _HAS_LOGPROBS else (0, 0)
        if flags & ~(1 | _HAS_LOGPROBS) or count < 1 or start < 0:
            raise ValueError(f"a step plan's item has start={start}, count={count}, flags={flags}")
        items.append(
            ScheduledSequence(
                seq_id=seq_id,
                start=start,
                count=count,
                sample=bool(flags & 1),
                new_block_ids=blocks,
                new_token_ids=tokens,
                logprob_start=logprob_start,
                logprob_stop=logprob_stop,
            )
        )
    return tuple(items)


def _admitted_from_wire(wire: object) -> AdmittedSequence:
    if not isinstance(wire, list) or len(wire) != 7 or not isinstance(wire[3], dict):
        raise ValueError("an admitted sequence has 7 fields: id, prompt, output, parameters, seed, eos ids, cached")
    seq_id, prompt_ids, output_ids, params, seed, eos_ids, num_cached = wire
    return AdmittedSequence(
        seq_id=_ints([seq_id], "seq_id")[0],
        prompt_ids=_ints(prompt_ids, "prompt"),
        output_ids=_ints(output_ids, "output"),
        params=SamplingParams.from_wire(params),
        seed=_ints([seed], "seed")[0],
        eos_ids=_ints(eos_ids, "eos ids"),
        num_cached=_ints([num_cached], "num_cached")[0],
    )


def _ints(values: object, name: str) -> tuple[int, ...]:
    # `type` and not isinstance: True is an int, and not a block. The set keeps a long prompt out of a Python loop.
    if not isinstance(values, list) or set(map(type, values)) - {int}:
        raise ValueError(f"{name} of a step plan must be a list of integers")
    return tuple(values)
