"""The expert service: answers calls for the experts that live on this rank, its own attention's calls included.

An answer is a pure function of the call and the weights, so a call may be repeated, or asked of a replica, at any time.

Shape legend: n rows of one call, S its slots, H hidden, k slots of one row at most.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from experts.bank import ExpertBank
from experts.compact import weighted_rows
from experts.hold import Caller, HoldRule
from transport.dispatch import ExpertCall, expert_call, merge_calls
from transport.errors import ProtocolError
from transport.frame import Frame, Header, Kind
from transport.trace import Trace, now


@dataclass(eq=False, kw_only=True)
class LocalCall:
    """A call of this rank's own attention: the same work, no frame. `answer` is set when it is done.

    `weights` float32 [S] asks for one weighted row per token instead of one row per slot.
    """

    layer: int
    call: ExpertCall
    micro_batch: int = 0
    weights: Tensor | None = None
    answer: Tensor | None = None

    def ready(self) -> bool:
        return self.answer is not None


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """A call in the queue and whom to answer: the sender of `header`, or the local caller."""

    call: ExpertCall
    weights: Tensor | None
    header: Header | None = None
    local: LocalCall | None = None

    @property
    def num_slots(self) -> int:
        return self.call.slot_row.shape[0]

    def caller(self, own_rank: int) -> Caller:
        if self.header is not None:
            return self.header.sender, self.header.micro_batch
        assert self.local is not None
        return own_rank, self.local.micro_batch


@dataclass(kw_only=True)
class ServiceStats:
    """Counters since start: calls answered, grouped batches computed, tokens that came for this rank's experts, by
    layer."""

    calls: int = 0
    batches: int = 0
    tokens_by_layer: dict[int, int] = field(default_factory=dict)


class ExpertService:
    """Calls wait by layer: what is there when its turn comes is one batch. It waits for nobody, or with a hold rule
    for a moment."""

    def __init__(
        self,
        banks: Mapping[int, ExpertBank],
        *,
        rank: int,
        hidden: int,
        device: torch.device,
        hold: HoldRule | None = None,
        clock: Callable[[], float] = time.monotonic,
        trace: Trace | None = None,
    ) -> None:
        self._banks = banks
        self._rank = rank
        self._hold = hold
        self._clock = clock
        self._trace = trace
        self._hidden = hidden
        self._device = device
        self._queues: dict[int, list[_Waiting]] = {}
        self.stats = ServiceStats()

    @property
    def pending(self) -> bool:
        """Whether any call waits."""
        return bool(self._queues)

    def submit(self, frame: Frame) -> Frame | None:
        """Queue a DISPATCH frame (see `dispatch_tensors`, and float32 [S] weights behind them for a compact answer).

        Returns a NOT_HERE frame to post at once where this rank does not host what is asked for. Raises ProtocolError.
        """
        header = frame.header
        bank = self._banks.get(header.layer)
        if bank is None:
            return _not_here(header)
        call = expert_call(frame.tensors[:3], hidden=self._hidden, num_experts=bank.local_slot_E.shape[0])
        if call.missing(bank.local_slot_E):
            return _not_here(header)
        weights = frame.tensors[3] if len(frame.tensors) > 3 else None
        if weights is not None and (weights.dtype is not torch.float32 or weights.shape != call.slot_row.shape):
            raise ProtocolError(
                f"weights are {weights.dtype} {tuple(weights.shape)}, not float32 {call.slot_row.shape}"
            )
        if self._device.type != "cpu":
            call = replace(call, rows_nH=call.rows_nH.to(self._device))
        self._enqueue(header.layer, _Waiting(call=call, weights=weights, header=header))
        return None

    def submit_local(self, local: LocalCall) -> None:
        """Queue a call of this rank's own attention."""
        self._enqueue(local.layer, _Waiting(call=local.call, weights=local.weights, local=local))

    def count_whole(self, num_tokens: int) -> None:
        """Count tokens that the only rank of a mesh has led through all its layers at once, without a call."""
        for layer in self._banks:
            self._count(layer, 1, num_tokens)

    def _count(self, layer: int, calls: int, tokens: int) -> None:
        self.stats.batches += 1
        self.stats.calls += calls
        self.stats.tokens_by_layer[layer] = self.stats.tokens_by_layer.get(layer, 0) + tokens

    def _enqueue(self, layer: int, waiting: _Waiting) -> None:
        self._queues.setdefault(layer, []).append(waiting)
        if self._hold is not None:
            self._hold.came(layer, waiting.caller(self._rank), waiting.num_slots, self._clock())

    def held_for(self) -> float | None:
        """Seconds until a layer that is held back may be computed; None where none is."""
        if self._hold is None or not self._queues:
            return None
        return max(0.0, min(self._held_until(layer) for layer in self._queues) - self._clock())

    def _held_until(self, layer: int) -> float:
        assert self._hold is not None
        return self._hold.until(layer, sum(item.num_slots for item in self._queues[layer]))

    def _next_layer(self) -> int | None:
        """The layer that has waited longest of those that need not wait any more."""
        if self._hold is None:
            return next(iter(self._queues), None)
        time = self._clock()
        return next((layer for layer in self._queues if self._held_until(layer) <= time), None)

    def step(self) -> list[tuple[Header, Tensor]] | None:
        """Compute every call of one layer as one batch: each frame's header and its answer. None: nothing to do yet."""
        layer = self._next_layer()
        if layer is None:
            return None
        began = self._clock()
        waiting = self._queues.pop(layer)
        posted = self._compute(layer, waiting)
        if self._hold is not None:
            self._hold.computed(layer, sum(item.num_slots for item in waiting), self._clock() - began)
        return posted

    def _compute(self, layer: int, waiting: list[_Waiting]) -> list[tuple[Header, Tensor]]:
        began = now() if self._trace is not None else None
        merged = merge_calls([item.call for item in waiting])
        y_SH = self._banks[layer].compute(merged)
        answers = torch.split_with_sizes(y_SH, [item.call.slot_row.shape[0] for item in waiting])
        self._count(layer, len(waiting), merged.rows_nH.shape[0])
        posted: list[tuple[Header, Tensor]] = []
        for item, answer in zip(waiting, answers, strict=True):
            if item.weights is not None:
                answer = weighted_rows(answer, item.call, item.weights)
            if item.local is not None:
                item.local.answer = answer
            if item.header is not None:
                posted.append((item.header, answer))
        if self._trace is not None:
            rows, slots = merged.rows_nH.shape[0], merged.slot_row.shape[0]
            callers = ["here" if item.header is None else item.header.sender for item in waiting]
            self._trace.span("experts", began, layer=layer, rows=rows, slots=slots, callers=callers)
        return posted


def answer_frame(call: Header, answer: Tensor, sender: int) -> Frame:
    """The ANSWER to a DISPATCH frame: the caller's own numbers come back with it."""
    return Frame(replace(call, kind=Kind.ANSWER, sender=sender), (answer,))


def _not_here(call: Header) -> Frame:
    return Frame(replace(call, kind=Kind.NOT_HERE))
