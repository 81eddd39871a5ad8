"""The caller's side of the expert service: dispatch a layer's tokens, wait for the answers, combine.

A call outlives whom it asked: what is not answered in time is asked of another host too, and what nobody can answer
waits until a placement names a host. Results never depend on who answered.

Shape legend: T tokens, H hidden, K experts per token, S slots.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf

import numpy as np
import torch
from torch import Tensor

import kernels
from experts.compact import compact_index
from experts.pending import Asked, PendingCall, Slots
from experts.round_trips import LONGEST_DEADLINE, RoundTrips
from experts.routes import Routes
from experts.service import ExpertService, LocalCall
from mesh_config.placement import Placement
from transport.dispatch import plan_dispatch
from transport.errors import Overloaded
from transport.frame import Frame, Header, Kind
from transport.links import Link
from transport.tasks import Steps
from transport.trace import Trace

RETRY_SECONDS = 0.02
"""Until whoever said that it does not host an expert, or took no more frames, is asked again."""
AWAY_SECONDS = 0.2
"""Who looks at its deadlines so late was away itself, and judges nobody by the time that it did not look."""

_Key = tuple[int, int, int, int]  # generation, step, layer, micro-batch


@dataclass(frozen=True, kw_only=True)
class WorkId:
    """Which piece of work a call belongs to: the caller's generation, step and micro-batch."""

    generation: int
    step: int
    micro_batch: int


@dataclass(kw_only=True)
class DispatchStats:
    """Counters of the caller since start: bytes of tokens that left this rank, seconds from the first frame of a call
    to its last answer; calls asked again because an answer was late, and because a rank was gone or did not host the
    expert; answers dropped because the call was over, or answered already, or because they were none."""

    bytes_sent: int = 0
    seconds: float = 0.0
    hedged: int = 0
    rerouted: int = 0
    late_answers: int = 0
    double_answers: int = 0
    malformed_answers: int = 0


