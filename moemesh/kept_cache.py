"""What a group's latent cache still holds when one of its members is lost: what each survivor knows, and what of it
the sequences can go on from. Decides only.

Every member holds the whole cache. The leader begins a step only after it has finished the one before, for whose last
layer it needed the part of every member: so whatever was planned before the last step that any survivor has begun is
in the caches of all of them. That last step itself may be half done, here further than there: it is computed again,
and cache lines are written twice with the same bits. Unless a client has a token of it: then the leader had finished
it, and it is whole everywhere.

The last step counts and not what a survivor itself had begun: one that knows a later plan may have written blocks that
the others believe to be another sequence's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moemesh.sequence import Sequence
from moemesh.step_plan import PlanMirror, StepPlan


@dataclass(frozen=True, slots=True)
class KeptBlocks:
    """The blocks of a sequence in the order of its positions, and how many of its tokens they hold."""

    block_ids: tuple[int, ...]
    num_computed: int


@dataclass(frozen=True, slots=True)
class KeptSequence:
    """A sequence when the last step began: positions before `start` are in the cache, those before `stop` may be.

    `sample`: the last step was to give the token at position `stop`.
    """

    seq_id: int
    block_ids: tuple[int, ...]
    start: int
    stop: int
    sample: bool

    @classmethod
    def whole(cls, sequence: Sequence) -> KeptSequence:
        """A sequence that no step is computing."""
        done = sequence.num_computed
        return cls(sequence.seq_id, tuple(sequence.block_table), done, done, sample=False)


@dataclass(frozen=True, slots=True)
class KeptCache:
    """What one member knows of the cache: the sequences after the last step that it has begun, the `step`-th of a
    generation; -1 before the first."""

    generation: int
    step: int = -1
    sequences: tuple[KeptSequence, ...] = ()

    @classmethod
    def of(cls, generation: int, mirror: PlanMirror, last: StepPlan) -> KeptCache:
        """What a mirror says that has followed `last`."""
        items = {item.seq_id: item for item in last.items}
        kept = []
        for seq_id, sequence in mirror.sequences.items():
            item, stop = items.get(seq_id), sequence.num_computed
            start, sample = (stop, False) if item is None else (item.start, item.sample)
            kept.append(KeptSequence(seq_id, tuple(sequence.block_table), start, stop, sample))
        return cls(generation, last.step, tuple(kept))

    def blocks(self, num_tokens: Mapping[int, int]) -> dict[int, KeptBlocks]:
        """What is certainly in the cache of each sequence that is still wanted and now has so many tokens."""
        wanted = [kept for kept in self.sequences if kept.seq_id in num_tokens]
        whole = any(kept.sample and num_tokens[kept.seq_id] > kept.stop for kept in wanted)
        return {kept.seq_id: KeptBlocks(kept.block_ids, kept.stop if whole else kept.start) for kept in wanted}

    def to_wire(self) -> list[Any]:
        """Lists of ints for msgpack."""
        sequences = [[k.seq_id, k.start, k.stop, int(k.sample), *k.block_ids] for k in self.sequences]
        return [self.generation, self.step, sequences]

    @classmethod
    def from_wire(cls, wire: Any) -> KeptCache:
        """The inverse of to_wire; ValueError for anything else."""
        if not isinstance(wire, list) or len(wire) != 3 or not isinstance(wire[2], list):
            raise ValueError("what is kept of a cache has 3 fields: generation, step, sequences")
        generation, step, sequences = wire
        numbers = [generation, step, *(value for entry in sequences for value in entry)]
        if set(map(type, numbers)) - {int} or any(len(entry) < 4 for entry in sequences):
            raise ValueError("what is kept of a cache is told in lists of at least 4 integers, one for each sequence")
        kept = (KeptSequence(i, tuple(blocks), start, stop, bool(s)) for i, start, stop, s, *blocks in sequences)
        return cls(generation, step, tuple(kept))


def latest(kept: Iterable[KeptCache]) -> KeptCache:
    """What to believe among what several members know: it has begun the last step."""
    return max(kept, key=lambda cache: (cache.generation, cache.step))
