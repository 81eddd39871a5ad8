"""An attention group with a fake model, for tests of the scheduler: it computes on tokens that it reads from the very
blocks it was given, so that a block shared, reused too early or never written gives a wrong token.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import msgpack

from attention.block_pool import BlockPool
from moemesh.sampling_params import SamplingParams
from moemesh.scheduler import Scheduler
from moemesh.scheduler_records import SchedulerLimits
from moemesh.sequence import Sampled, Sequence, SequenceOutput
from moemesh.step_plan import PlanMirror, ScheduledSequence, StepPlan

BLOCK_SIZE = 4
VOCAB = 50


def next_token(tokens: list[int]) -> int:
    return zlib.crc32(repr(tokens).encode()) % VOCAB


def row_logprob(tokens: list[int], token_id: int) -> Sampled:
    return Sampled(token_id=token_id, logprob=-float(next_token(tokens)), rank=1)


def limits(tokens: int = 16, seqs: int = 8, length: int = 64) -> SchedulerLimits:
    return SchedulerLimits(max_num_batched_tokens=tokens, max_num_seqs=seqs, max_model_len=length)


def sequence(
    seq_id: int,
    num_prompt: int = 5,
    *,
    output: list[int] | None = None,
    family: int | None = None,
    salt: str = "",
    **params: Any,
) -> Sequence:
    """Sequences of one `family` have the longest common beginning that their lengths allow."""
    first = (seq_id if family is None else family) * 7
    prompt = tuple((first + i) % VOCAB for i in range(num_prompt))
    given_params = SamplingParams(**{"max_tokens": 6, **params})
    return Sequence(
        seq_id=seq_id,
        prompt_ids=prompt,
        params=given_params,
        seed=seq_id,
        eos_ids=frozenset({1}),
        output_ids=output or [],
        cache_salt=salt,
    )


def alone(seq: Sequence, max_model_len: int) -> tuple[list[int], str]:
    """Slow twin: the tokens a sequence gets with nobody else around, and why it ends."""
    params, tokens, output = seq.params, list(seq.prompt_ids) + list(seq.output_ids), list(seq.output_ids)
    most = max_model_len - len(seq.prompt_ids)
    most = most if params.max_tokens is None else min(most, params.max_tokens)
    while len(output) < most:
        token = next_token(tokens)
        output.append(token)
        tokens.append(token)
        stops = token in params.stop_token_ids or (token in seq.eos_ids and not params.ignore_eos)
        if stops and len(output) >= params.min_tokens:
            return output, "stop"
    return output, "length"


class WatchedPool(BlockPool):
    """Remembers which blocks are sealed, by itself: published and not handed out anew since."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks, BLOCK_SIZE)
        self.sealed: set[int] = set()

    def allocate(self, count: int) -> list[int]:
        blocks = super().allocate(count)
        self.sealed.difference_update(blocks)
        return blocks

    def publish(self, block: int, name: bytes) -> None:
        super().publish(block, name)
        self.sealed.add(block)


@dataclass
class Flight:
    """A plan under way, with the block tables as they were when it left."""

    plan: StepPlan
    tables: dict[int, list[int]]
    tokens: dict[int, list[int]]

    def written(self) -> set[int]:
        """The blocks that this step writes."""
        return {
            self.tables[item.seq_id][position // BLOCK_SIZE]
            for item in self.plan.items
            for position in range(item.start, item.stop)
        }


@dataclass
class Group:
    """A scheduler, a mirror that knows only what came over the wire, and a cache of tokens in blocks."""

    scheduler: Scheduler
    pool: WatchedPool
    mirror: PlanMirror = field(default_factory=PlanMirror)
    cache: dict[tuple[int, int], int] = field(default_factory=dict)
    flights: list[Flight] = field(default_factory=list)
    outputs: dict[int, list[SequenceOutput]] = field(default_factory=dict)
    num_rows: int = 0

    @classmethod
    def of(cls, num_blocks: int, bounds: SchedulerLimits, *, caching: bool = True, by_role: bool = False) -> Group:
        pool = WatchedPool(num_blocks)
        return cls(Scheduler(pool, bounds, prefix_key="form" if caching else None, prefix_by_role=by_role), pool)

    def receive(self, plan: StepPlan) -> StepPlan:
        received = StepPlan.from_wire(msgpack.unpackb(msgpack.packb(plan.to_wire())))
        assert received == plan
        self.mirror.follow(received)
        return received

    def start(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        received = self.receive(plan)
        held = {item.seq_id: self.mirror.sequences[item.seq_id] for item in received.items}
        tables = {seq_id: list(seq.block_table) for seq_id, seq in held.items()}
        tokens = {item.seq_id: held[item.seq_id].token_ids(item.start, item.stop) for item in received.items}
        self.flights.append(Flight(plan, tables, tokens))
        return plan

    def finish(self, index: int = 0) -> list[SequenceOutput]:
        flight = self.flights.pop(index)
        sampled: dict[int, Sampled] = {}
        rows: dict[int, list[Sampled]] = {}
        for item in flight.plan.items:
            self.write(item, flight)
        for item in flight.plan.items:
            if item.sample:
                sampled[item.seq_id] = Sampled(token_id=next_token(self.read(item.stop, flight.tables[item.seq_id])))
            rows[item.seq_id] = [
                self.score(position, item, flight) for position in range(item.logprob_start, item.logprob_stop)
            ]
        outputs = self.scheduler.apply(flight.plan, sampled, rows)
        for output in outputs:
            self.outputs.setdefault(output.seq_id, []).append(output)
        return outputs

    def write(self, item: ScheduledSequence, flight: Flight) -> None:
        self.num_rows += item.count
        for position, token in enumerate(flight.tokens[item.seq_id], start=item.start):
            block = flight.tables[item.seq_id][position // BLOCK_SIZE]
            assert block not in self.pool.sealed, f"block {block} is full and was written"
            self.cache[block, position % BLOCK_SIZE] = token

    def read(self, num_tokens: int, table: list[int]) -> list[int]:
        return [self.cache[table[p // BLOCK_SIZE], p % BLOCK_SIZE] for p in range(num_tokens)]

    def score(self, position: int, item: ScheduledSequence, flight: Flight) -> Sampled:
        prompt = self.mirror.sequences[item.seq_id].prompt_ids if item.seq_id in self.mirror.sequences else ()
        following = prompt[position + 1] if prompt else 0
        return row_logprob(self.read(position + 1, flight.tables[item.seq_id]), following)

    def run(self, most_steps: int = 3000) -> None:
        """To the end; with nothing in flight there must always be a next step while there is work."""
        for _ in range(most_steps):
            while self.flights:
                self.finish()
            if not self.scheduler.has_work:
                break
            assert self.start() is not None
        assert not self.scheduler.has_work
        self.check_empty()

    def check_empty(self) -> None:
        plan = self.scheduler.release_plan()
        if plan is not None:
            self.receive(plan)
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
        assert not self.mirror.sequences
        assert self.pool.num_free == self.pool.num_blocks

    def tokens(self, seq_id: int) -> list[int]:
        return [output.sampled.token_id for output in self.outputs.get(seq_id, []) if output.sampled is not None]
