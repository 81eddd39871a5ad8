"""The controller: the one writer of the mesh's view, and the door through which requests reach it.

It runs on the frontend's event loop beside the gateway. Ranks report over the control plane; requests go to the leader
of the attention group that the ledger chose, and their tokens come back here.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mesh_config.mesh import MeshConfig
from mesh_config.model_config import ModelConfig
from mesh_config.placement import Placement
from moemesh.engine_client import (
    EngineFailed,
    EngineStatus,
    FinishReason,
    GenerationRequest,
    InvalidRequest,
    NotReady,
    Overloaded,
    TokenLogprob,
    TokenOutput,
)
from moemesh.ledger import Ledger, LedgerEntry, PrefixAffinity
from moemesh.mesh_view import MeshView
from moemesh.metrics import Metrics
from moemesh.random_numbers import choice_seed
from transport import messages
from transport.errors import Overloaded as TransportOverloaded

MAX_REQUESTS = 4096
MAX_AFFINITY = 65536  # blocks remembered per attention group, 10 MB of names
STALL_SECONDS = 30.0

_FINISH_REASONS: dict[str | None, FinishReason | None] = {None: None, "stop": "stop", "length": "length"}

logger = logging.getLogger(__name__)


class ControlPlane(Protocol):
    """The frontend's end of the control plane; `ControlServer` is the real one."""

    def send(self, rank: int, message: messages.Message) -> None: ...

    async def receive(self) -> tuple[int, messages.Message]: ...


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
        metrics: Metrics,
        frontend_pid: int,
    ) -> None:
        self._server = server
        self._model_config = model_config
        self._mesh = mesh
        self._metrics = metrics
        self.view = MeshView(mesh, placement, expert_bytes=expert_bytes, frontend_pid=frontend_pid)
        self._ledger = Ledger(len(mesh.groups), _affinity(mesh))
        self._streams: dict[int, _Stream] = {}
        self._failure: str | None = None
        # A request without max_tokens goes on until the context ends, or the cache, where that is smaller: a sequence's
        # last token is given out and never cached.
        self._longest = min(mesh.max_model_len, (mesh.num_cache_blocks or 0) * mesh.block_size + 1)
        self._draining = False
        self._changed = asyncio.Event()
        self._last_progress = time.monotonic()

    @property
    def model_config(self) -> ModelConfig:
        return self._model_config

    @property
    def max_model_len(self) -> int:
        return self._mesh.max_model_len

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._ledger)

    @property
    def failure(self) -> str | None:
        """Why the mesh serves no longer, if so."""
        return self._failure

    def status(self) -> EngineStatus:
        if self._failure is not None:
            return EngineStatus(state="failed", ready=False, detail=self._failure)
        if self._draining:
            return EngineStatus(state="draining", ready=False, detail=f"draining {self.num_requests} requests")
        if not self.view.ready:
            return EngineStatus(state="loading", ready=False, detail=self.view.loading_detail())
        idle_for = time.monotonic() - self._last_progress
        if len(self._ledger) and idle_for > STALL_SECONDS:
            detail = f"{len(self._ledger)} requests in flight, but no step for {idle_for:.0f} s"
            return EngineStatus(state="ready", ready=False, detail=detail)
        return EngineStatus(state="ready", ready=True)

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
                if stream.failure is not None:
                    finished = True
                    raise stream.failure
        finally:
            self._forget(request_id)
            if not finished:
                self._cancel(stream.entry)

    def _forget(self, request_id: int) -> None:
        self._streams.pop(request_id, None)
        self._ledger.close(request_id)
        self._notify()

    def _cancel(self, entry: LedgerEntry) -> None:
        with contextlib.suppress(TransportOverloaded):  # a rank that is gone computes nothing
            self._server.send(self._mesh.groups[entry.group][0], messages.Cancel(request_id=entry.request_id))

    def _admit(self, request: GenerationRequest) -> _Stream:
        status = self.status()
        if status.state != "ready":
            raise NotReady(f"the mesh takes no requests: {status.detail}")
        if len(self._ledger) >= MAX_REQUESTS:
            raise Overloaded(f"{len(self._ledger)} requests are in flight, at most {MAX_REQUESTS} are taken")
        params = request.params
        room = self._longest - len(request.prompt_token_ids)
        max_new = max(0, room) if params.max_tokens is None else params.max_tokens
        drawn = params.seed if params.seed is not None else secrets.randbits(63)
        params = replace(params, seed=choice_seed(drawn, request.choice), max_tokens=max_new, n=1, stop=())
        entry = self._ledger.admit(
            request.prompt_token_ids, params, max_new_tokens=max_new, cache_salt=request.cache_salt
        )
        if len(self._ledger) == 1:
            self._last_progress = time.monotonic()
        stream = self._streams[entry.request_id] = _Stream(entry)
        try:
            self._server.send(self._mesh.groups[entry.group][0], _submit(entry))
        except TransportOverloaded as error:
            self._forget(entry.request_id)
            raise Overloaded(f"the mesh takes no more requests now: {error}") from error
        return stream

    # --- reports of the ranks

    async def run(self) -> None:
        """Serve the control plane until cancelled."""
        while True:
            _, message = await self._server.receive()
            self._handle(message)

    def _handle(self, message: messages.Message) -> None:
        match message:
            case messages.Outputs(items=items):
                self._last_progress = time.monotonic()
                for item in items:
                    self._deliver(item)
            case messages.Stats(rank=rank, counters=counters, expert_load=expert_load):
                self.view.note_expert_load(expert_load)
                if self.view.note_steps(rank, counters.get("steps", 0.0)):
                    self._last_progress = time.monotonic()
                self._metrics.ranks.update(rank, counters)
            case messages.Hello(rank=rank):
                self.view.note_hello(message)
                self._start(rank)
            case messages.Progress(rank=rank, stage=stage, done=done, total=total):
                self.view.note_progress(rank, stage, done, total)
            case messages.Ready(rank=rank, num_blocks=num_blocks):
                self.view.note_ready(rank, num_blocks)
                self._metrics.set_rank_up(rank, True)
                self._metrics.epoch.set(self.view.epoch)
                self._notify()
            case messages.Failed(rank=rank, error=error):
                self.view.note_failed(rank)
                self._metrics.set_rank_up(rank, False)
                self._metrics.epoch.set(self.view.epoch)
                self.fail(f"rank {rank}: {error}")
            case _:
                logger.warning("a rank sent a %s, which only the frontend sends", type(message).__name__)

    def _start(self, rank: int) -> None:
        """Give a rank the plan it loads by, unless its arithmetic differs from the others'."""
        sets = self.view.instruction_sets()
        if len(set(sets.values())) > 1:
            self.fail(f"ranks differ in their instruction set ({sets}): tokens would depend on where they are computed")
            return
        self._server.send(rank, messages.Start(config=self._mesh.to_dict()))

    def _deliver(self, item: messages.OutputItem) -> None:
        entry, stream = self._ledger.get(item.request_id), self._streams.get(item.request_id)
        if entry is None or stream is None:
            return  # it was cancelled while its last tokens were under way
        if item.error is not None:
            stream.failure = InvalidRequest(item.error) if item.refused else EngineFailed(item.error)
        else:
            known = self._ledger.accept(item.request_id, item.position - len(entry.prompt), item.token_ids)
            stream.outputs.append(_token_output(item, known, entry))
        stream.arrived.set()

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
        await self._until(lambda: self.view.ready)
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
                await self._until(lambda: len(self._ledger) == 0)
        except TimeoutError:
            logger.warning("%d requests had not finished after %.0f s", len(self._ledger), timeout)
        left = len(self._ledger)
        if left:
            self.fail("shutting down")
        return left

    def stop_ranks(self) -> None:
        """Tell every rank to end."""
        for rank in self.view.known_ranks():
            with contextlib.suppress(TransportOverloaded):  # it has ended already
                self._server.send(rank, messages.Stop())

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds or the mesh has failed."""
        while not condition() and self._failure is None:
            await self._changed.wait()

    def _notify(self) -> None:
        """Let everybody who waits for something look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _affinity(mesh: MeshConfig) -> PrefixAffinity | None:
    """None where there is nothing to choose."""
    if len(mesh.groups) == 1 or not mesh.prefix_caching:
        return None
    return PrefixAffinity(
        len(mesh.groups), block_size=mesh.block_size, blocks_per_group=min(mesh.num_cache_blocks or 0, MAX_AFFINITY)
    )


def _submit(entry: LedgerEntry) -> messages.Submit:
    return messages.Submit(
        request_id=entry.request_id,
        prompt=list(entry.prompt),
        params=entry.params.to_wire(),
        cache_salt=entry.cache_salt,
    )


def _token_output(item: messages.OutputItem, known: int, entry: LedgerEntry) -> TokenOutput:
    logprobs = None if item.logprobs is None else [_logprob(wire) for wire in item.logprobs[known:]]
    token_ids = item.token_ids[known:]
    stopped = item.finish_reason == "stop" and bool(token_ids)
    return TokenOutput(
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=None
        if item.prompt_logprobs is None
        else [None if wire is None else _logprob(wire) for wire in item.prompt_logprobs],
        finish_reason=_FINISH_REASONS[item.finish_reason],
        stop_token=token_ids[-1] if stopped else None,
        cached_tokens=item.cached_tokens,
    )


def _logprob(wire: list[Any]) -> TokenLogprob:
    token_id, logprob, rank, top_ids, top_logprobs = wire
    return TokenLogprob(
        token_id=token_id, logprob=logprob, rank=rank, top_ids=tuple(top_ids), top_logprobs=tuple(top_logprobs)
    )
