"""The caller's side of the expert service: dispatch a layer's tokens, wait for the answers, combine.

Shape legend: T tokens, H hidden, K experts per token, S slots.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from experts.compact import compact_index
from experts.service import ExpertService, LocalCall
from transport.dispatch import Dispatch, ExpertCall, dispatch_tensors, plan_dispatch
from transport.errors import ProtocolError
from transport.frame import Frame, Header, Kind
from transport.links import Link
from transport.mailbox import Mailbox, MailKey
from transport.tasks import Steps
from transport.trace import Trace


@dataclass(frozen=True, kw_only=True)
class WorkId:
    """Which piece of work a call belongs to: the caller's generation, step and micro-batch."""

    generation: int
    step: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What a call waits for: the frames of the remote ranks and the local share."""

    mailbox: Mailbox
    keys: tuple[MailKey, ...]
    local: LocalCall | None

    def ready(self) -> bool:
        return (self.local is None or self.local.ready()) and self.mailbox.has(self.keys)


@dataclass(kw_only=True)
class DispatchStats:
    """Counters of the caller since start: bytes of tokens that left this rank, and seconds from the first frame of a
    call to its last answer."""

    bytes_sent: int = 0
    seconds: float = 0.0


class ExpertClient:
    """Sends each token once to each rank that hosts one of its experts; the local share never leaves the rank."""

    def __init__(
        self,
        link: Link,
        mailbox: Mailbox,
        service: ExpertService,
        *,
        rank_of_expert: Mapping[int, Tensor],
        compact: bool = False,
        trace: Trace | None = None,
    ) -> None:
        self._link = link
        self._mailbox = mailbox
        self._service = service
        self._rank_of_expert = rank_of_expert
        self._compact = compact
        self._trace = trace
        self.stats = DispatchStats()

    def call(
        self,
        work: WorkId,
        layer: int,
        x_TH: Tensor,
        routed: tuple[Tensor, Tensor],
        meanwhile: Callable[[], Tensor | None],
    ) -> Steps[Tensor]:
        """Output [T, H] of a MoE layer: what `meanwhile` returns, computed while the tokens are away, plus the routed
        experts' rows times their weights, added in top-k order. `routed` is the router's (ids, weights), [T, K]."""
        lap = None if self._trace is None else self._trace.laps(work.micro_batch, step=work.step, layer=layer)
        if lap:
            lap("route")
        ids_TK, weights_TK = routed
        dispatch = plan_dispatch(ids_TK.cpu(), self._rank_of_expert[layer], self._link.num_ranks)
        began = time.perf_counter()
        local, keys = self._send(work, layer, x_TH, weights_TK, dispatch)
        if lap:
            lap("dispatch")
        base = meanwhile()
        if lap:
            lap("shared expert")
        yield _Answers(mailbox=self._mailbox, keys=tuple(keys.values()), local=local)
        if lap:
            lap("wait for experts")
        self.stats.seconds += time.perf_counter() - began
        answers = [self._take(rank, keys, local, dispatch, x_TH) for rank in dispatch.destinations]
        rows_SH = answers[0] if len(answers) == 1 else torch.cat(answers)
        device = x_TH.device
        places, weights = compact_index(dispatch) if self._compact else (dispatch.places, weights_TK)
        y_TH = kernels.combine(rows_SH, places.to(device), weights.to(device), base)
        if lap:
            lap("combine")
        return y_TH

    def _send(
        self, work: WorkId, layer: int, x_TH: Tensor, weights_TK: Tensor, dispatch: Dispatch
    ) -> tuple[LocalCall | None, dict[int, MailKey]]:
        local: LocalCall | None = None
        keys: dict[int, MailKey] = {}
        flat_weights = weights_TK.reshape(-1).cpu() if self._compact else None
        for rank in dispatch.destinations:
            part = dispatch.part(rank)
            tensors = dispatch_tensors(x_TH, part)
            weights = None if flat_weights is None else flat_weights[part.slot_pos.long()]
            if rank == self._link.rank:
                local = LocalCall(layer=layer, call=ExpertCall(*tensors), micro_batch=work.micro_batch, weights=weights)
                self._service.submit_local(local)
                continue
            header = Header(
                Kind.DISPATCH,
                self._link.rank,
                generation=work.generation,
                step=work.step,
                layer=layer,
                micro_batch=work.micro_batch,
            )
            payload = tensors if weights is None else (*tensors, weights)
            self.stats.bytes_sent += sum(tensor.nbytes for tensor in payload)
            self._link.post(rank, Frame(header, payload))
            keys[rank] = MailKey(Kind.ANSWER, work.generation, work.step, layer, work.micro_batch, 0, rank)
        return local, keys

    def _take(
        self, rank: int, keys: Mapping[int, MailKey], local: LocalCall | None, dispatch: Dispatch, x_TH: Tensor
    ) -> Tensor:
        if rank == self._link.rank:
            assert local is not None
            assert local.answer is not None, "resumed before the local experts had answered"
            return local.answer
        frame = self._mailbox.take(keys[rank])
        assert frame is not None, f"resumed before the answer of rank {rank} had arrived"
        num_rows = dispatch.part(rank).token_index.shape[0] if self._compact else dispatch.num_slots(rank)
        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in frame.tensors]
        if shapes != [((num_rows, x_TH.shape[1]), torch.float32)]:
            raise ProtocolError(f"rank {rank} answered {shapes}, expected float32 [{num_rows}, {x_TH.shape[1]}]")
        return frame.tensors[0].to(x_TH.device)
