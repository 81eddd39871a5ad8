"""The controller: the one writer of the mesh's view, and the door through which requests reach it.

It runs on the frontend's event loop beside the gateway. Ranks report over the control plane; requests go to the leader
of the attention group that admission chose, and their tokens come back here. When a group is lost, its requests go on
in another one, from the tokens that their clients have.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mesh_config.mesh import MeshConfig
from mesh_config.model_config import ModelConfig
from mesh_config.placement import Placement
from moemesh.admission import Admission, AdmissionLimits, QueueFull
from moemesh.engine_client import (
    EngineFailed,
    EngineStatus,
    GenerationRequest,
    InvalidRequest,
    NotReady,
    Overloaded,
    TokenOutput,
)
from moemesh.group_feed import GroupFeed
from moemesh.ledger import Ledger, LedgerEntry, PrefixAffinity
from moemesh.membership_records import TICK_SECONDS, MembershipSettings, ProcessEnded, Tick
from moemesh.mesh_control import ControlPlane, MeshControl, Watch
from moemesh.mesh_view import MeshView
from moemesh.metrics import Metrics
from moemesh.process_watch import ProcessWatch
from moemesh.random_numbers import choice_seed
from moemesh.request_messages import token_output
from transport import messages
from transport.life import Life

MAX_LOSSES = 3
"""Who was being computed by so many groups in a row that were lost, and got no token in between, may be the cause."""
STALL_SECONDS = 30.0

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Stream:
    """What has come for one request and its client has not taken yet; bounded by the request's own max_tokens."""

    entry: LedgerEntry
    outputs: deque[TokenOutput] = field(default_factory=deque)
    failure: Exception | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class Controller:
    """Implements `EngineClient` over a mesh. All methods run on one event loop; `run` must be running there."""

    def __init__(
        self,
        server: ControlPlane,
        *,
        model_config: ModelConfig,
        mesh: MeshConfig,
        placement: Placement,
        expert_bytes: int,
        settings: MembershipSettings,
        limits: AdmissionLimits,
        metrics: Metrics,
        frontend_pid: int,
        clock: Callable[[], float] = time.monotonic,
        make_watch: Callable[[Callable[[ProcessEnded], None]], Watch] = ProcessWatch,
    ) -> None:
        self._server = server
        self._model_config = model_config
        self._mesh = mesh
        self._metrics = metrics
        self._clock = clock
        self._control = MeshControl(
            server,
            self,
            model=model_config,
            mesh=mesh,
            placement=placement,
            expert_bytes=expert_bytes,
            settings=settings,
            metrics=metrics,
            frontend_pid=frontend_pid,
            clock=clock,
            make_watch=make_watch,
        )
        self._ledger = Ledger(len(mesh.groups), PrefixAffinity.of(mesh))
        self._admission = Admission(self._ledger, limits)
        self._feed = GroupFeed(self._control, self._ledger, self._admission, metrics, clock)
        self._streams: dict[int, _Stream] = {}
        self._failure: str | None = None
        # A request without max_tokens goes on until the context ends, or the cache, where that is smaller: a sequence's
        # last token is given out and never cached.
        self._longest = min(mesh.max_model_len, (mesh.num_cache_blocks or 0) * mesh.block_size + 1)
        self._draining = False
        self._changed = asyncio.Event()
        self._last_progress = self._clock()

    @property
    def view(self) -> MeshView:
        """The ranks, as `/mesh` shows them."""
        return self._control.view

    @property
    def model_config(self) -> ModelConfig:
        return self._model_config

    @property
    def max_model_len(self) -> int:
        return self._mesh.max_model_len

    @property
    def num_requests(self) -> int:
        """Requests whose clients have not got everything."""
        return len(self._streams)

    @property
    def failure(self) -> str | None:
        """Why the mesh serves no longer, if so."""
        return self._failure

    def status(self) -> EngineStatus:
        if self._failure is not None:
            return EngineStatus(state="failed", ready=False, detail=self._failure)
        if self._draining:
            return EngineStatus(state="draining", ready=False, detail=f"draining {self.num_requests} requests")
        membership = self._control.membership
        if not membership.started:
            return EngineStatus(state="loading", ready=False, detail=self.view.loading_detail())
        missing = membership.stranded or self._missing()
        if not self._feed.serving_groups():
            return EngineStatus(state="ready", ready=False, detail=f"cannot serve: {missing}", degraded=True)
        idle_for = self._clock() - self._last_progress
        if len(self._ledger) and idle_for > STALL_SECONDS:
            detail = f"{len(self._ledger)} requests in flight, but no step for {idle_for:.0f} s"
            return EngineStatus(state="ready", ready=False, detail=detail, degraded=membership.degraded)
        return EngineStatus(state="ready", ready=True, detail=missing, degraded=membership.degraded)

    def _missing(self) -> str:
        """What a degraded mesh lacks."""
        ranks = enumerate(self._control.membership.view.ranks)
        return "; ".join(f"rank {rank} is {record.state}: {record.reason}" for rank, record in ranks if record.reason)

    def mesh(self) -> dict[str, Any]:
        return self.view.describe()

    # --- requests

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """Outputs of one request as they come; closing the iterator cancels it. Raises RequestError."""
        stream = self._admit(request)
        request_id = stream.entry.request_id
        finished = False
        try:
            while not finished:
                await stream.arrived.wait()
                stream.arrived.clear()
                while stream.outputs:
                    output = stream.outputs.popleft()
                    finished = output.finish_reason is not None
                    yield output
                if stream.failure is not None and not finished:
                    finished = True
                    raise stream.failure
        finally:
            self._forget(request_id)
            if not finished:
                self._feed.cancel(stream.entry)

    def _forget(self, request_id: int) -> None:
        self._streams.pop(request_id, None)
        self._ledger.close(request_id)
        self._admission.forget(request_id)
        self._feed.give_out()
        self._notify()

    def _admit(self, request: GenerationRequest) -> _Stream:
        status = self.status()
        if status.state != "ready":
            raise NotReady(f"the mesh takes no requests: {status.detail}")
        if stranded := self._control.membership.stranded:
            raise NotReady(f"the mesh takes no requests: {stranded}")
        try:
            self._admission.check_room(len(request.prompt_token_ids))
        except QueueFull as error:
            raise self._overloaded(str(error)) from None
        params = request.params
        room = self._longest - len(request.prompt_token_ids)
        max_new = max(0, room) if params.max_tokens is None else params.max_tokens
        drawn = params.seed if params.seed is not None else secrets.randbits(63)
        params = replace(params, seed=choice_seed(drawn, request.choice), max_tokens=max_new, n=1, stop=())
        entry = self._ledger.admit(
            request.prompt_token_ids, params, max_new_tokens=max_new, cache_salt=request.cache_salt
        )
        if len(self._ledger) == 1:
            self._last_progress = self._clock()
        stream = self._streams[entry.request_id] = _Stream(entry)
        self._admission.enter(entry, self._clock())
        self._feed.give_out()
        return stream

    def _turn_away(self) -> None:
        """End what nobody will compute."""
        if stranded := self._control.membership.stranded:
            for request_id, stream in self._streams.items():
                if self._ledger.get(request_id) is not None:
                    self._feed.cancel(stream.entry)
                    self._end(request_id, EngineFailed(stranded))
        for entry in self._admission.expired(self._clock()):
            self._end(entry.request_id, self._overloaded("the request has waited for too long for its turn"))

    def _overloaded(self, message: str) -> Overloaded:
        return Overloaded(message, retry_after=self._admission.retry_after(self._clock()))

    # --- reports of the ranks

    async def run(self) -> None:
        """Serve the control plane until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen())
                group.create_task(self._watch_time())
        finally:
            self._control.close()

    async def _listen(self) -> None:
        while True:
            self._handle(*await self._server.receive())

    async def _watch_time(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._control.tell(Tick())
            self._turn_away()
            self._feed.give_out()

    def _handle(self, life: Life, message: messages.Message) -> None:
        if not isinstance(message, messages.Outputs | messages.Stats):
            self._control.hear(life, message)
        elif isinstance(message, messages.Outputs):
            self._take_outputs(life, message)
        elif not self._control.membership.believes(life):
            self._metrics.stale_messages.inc()
        else:
            self.view.note_expert_load(message.expert_load)
            if self.view.note_steps(life.rank, message.counters.get("steps", 0.0)):
                self._last_progress = self._clock()
            self._metrics.ranks.update(life.rank, message.counters, incarnation=life.incarnation)

    def _take_outputs(self, life: Life, outputs: messages.Outputs) -> None:
        group = self._mesh.group_of(life.rank)
        if not self._control.membership.believes_of(life, group, outputs.generation):
            self._metrics.stale_messages.inc()
            return
        self._last_progress = self._clock()
        for item in outputs.items:
            self._deliver(item, group)

    def _deliver(self, item: messages.OutputItem, group: int | None) -> None:
        entry, stream = self._ledger.get(item.request_id), self._streams.get(item.request_id)
        if entry is None or stream is None or entry.group != group:
            return  # cancelled, or given to another group, while its last tokens were under way
        if item.error is not None:
            self._end(item.request_id, InvalidRequest(item.error) if item.refused else EngineFailed(item.error))
            return
        restarting, mismatches = entry.restarting, self._ledger.replay_mismatches
        known = self._ledger.accept(item.request_id, item.position - len(entry.prompt), item.token_ids)
        self._metrics.replay_mismatch.inc(self._ledger.replay_mismatches - mismatches)
        stream.outputs.append(token_output(item, known))
        stream.arrived.set()
        if item.finish_reason is not None:
            self._ledger.close(item.request_id)  # however long its client takes to read: nothing is left to compute
        if item.finish_reason is not None or (restarting and not entry.restarting):
            self._feed.give_out()  # the next one's turn

    def _end(self, request_id: int, error: Exception) -> None:
        self._ledger.close(request_id)
        self._admission.forget(request_id)
        stream = self._streams[request_id]
        stream.failure = error
        stream.arrived.set()

    # --- MeshListener

    def group_lost(self, group: int, reason: str) -> None:
        """See MeshListener."""
        self._feed.lose(group)
        lost = self._ledger.lose(group, self._clock())
        if lost:
            logger.warning("%d requests of attention group %d begin again: %s", len(lost), group, reason)
        self._end_suspects(lost, reason)
        self._admission.restart(entry for entry in lost if entry.losses < MAX_LOSSES)

    def group_regrouped(self, group: int, reason: str, *, lost: bool) -> None:
        """See MeshListener."""
        entries = self._ledger.keep(group, self._clock()) if lost else self._ledger.entries_of(group)
        logger.warning("attention group %d goes on with %d requests: %s", group, len(entries), reason)
        self._end_suspects(entries, reason)
        self._feed.regroup(group)

    def _end_suspects(self, entries: Sequence[LedgerEntry], reason: str) -> None:
        """End those that may be the cause of what is being lost again and again."""
        for entry in entries:
            if entry.losses >= MAX_LOSSES:
                told = f"the request was being computed at each of the last {entry.losses} failures: {reason}"
                self._end(entry.request_id, EngineFailed(told))

    def mesh_failed(self, reason: str) -> None:
        """See MeshListener."""
        self.fail(reason)

    def mesh_changed(self) -> None:
        """See MeshListener."""
        self._feed.give_out()
        self._notify()

    def fail(self, reason: str) -> None:
        """The mesh can serve no longer: every stream ends with an error."""
        if self._failure is None:
            self._failure = reason
            logger.error("the mesh has failed: %s", reason)
        for stream in self._streams.values():
            stream.failure = EngineFailed(f"the mesh has failed: {self._failure}")
            stream.arrived.set()
        self._notify()

    # --- life cycle

    async def wait_ready(self) -> None:
        """Until every rank has loaded. Raises EngineFailed when one cannot."""
        await self._until(lambda: self._control.membership.started)
        if self._failure is not None:
            raise EngineFailed(self._failure)

    async def wait_failed(self) -> None:
        """Until the mesh can serve no longer."""
        await self._until(lambda: False)

    async def drain(self, timeout: float) -> int:
        """Refuse new requests and wait for the running ones, at most `timeout` seconds; how many were left."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._until(lambda: not self._streams)
        except TimeoutError:
            logger.warning("%d requests had not finished after %.0f s", self.num_requests, timeout)
        left = self.num_requests
        if left:
            self.fail("shutting down")
        return left

    def stop_ranks(self) -> None:
        """Tell every rank to end."""
        self._control.stop_ranks()

    @property
    def may_restart(self) -> bool:
        """Whether the mesh goes on when its processes have been started again."""
        return self._failure is None and self._control.membership.may_restart

    @property
    def all_lost(self) -> bool:
        """No rank's process is left."""
        return self._control.membership.all_lost

    async def next_start(self, ended: str) -> int:
        """All processes have ended, like this: the incarnation to start all of them as, when it is time."""
        return await self._control.next_start(ended)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds or the mesh has failed."""
        while not condition() and self._failure is None:
            await self._changed.wait()

    def _notify(self) -> None:
        """Let everybody who waits for something look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