class ExpertClient:
    """Sends each token once to each rank that hosts one of its experts; the local share never leaves the rank."""

    def __init__(
        self,
        link: Link,
        service: ExpertService,
        *,
        placement: Placement,
        living: Mapping[int, int],
        compact: bool = False,
        clock: Callable[[], float] = time.monotonic,
        trace: Trace | None = None,
    ) -> None:
        """`living`: the incarnation of each rank that lives."""
        self._link = link
        self._service = service
        self._routes = Routes(placement, living)
        self._compact = compact
        self._clock = clock
        self._trace = trace
        self._calls: dict[_Key, PendingCall] = {}
        self._trips = {rank: RoundTrips() for rank in range(link.num_ranks)}
        self._look_at = inf  # no deadline is earlier
        self.stats = DispatchStats()

    @property
    def pending(self) -> int:
        """Calls that wait for answers."""
        return len(self._calls)

    def call(
        self,
        work: WorkId,
        layer: int,
        x_TH: Tensor,
        routed: tuple[Tensor, Tensor],
        meanwhile: Callable[[], Tensor | None],
    ) -> Steps[Tensor]:
        """Output [T, H] of a MoE layer: what `meanwhile` returns, computed while the tokens are away, plus the routed
        experts' rows times their weights, added in top-k order. `routed` is the router's (ids, weights), [T, K]; x_TH
        must not change until the end."""
        lap = None if self._trace is None else self._trace.laps(work.micro_batch, step=work.step, layer=layer)
        if lap:
            lap("route")
        ids_TK, weights_TK = routed
        dispatch = plan_dispatch(ids_TK.cpu(), self._routes.table(layer), self._routes.num_destinations)
        call = PendingCall(layer=layer, x_TH=x_TH, dispatch=dispatch, weights_TK=weights_TK if self._compact else None)
        key = (work.generation, work.step, layer, work.micro_batch)
        if not self._calls:
            self._look_at = inf
        self._calls[key] = call
        try:
            began = self._clock()
            for part, rank in enumerate(dispatch.destinations):
                self._ask(key, call, rank, part, None)
            if lap:
                lap("dispatch")
            base = meanwhile()
            if lap:
                lap("shared expert")
            yield call
        finally:
            del self._calls[key]
        if lap:
            lap("wait for experts")
        self.stats.seconds += self._clock() - began
        answers = call.answers()
        rows_SH = answers[0] if len(answers) == 1 else torch.cat(answers)
        device = x_TH.device
        places, weights = compact_index(dispatch) if self._compact else (dispatch.places, weights_TK)
        y_TH = kernels.combine(rows_SH, places.to(device), weights.to(device), base)
        if lap:
            lap("combine")
        return y_TH

    # --- asking

    def _ask(
        self, key: _Key, call: PendingCall, rank: int, part: int, slots: Slots | None, patience: float = 1.0
    ) -> None:
        """Ask a rank for a part, or for some slots of it. Slots that nobody hosts stay open until a placement comes."""
        if rank == self._routes.nobody:
            return
        question, weights = call.question(part, slots)
        num_slots = question.slot_expert.shape[0]
        now = self._clock()
        asked = Asked(rank, self._routes.living.get(rank, 0), part, slots, num_slots, now, patience)
        attempt = 0 if slots is None else call.next_attempt()
        if rank == self._link.rank:
            call.asked[rank, attempt] = asked
            local = LocalCall(layer=call.layer, call=question, micro_batch=key[3], weights=weights)
            local.notify = partial(call.take, (rank, attempt))
            self._service.submit_local(local)
            return
        header = Header(
            Kind.DISPATCH,
            self._link.rank,
            generation=key[0],
            placement_version=self._routes.version,
            step=key[1],
            layer=key[2],
            micro_batch=key[3],
            attempt=attempt,
        )
        tensors = (question.rows_nH, question.slot_row, question.slot_expert)
        payload = tensors if weights is None else (*tensors, weights)
        try:
            self._link.post(rank, Frame(header, payload))
        except Overloaded:
            self._retry(call, now)
            return
        self.stats.bytes_sent += sum(tensor.nbytes for tensor in payload)
        call.asked[rank, attempt] = asked
        asked.allowed = min(patience * self._trips[rank].deadline(num_slots), LONGEST_DEADLINE)
        asked.deadline = now + asked.allowed
        self._look_at = min(self._look_at, asked.deadline)

    def _ask_open(self, key: _Key, call: PendingCall, part: int, besides: Iterable[int] = ()) -> None:
        """Ask for what nobody is asked for, whoever hosts it now."""
        slots = call.open_slots(part)
        by_host = self._by_host(call, part, slots, frozenset(besides))
        for rank, chosen in by_host.items():
            self.stats.rerouted += 1
            self._ask(key, call, rank, part, chosen, patience=2.0)

    def _by_host(self, call: PendingCall, part: int, slots: Slots, besides: frozenset[int]) -> dict[int, Slots]:
        """The slots that have a host, other than `besides`, by host."""
        experts = call.experts_of(part, slots)
        host_of = {expert: self._routes.host(call.layer, expert, besides) for expert in set(experts)}
        chosen: dict[int, list[int]] = {}
        for slot, expert in zip(slots.tolist(), experts, strict=True):
            host = host_of[expert]
            if host is not None:
                chosen.setdefault(host, []).append(slot)
        return {rank: np.array(some, dtype=np.intp) for rank, some in chosen.items()}

    def _retry(self, call: PendingCall, now: float) -> None:
        call.retry_at = now + RETRY_SECONDS
        self._look_at = min(self._look_at, call.retry_at)

    # --- what comes back

    def receive(self, frame: Frame) -> None:
        """Take in an ANSWER or NOT_HERE frame. What comes late, or twice, is dropped and counted."""
        header = frame.header
        key = (header.generation, header.step, header.layer, header.micro_batch)
        call = self._calls.get(key)
        if call is None:
            self.stats.late_answers += 1
            return
        asked = call.asked.pop((header.sender, header.attempt), None)
        if asked is None:
            self.stats.double_answers += 1
        elif header.kind is Kind.NOT_HERE:
            self._refused(key, call, asked)
        else:
            self._trips[asked.rank].observe(asked.num_slots, self._clock() - asked.sent)
            if not call.fits(asked, frame.tensors):
                self.stats.malformed_answers += 1
                self._retry(call, self._clock())
            elif not call.accept(asked, frame.tensors):
                self.stats.double_answers += 1

    def _refused(self, key: _Key, call: PendingCall, asked: Asked) -> None:
        """Another host may have it; or its placement is older than ours, and it will have it in a moment."""
        others = {other.rank for other in call.asked_for(asked.part)}
        self._ask_open(key, call, asked.part, besides={asked.rank, *others})
        self._retry(call, self._clock())

    # --- what does not

    def suspect(self, rank: int) -> None:
        """The link has lost this rank: nothing more comes of this life of it. Others are asked, where there are any."""
        self._routes.suspect(rank, None)
        self._ask_again(lambda asked: asked.rank == rank)

    def follow(self, placement: Placement, living: Mapping[int, int]) -> None:
        """A view names who lives (the incarnation of each) and who hosts what. What was asked of ranks that are gone,
        or of nobody, is asked of whoever hosts it now."""
        self._routes.follow(placement, living)
        self._ask_again(lambda asked: living.get(asked.rank) != asked.incarnation)

    def _ask_again(self, gone: Callable[[Asked], bool]) -> None:
        for key, call in self._calls.items():
            for name in [name for name, asked in call.asked.items() if gone(asked)]:
                del call.asked[name]
            for part in range(len(call.dispatch.parts)):
                self._ask_open(key, call, part)

    def due(self) -> float:
        """When `check_deadlines` is to be called next; infinity while nothing is waited for."""
        return self._look_at if self._calls else inf

    def check_deadlines(self, now: float) -> list[int]:
        """Ask others for what has not come in time; the ranks that were late. Cheap while nothing is due."""
        if now < self._look_at or not self._calls:
            return []
        away = now - self._look_at > AWAY_SECONDS
        late: set[int] = set()
        for key, call in self._calls.items():
            for asked in list(call.asked.values()):
                if asked.deadline <= now and away:
                    asked.deadline = now + asked.allowed
                elif asked.deadline <= now:
                    late.add(asked.rank)
                    self._routes.suspect(asked.rank, now)
                    self._hedge(key, call, asked)
            if call.retry_at <= now:
                call.retry_at = inf
                for part in range(len(call.dispatch.parts)):
                    self._ask_open(key, call, part)
        self._routes.forgive(now)
        self._look_at = min((call.earliest() for call in self._calls.values()), default=inf)
        return sorted(late)

    def _hedge(self, key: _Key, call: PendingCall, asked: Asked) -> None:
        """Ask a host that was not asked yet or, where there is none, the best one again: a frame may be lost."""
        asked.late, asked.deadline = True, inf
        slots = call.open_slots(asked.part, of=asked)
        tried = frozenset(other.rank for other in call.asked_for(asked.part))
        again = self._by_host(call, asked.part, slots, frozenset())
        fresh = self._by_host(call, asked.part, slots, tried)
        for chosen in fresh.values():
            again = {rank: left for rank, some in again.items() if (left := np.setdiff1d(some, chosen)).size}
        for rank, some in (*fresh.items(), *again.items()):
            self.stats.hedged += 1
            self._ask(key, call, rank, asked.part, some, patience=2 * asked.patience)
