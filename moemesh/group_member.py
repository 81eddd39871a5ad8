"""One rank's side of an attention group: follow the leader's plans, run the steps, hand in the samples.

The leader owns the group's scheduler; every member, the leader included, builds the same batches from the same plans.
One step of a group is under way at a time; its micro-batches run side by side.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import msgpack
import torch

from attention.latent_cache import LatentCache
from attention.service import AttentionService
from moemesh.batch import MicroBatch, build_micro_batch, split_plan
from moemesh.forward import Forward
from moemesh.head import Head, RowResults
from moemesh.heads import HeadsMissing
from moemesh.kept_cache import KeptCache
from moemesh.model import AttentionModel
from moemesh.overlap import OverlapRule
from moemesh.regrouping import Regrouping
from moemesh.scheduler import Scheduler
from moemesh.sequence import Sequence, SequenceOutput
from moemesh.step_plan import PlanMirror, StepPlan
from transport.collectives import Wait, awaited
from transport.frame import Frame, Header, Kind
from transport.links import Link
from transport.mailbox import Mailbox, MailKey
from transport.messages import GroupPulse
from transport.shards import row_split
from transport.tasks import Steps, Task, together
from transport.trace import Trace, now

Engaged = tuple[AttentionService, Forward]
Engage = Callable[[], Steps[Engaged]]
"""Waits for the heads that a member computes with, and makes of them what leads rows through the layers."""


@dataclass
class _Submitted:
    """Whether all sequences that are to go on are there; may be waited for."""

    over: bool

    def ready(self) -> bool:
        return self.over


class GroupMember:
    """One member's state: the mirror of the group's sequences, the step under way and, at the leader, the scheduler."""

    def __init__(
        self,
        *,
        members: tuple[int, ...],
        link: Link,
        mailbox: Mailbox,
        model: AttentionModel,
        cache: LatentCache,
        engage: Engage,
        overlap: OverlapRule,
        expand_prompts: bool,
        scheduler: Scheduler | None,
        generation: int,
        kept: KeptCache | None,
        goes_on: bool,
        clock: Callable[[], float],
        trace: Trace | None = None,
    ) -> None:
        """`members`: none where this rank is not in the group. `goes_on`: with the cache of an earlier generation, of
        which this member knows what is `kept`."""
        self._members = members
        self._link = link
        self._mailbox = mailbox
        self._model = model
        self._head = Head(model)
        self._overlap = overlap
        self._expand_prompts = expand_prompts
        self.scheduler = scheduler
        self.generation = generation
        self._clock = clock
        self._trace = trace
        self._mirror = PlanMirror()
        self._plans: deque[StepPlan] = deque()
        self._engaged: Engaged | None = None
        self._problem: str | None = None
        self._submitted = _Submitted(over=not goes_on)
        self._regrouping = Regrouping(
            members=members, generation=generation, link=link, mailbox=mailbox, cache=cache, kept=kept
        )
        self._task: Task[None] | None = Task(self._join(engage, goes_on=goes_on)) if members else None
        self._outputs: list[SequenceOutput] = []
        self._waited = 0.0
        self._num_moves = 0
        self.num_steps = 0
        self.num_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether a step is under way or there is one to begin."""
        return self._task is not None or bool(self._plans) or (self.scheduler is not None and self.scheduler.has_work)

    @property
    def num_sequences(self) -> int:
        """Sequences that this member knows of."""
        return len(self._mirror.sequences)

    def submit(self, sequence: Sequence) -> None:
        """Leader only: take over a new sequence. ValueError if it can never be served."""
        assert self.scheduler is not None, "a request reached a rank that leads no attention group"
        self.scheduler.add(sequence)

    def cancel(self, seq_id: int) -> None:
        """Leader only: forget a sequence."""
        assert self.scheduler is not None, "a cancellation reached a rank that leads no attention group"
        self.scheduler.cancel(seq_id)

    def resume(self) -> None:
        """Leader only: all sequences that go on from an earlier generation have been submitted."""
        self._submitted.over = True

    def receive_plan(self, frame: Frame) -> None:
        """Queue the leader's next plan."""
        self._plans.append(StepPlan.from_wire(msgpack.unpackb(frame.tensors[0].numpy().tobytes())))

    def take_outputs(self) -> list[SequenceOutput]:
        """What the leader's sequences have given since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_problem(self) -> str | None:
        """Why this member cannot take part in its generation, once."""
        problem, self._problem = self._problem, None
        return problem

    def waited(self, seconds: float) -> None:
        """The rank had nothing to do for so long."""
        self._waited += seconds

    def turn(self, *, may_begin: bool = True) -> bool:
        """Advance as far as possible without waiting, with a new step where none is under way and one `may_begin`;
        whether anything happened."""
        if self._task is None and not (may_begin and self._begin()):
            return False
        assert self._task is not None
        advanced = self._task.advance()
        self._num_moves += advanced
        if self._task.done:
            self._task = None
        return advanced

    def pulse(self) -> GroupPulse | None:
        """How far this member has got, and whom it waits for; None where it has no peers."""
        if len(self._members) < 2:
            return None
        return GroupPulse(self.generation, self.num_steps, self._num_moves, sorted(self._awaited()))

    def _awaited(self) -> frozenset[int]:
        """Members without whose frames nothing can be done here."""
        if self._task is not None:
            return awaited(self._task.wait)
        if self.scheduler is not None or self._engaged is None or self._plans:
            return frozenset()
        return frozenset(self._members[:1])

    def leave(self) -> KeptCache | None:
        """The generation is over, and with it the step under way; what is known of the cache, for the next one."""
        if self._task is not None:
            self._task.abandon()
        last = self._mirror.last
        return self._regrouping.kept if last is None else KeptCache.of(self.generation, self._mirror, last)

    def _join(self, engage: Engage, *, goes_on: bool) -> Steps[None]:
        """What comes before the first step."""
        try:
            self._engaged = yield from engage()
        except HeadsMissing as error:
            self._problem = str(error)
            return
        if goes_on and self.scheduler is None:
            yield from self._regrouping.follow()
        elif goes_on and self.scheduler is not None:
            yield from self._regrouping.lead(self.scheduler, self._submitted)

    def _begin(self) -> bool:
        if self._engaged is None:
            return False
        if self.scheduler is not None:
            plan = self.scheduler.schedule() or self.scheduler.release_plan()
            if plan is None:
                return False
            parts = self._overlap.num_parts(plan.num_tokens)
            if parts != plan.micro_batches:
                plan = replace(plan, micro_batches=parts)
            self._broadcast(plan)
        elif self._plans:
            plan = self._plans.popleft()
        else:
            return False
        self._task = Task(self._step(plan))
        return True

    def _broadcast(self, plan: StepPlan) -> None:
        others = self._members[1:]
        if not others:
            return
        payload = torch.frombuffer(bytearray(msgpack.packb(plan.to_wire())), dtype=torch.uint8)
        header = Header(Kind.PLAN, self._link.rank, generation=self.generation, step=plan.step)
        for member in others:
            self._link.post(member, Frame(header, (payload,)))

    def _step(self, plan: StepPlan) -> Steps[None]:
        began = now() if self._trace is not None else None
        started, self._waited = self._clock(), 0.0
        self._mirror.follow(plan)
        if plan.items:
            parts = split_plan(plan)
            rotary, expand = self._model.rotary, self._expand_prompts
            batches = [
                build_micro_batch(index, items, self._mirror, rotary, expand_prompts=expand)
                for index, items in enumerate(parts)
            ]
            results = yield from together([self._run(plan.step, batch) for batch in batches])
            if self.scheduler is not None:
                yield from self._finish_as_leader(self.scheduler, plan, batches, results)
                seconds = self._clock() - started
                self._overlap.note(plan.num_tokens, len(parts), seconds=seconds, waited=self._waited)
        else:
            yield from self._confirm(plan)
        self._mailbox.discard(self.generation, plan.step + 1)
        self.num_steps += 1
        self.num_tokens += plan.num_tokens
        if self._trace is not None:
            self._trace.span("step", began, step=plan.step, sequences=len(plan.items))

    def _confirm(self, plan: StepPlan) -> Steps[None]:
        """The leader hears that everybody has followed a plan that gives no results. Nobody would miss one that is
        lost, and the next one might overtake it."""
        if self.scheduler is None:
            self._hand_in(plan.step, 0, RowResults())
            return
        keys = [self._samples_key(plan.step, 0, member) for member in self._members[1:]]
        if keys:
            yield Wait(self._mailbox, tuple(keys))
        for key in keys:
            self._mailbox.take(key)

    def _hand_in(self, step: int, micro_batch: int, results: RowResults) -> None:
        header = Header(Kind.SAMPLES, self._link.rank, generation=self.generation, step=step, micro_batch=micro_batch)
        self._link.post(self._members[0], Frame(header, (results.to_tensor(),)))

    def _samples_key(self, step: int, micro_batch: int, member: int) -> MailKey:
        return MailKey(Kind.SAMPLES, self.generation, step, 0, micro_batch, 0, member)

    def _run(self, step: int, batch: MicroBatch) -> Steps[RowResults]:
        """One micro-batch; the results of the rows this member owns, sent to the leader if that is another rank."""
        lap = None if self._trace is None else self._trace.start(batch.index, step=step)
        assert self._engaged is not None
        attention, forward = self._engaged
        start, stop = attention.owned_rows(batch.attention.num_rows)
        owned = [row for row in batch.logits_rows if start <= row.row < stop]
        head_calls = self._head.prepare((start, stop), owned)
        x_OH = yield from forward.run(batch, generation=self.generation, step=step)
        if lap:
            lap("layers")
        results = self._head.evaluate(x_OH, head_calls)
        if owned and self.scheduler is None:
            self._hand_in(step, batch.index, results)
        if lap:
            lap("head and sampling")
        return results

    def _finish_as_leader(
        self, scheduler: Scheduler, plan: StepPlan, batches: SequenceOf[MicroBatch], own: SequenceOf[RowResults]
    ) -> Steps[None]:
        """Gather the members' results in row order and enter them into the scheduler."""
        merged = RowResults()
        for batch, results in zip(batches, own, strict=True):
            merged.add(results)  # the leader owns the first rows
            keys = self._expected_samples(plan.step, batch)
            if keys:
                yield Wait(self._mailbox, tuple(keys))
            for key in keys:
                frame = self._mailbox.take(key)
                assert frame is not None, f"resumed before the samples of rank {key.sender} had arrived"
                merged.add(RowResults.from_tensor(frame.tensors[0]))
        self._outputs += scheduler.apply(plan, merged.sampled, merged.prompt_logprobs)

    def _expected_samples(self, step: int, batch: MicroBatch) -> list[MailKey]:
        """Keys of the frames of all other members that own rows with logits, in row order."""
        if len(self._members) == 1:
            return []
        split = row_split(batch.attention.num_rows, len(self._members))
        return [
            self._samples_key(step, batch.index, member)
            for member, (start, stop) in zip(self._members[1:], split[1:], strict=True)
            if any(start <= row.row < stop for row in batch.logits_rows)
        ]
