"""The scheduler of an attention group: which tokens are computed in the next step, in which cache blocks. Decides only.

It hands out tokens by counters (`num_computed` < `num_tokens`), so that chunked prefill, decode, recomputation after a
pre-emption and the restart of a request are one case. The life of a sequence here:

            admit, resume        schedule
    waiting --------> running ------------> in flight --cancel--> cancelled
       ^                |  ^                    |                     |
       +----------------+  +-------apply--------+--> finished <-apply-+
            pre-empt

A sequence in flight keeps its blocks whatever happens to it: they must not be given away while its step writes them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

from attention.block_pool import BlockPool
from moemesh.cached_prefix import CachedPrefix
from moemesh.kept_cache import KeptBlocks
from moemesh.scheduler_entry import Draft, Entry, State, priority_of
from moemesh.scheduler_records import SchedulerLimits, SchedulerStats
from moemesh.sequence import Sampled, SamplingError, Sequence, SequenceOutput, validate
from moemesh.step_plan import AdmittedSequence, ScheduledSequence, StepPlan

SampledById = Mapping[int, Sampled | SamplingError]
RowLogprobsById = Mapping[int, SequenceOf[Sampled | SamplingError]]


class Scheduler:
    """Owns the sequences of one attention group and, through `block_pool`, their cache blocks.

    Older sequences go first, everywhere: in a step's budget, for blocks, and on admission; a restarted sequence (one
    that comes with output) counts as older than any that did not, because a client is watching it. Whenever nothing
    is in flight and `has_work`, `schedule` gives a plan: the oldest sequence always advances. Several plans may be in
    flight at a time; they have no sequence in common.

    Sequences share the cache blocks of equal beginnings where `prefix_key` is not None: it names what latents depend
    on beside the tokens; with `prefix_by_role` also which of them are prompt. A sequence whose prompt is scored
    computes all of it, for the cache holds no logits.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        limits: SchedulerLimits,
        *,
        prefix_key: str | None = None,
        prefix_by_role: bool = False,
    ) -> None:
        self._pool = block_pool
        self._limits = limits
        self._prefix_key = prefix_key
        self._prefix_by_role = prefix_by_role
        self._entries: dict[int, Entry] = {}
        # Both sorted by priority. `_running` also has those in flight, but not the cancelled.
        self._waiting: list[Entry] = []
        self._running: list[Entry] = []
        self._plans: dict[int, StepPlan] = {}
        self._released: list[int] = []
        self._num_added = 0
        self._num_plans = 0
        self._num_preemptions = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._num_not_finite = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is known, be it only a cancelled one whose step is still in flight."""
        return bool(self._entries)

    @property
    def num_in_flight(self) -> int:
        """Plans given out and not applied."""
        return len(self._plans)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=self._pool.num_blocks,
            num_blocks_used=self._pool.num_used,
            num_preemptions=self._num_preemptions,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
            num_not_finite=self._num_not_finite,
        )

    def add(self, sequence: Sequence) -> None:
        """Take over a sequence with nothing computed. ValueError, and nothing changed, if it can never be served."""
        if sequence.num_computed or sequence.block_table:
            raise AssertionError(f"sequence {sequence.seq_id} was added with tokens computed or blocks of its own")
        if sequence.seq_id in self._entries:
            raise ValueError(f"sequence {sequence.seq_id} is known already: {self._entries[sequence.seq_id]}")
        validate(sequence, self._limits.max_model_len)
        entry = Entry(
            sequence=sequence,
            prefix=CachedPrefix(sequence, self._pool, self._prefix_key, by_role=self._prefix_by_role),
            priority=(not sequence.output_ids, self._num_added),
            max_blocks=self._max_blocks(sequence),
            wants_prompt_logprobs=sequence.params.prompt_logprobs is not None and not sequence.output_ids,
        )
        self._num_added += 1
        self._entries[sequence.seq_id] = entry
        insort(self._waiting, entry, key=priority_of)

    def lengths(self) -> dict[int, int]:
        """The tokens of each sequence, by id."""
        return {seq_id: entry.sequence.num_tokens for seq_id, entry in self._entries.items()}

    def resume(self, kept: Mapping[int, KeptBlocks]) -> list[Sequence]:
        """Let sequences just added go on from what the cache has of them; before anything is scheduled.

        Gives those that do; the others begin anew. Of no sequence more is kept than all but its last token,
        because its logits are needed, and nothing of one whose prompt is scored: the scores so far are lost.
        """
        resumed = []
        for entry in self._waiting:
            sequence, blocks = entry.sequence, kept.get(entry.sequence.seq_id)
            num_computed = 0 if blocks is None else min(blocks.num_computed, sequence.num_tokens - 1)
            if blocks is not None and num_computed and not entry.wants_prompt_logprobs:
                sequence.num_computed = num_computed
                sequence.block_table += blocks.block_ids[: self._pool.blocks_for(sequence.num_tokens)]
                resumed.append(entry)
        self._pool.claim([block for entry in resumed for block in entry.sequence.block_table])
        for entry in resumed:
            entry.prefix.resume()
            entry.num_cached = 0
            entry.state = State.RUNNING
            self._waiting.remove(entry)
            insort(self._running, entry, key=priority_of)
        return [entry.sequence for entry in resumed]

    def cancel(self, seq_id: int) -> bool:
        """Forget a sequence; it gives no further output. False if it is not known (it may just have finished).

        Its blocks are free at once, or, if its step is in flight, when that is applied.
        """
        entry = self._entries.get(seq_id)
        if entry is None or entry.state is State.CANCELLED:
            return False
        if entry.state is State.IN_FLIGHT:
            self._running.remove(entry)
            entry.state = State.CANCELLED
        else:
            self._forget(entry)
        return True

    def schedule(self) -> StepPlan | None:
        """The next step, now in flight: decoding rows first, then prompts in chunks. None if there is nothing to do."""
        draft = Draft(self._limits.max_num_batched_tokens)
        self._plan_decodes(draft)
        self._plan_prefills(draft)
        self._admit(draft)
        if not draft.items:
            return None
        plan = self._new_plan(tuple(draft.items), tuple(draft.admitted))
        self._plans[plan.step] = plan
        return plan

    def release_plan(self) -> StepPlan | None:
        """A plan that only releases, if sequences ended since the last one: sent when falling idle, or peers keep them.

        It is not in flight: there is nothing to apply.
        """
        return self._new_plan((), ()) if self._released else None

    def apply(
        self, plan: StepPlan, sampled: SampledById, prompt_logprobs: RowLogprobsById | None = None
    ) -> list[SequenceOutput]:
        """Enter the results of a plan in flight. Gives the sequences that got a token or ended, in the plan's order.

        `sampled` has an entry for each item with `sample`, `prompt_logprobs` one of `num_logprob_rows` entries for
        each item that wants them. A SamplingError in either ends its sequence with that error. Those of cancelled
        sequences may be there or not.
        """
        if self._plans.get(plan.step) != plan:
            raise AssertionError(f"step {plan.step} was applied, the steps in flight are {sorted(self._plans)}")
        rows = prompt_logprobs or {}
        for item in plan.items:
            self._check_results(item, sampled, rows)
        del self._plans[plan.step]
        outputs = [self._apply_item(item, sampled, rows) for item in plan.items]
        return [output for output in outputs if output is not None]

    def _max_blocks(self, sequence: Sequence) -> int:
        """The most blocks the sequence can come to hold: its last token is given out, never computed."""
        longest = sequence.max_num_tokens(self._limits.max_model_len)
        needed = self._pool.blocks_for(max(len(sequence.prompt_ids), longest - 1))
        if needed > self._pool.num_blocks:
            raise ValueError(
                f"sequence {sequence.seq_id} may grow to {longest} tokens ({len(sequence.prompt_ids)} of them prompt) "
                f"and needs {needed} cache blocks of {self._pool.block_size} tokens, the cache has "
                f"{self._pool.num_blocks}: lower max_tokens, shorten the prompt or give the cache more memory"
            )
        return needed

    def _plan_decodes(self, draft: Draft) -> None:
        for entry in list(self._running):
            if draft.budget == 0:
                return
            # A sequence further up may have pre-empted this one.
            if entry.state is State.RUNNING and entry.sequence.num_uncomputed == 1 and self._grow(entry):
                self._plan_chunk(draft, entry)

    def _plan_prefills(self, draft: Draft) -> None:
        for entry in self._running:
            if draft.budget == 0:
                return
            # All blocks of a prompt were given at admission. One token missing: a decode that could not grow.
            if entry.state is State.RUNNING and entry.sequence.num_uncomputed > 1:
                self._plan_chunk(draft, entry)

    def _admit(self, draft: Draft) -> None:
        """Admit the oldest waiting sequences. None overtakes one that does not fit, or the long would never get in.

        One whose next block is just being computed for another waits for it, and for nothing else, in its place.
        """
        num_deferred = 0
        for entry in self._waiting[: self._limits.max_num_seqs]:
            if not draft.budget or len(self._running) + num_deferred >= self._limits.max_num_seqs:
                return
            cached = entry.prefix.find() if entry.looks_up else []
            if entry.looks_up and any(entry.prefix.continues_in(r.prefix, len(cached)) for r in self._running):
                num_deferred += 1
                continue
            if not self._give_blocks(entry, cached):
                return
            self._waiting.remove(entry)
            insort(self._running, entry, key=priority_of)
            entry.state = State.RUNNING
            self._plan_chunk(draft, entry)

    def _give_blocks(self, entry: Entry, cached: list[int]) -> bool:
        """Blocks for all tokens of a waiting sequence, the `cached` ones first; False if it must wait for them."""
        sequence = entry.sequence
        # Enough for all its tokens now, and one block to grow into for each that runs: otherwise it would soon be
        # pre-empted, the work thrown away, and admitted again.
        missing = self._pool.blocks_for(sequence.num_tokens) - len(cached)
        num_growing = sum(len(other.sequence.block_table) < other.max_blocks for other in self._running)
        if missing + self._pool.num_idle(cached) + num_growing > self._pool.num_free:
            return False
        entry.prefix.take(cached)
        sequence.block_table += self._pool.allocate(missing)
        if entry.num_cached is None:
            entry.num_cached = sequence.num_computed
            self._num_prefix_queries += sequence.num_tokens * entry.looks_up
            self._num_prefix_hits += sequence.num_computed
        return True

    def _grow(self, entry: Entry) -> bool:
        """Blocks for all tokens of `entry`, at the cost of the newest; False if it must wait or is the newest."""
        sequence = entry.sequence
        missing = self._pool.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        if missing == 0:
            return True
        while missing > self._pool.num_free:
            newest = self._running[-1]
            if newest.state is State.IN_FLIGHT:
                return False
            self._preempt(newest)
            if newest is entry:
                return False
        sequence.block_table += self._pool.allocate(missing)
        return True

    def _preempt(self, entry: Entry) -> None:
        """Back to waiting with nothing computed; being older than all that never ran, it is at the front there."""
        self._running.remove(entry)
        self._free_blocks(entry)
        entry.sequence.num_computed = 0
        entry.state = State.WAITING
        insort(self._waiting, entry, key=priority_of)
        self._num_preemptions += 1

    def _plan_chunk(self, draft: Draft, entry: Entry) -> None:
        """Put as many uncomputed tokens of a running sequence into the plan as the budget allows."""
        sequence = entry.sequence
        start, num_tokens = sequence.num_computed, sequence.num_tokens
        count = min(num_tokens - start, draft.budget)
        reaches_end = start + count == num_tokens
        logprob_start, logprob_stop = entry.wanted_prompt_logprobs(start, start + count)
        if not entry.told:
            draft.admitted.append(AdmittedSequence.of(sequence))
            entry.told, entry.num_tokens_told = True, num_tokens
        draft.items.append(
            ScheduledSequence(
                seq_id=sequence.seq_id,
                start=start,
                count=count,
                sample=reaches_end and sequence.params.max_tokens != 0,
                new_block_ids=tuple(sequence.block_table[entry.num_blocks_told :]),
                new_token_ids=tuple(sequence.token_ids(entry.num_tokens_told, num_tokens)),
                logprob_start=logprob_start,
                logprob_stop=logprob_stop,
            )
        )
        draft.budget -= count
        entry.num_blocks_told, entry.num_tokens_told = len(sequence.block_table), num_tokens
        entry.state = State.IN_FLIGHT

    def _new_plan(self, items: tuple[ScheduledSequence, ...], admitted: tuple[AdmittedSequence, ...]) -> StepPlan:
        plan = StepPlan(step=self._num_plans, items=items, admitted=admitted, released=tuple(self._released))
        self._num_plans += 1
        self._released.clear()
        return plan

    def _check_results(self, item: ScheduledSequence, sampled: SampledById, rows: RowLogprobsById) -> None:
        """All of a plan's results are there, checked before anything changes."""
        entry = self._entries[item.seq_id]
        if entry.state is State.CANCELLED:
            return
        if entry.state is not State.IN_FLIGHT or entry.sequence.num_computed != item.start:
            raise AssertionError(f"a result for positions {item.start} to {item.stop} came for {entry}")
        if item.sample and item.seq_id not in sampled:
            raise AssertionError(f"no sampled token came for {entry}")
        num_rows = len(rows.get(item.seq_id, ()))
        if num_rows != item.num_logprob_rows:
            raise AssertionError(f"{num_rows} prompt log-probabilities, not {item.num_logprob_rows}, came for {entry}")

    def _apply_item(
        self, item: ScheduledSequence, sampled: SampledById, rows: RowLogprobsById
    ) -> SequenceOutput | None:
        entry = self._entries[item.seq_id]
        sequence = entry.sequence
        if entry.state is State.CANCELLED:
            self._forget(entry)
            return None
        entry.state = State.RUNNING
        sequence.num_computed = item.stop
        entry.prefix.publish()
        for row in rows.get(item.seq_id, ()):
            if isinstance(row, SamplingError):
                return self._fail(entry, row)
            sequence.prompt_logprobs.append(row)
        result = sampled[item.seq_id] if item.sample else None
        if isinstance(result, SamplingError):
            return self._fail(entry, result)
        return self._output(entry, result) if sequence.num_uncomputed == 0 else None

    def _output(self, entry: Entry, sampled: Sampled | None) -> SequenceOutput:
        """The output of a sequence all of whose tokens are computed, with the token it goes on with."""
        sequence = entry.sequence
        position = sequence.num_tokens
        cached_tokens = 0 if sequence.output_ids else entry.num_cached or 0
        if sampled is not None:
            sequence.output_ids.append(sampled.token_id)
        prompt_logprobs: tuple[Sampled | None, ...] | None = None
        if entry.wants_prompt_logprobs:
            prompt_logprobs = (None, *sequence.prompt_logprobs)
            # Given once: a recomputation of the prompt must not collect and give them again.
            entry.wants_prompt_logprobs = False
            sequence.prompt_logprobs.clear()
        finish_reason = sequence.finish_reason(self._limits.max_model_len)
        if finish_reason is not None:
            self._forget(entry)
        return SequenceOutput(
            seq_id=sequence.seq_id,
            position=position,
            sampled=sampled,
            prompt_logprobs=prompt_logprobs,
            cached_tokens=cached_tokens,
            finish_reason=finish_reason,
        )

    def _fail(self, entry: Entry, error: SamplingError) -> SequenceOutput:
        if error.not_finite:
            self._num_not_finite += 1
            entry.prefix.withdraw()  # its latents are what went wrong, or come of it
        self._forget(entry)
        return SequenceOutput(seq_id=entry.sequence.seq_id, position=entry.sequence.num_tokens, error=error.reason)

    def _forget(self, entry: Entry) -> None:
        """The end of a sequence in any state but in flight: nothing of it is left here."""
        if entry.state is State.IN_FLIGHT:
            raise AssertionError(f"forgotten while its step writes its blocks: {entry}")
        if entry.state is State.RUNNING:
            self._running.remove(entry)
        elif entry.state is State.WAITING:
            self._waiting.remove(entry)
        if entry.state is not State.WAITING:
            self._free_blocks(entry)
        del self._entries[entry.sequence.seq_id]

    def _free_blocks(self, entry: Entry) -> None:
        """The blocks of an admitted sequence are free; the mirrors drop it with the next plan."""
        self._pool.free(entry.sequence.block_table)
        entry.sequence.block_table.clear()
        if entry.told:
            self._released.append(entry.sequence.seq_id)
        entry.told, entry.num_blocks_told = False, 0
