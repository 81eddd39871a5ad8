"""The engine of a rank: a loop over ready work. One thread; nothing in it waits for a peer.

    control messages -> frames that have arrived -> expert calls -> the step under way, or a new one -> outputs

Expert calls come before the rank's own step: they never wait for anybody, hence there is no deadlock.
"""

import logging
import time
from typing import Protocol

import kernels
from experts import ExpertClient, ExpertService, answer_frame
from gating import ExpertLoad
from mesh_config.model_config import ModelConfig
from moemesh.group_member import GroupMember
from moemesh.idle import IdleWait
from moemesh.sampling_params import SamplingParams
from moemesh.sequence import Sequence, SequenceOutput
from transport import messages
from transport.errors import ProtocolError
from transport.frame import Frame, Kind
from transport.links import Link
from transport.mailbox import Mailbox

STATS_SECONDS = 0.5

logger = logging.getLogger(__name__)


class ControlPort(Protocol):
    """A rank's end of the control plane; `ControlClient` is the real one."""

    def send(self, message: messages.Message) -> None: ...

    def receive_all(self) -> list[messages.Message]: ...

    def wait(self, timeout_s: float) -> bool: ...


class RankLost(Exception):
    """A peer is gone, and with it what this mesh needs to serve."""


class RankEngine:
    """Everything one rank does between Ready and Stop."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        link: Link,
        mailbox: Mailbox,
        control: ControlPort,
        experts: ExpertService,
        client: ExpertClient | None,
        load: ExpertLoad,
        member: GroupMember | None,
        idle: IdleWait,
    ) -> None:
        self._config = config
        self._link = link
        self._mailbox = mailbox
        self._control = control
        self._experts = experts
        self._client = client
        self._load = load
        self._member = member
        self._idle = idle
        self._stopping = False
        self._next_stats = 0.0
        self._busy_seconds = 0.0
        self._reported: dict[str, float] = {}

    def run(self) -> None:
        """Serve until told to stop. Raises RankLost, or whatever went wrong."""
        while not self._stopping:
            began = time.perf_counter()
            if self.turn():
                self._busy_seconds += time.perf_counter() - began
                self._idle.worked()
            else:
                self._idle.wait(self._longest_wait(), arriving=self._link.arriving())
                if self._member is not None:
                    self._member.waited(time.perf_counter() - began)
            now = time.monotonic()
            self._link.tick(now)
            self._send_stats(now)

    def _longest_wait(self) -> float:
        longest = max(0.0, self._next_stats - time.monotonic())
        held_for = self._experts.held_for()
        return longest if held_for is None else min(longest, held_for)

    def turn(self) -> bool:
        """One turn of the loop; whether there was anything to do."""
        busy = self._read_control()
        if self._link.num_ranks > 1:
            busy |= self._read_frames()
        busy |= self._answer_experts()
        if self._member is not None:
            busy |= self._member.turn()
            self._send_outputs(self._member.take_outputs())
        return busy

    def leftovers(self) -> dict[str, int]:
        """What this rank holds for requests; all zero when there are none."""
        held = {"frames": self._mailbox.num_waiting, "expert_calls": int(self._experts.pending)}
        if self._member is not None:
            held["sequences"] = self._member.num_sequences
            if self._member.scheduler is not None:
                held["blocks"] = self._member.scheduler.stats().num_blocks_used
        return held

    def _read_control(self) -> bool:
        received = self._control.receive_all()
        for message in received:
            match message:
                case messages.Submit():
                    self._submit(message)
                case messages.Cancel(request_id=request_id):
                    self._require_member().cancel(request_id)
                case messages.Stop():
                    self._stopping = True
                case _:
                    logger.warning(
                        "the frontend sent a %s, which a serving rank does not expect", type(message).__name__
                    )
        return bool(received)

    def _submit(self, message: messages.Submit) -> None:
        params = SamplingParams.from_wire(message.params)
        sequence = Sequence(
            seq_id=message.request_id,
            prompt_ids=tuple(message.prompt),
            params=params,
            seed=params.seed or 0,
            eos_ids=frozenset(self._config.eos_token_ids),
            output_ids=list(message.generated),
            cache_salt=message.cache_salt,
        )
        try:
            self._require_member().submit(sequence)
        except ValueError as error:
            refusal = messages.OutputItem(
                request_id=message.request_id, position=0, token_ids=[], error=str(error), refused=True
            )
            self._control.send(messages.Outputs(rank=self._link.rank, items=[refusal]))

    def _require_member(self) -> GroupMember:
        if self._member is None:
            raise ProtocolError(f"rank {self._link.rank} has no attention and was sent a request")
        return self._member

    def _read_frames(self) -> bool:
        frames = self._link.poll()
        for frame in frames:
            self._route(frame)
        lost = self._link.take_lost()
        if lost:
            raise RankLost(f"rank {lost[0]} is gone")
        return bool(frames)

    def _route(self, frame: Frame) -> None:
        match frame.header.kind:
            case Kind.DISPATCH:
                refusal = self._experts.submit(frame)
                if refusal is not None:
                    self._link.post(frame.header.sender, refusal)
            case Kind.PLAN:
                self._require_member().receive_plan(frame)
            case Kind.NOT_HERE:
                header = frame.header
                raise ProtocolError(f"rank {header.sender} does not host what it was asked for in layer {header.layer}")
            case _:
                self._mailbox.deliver(frame)

    def _answer_experts(self) -> bool:
        answers = self._experts.step()
        if answers is None:
            return False
        for call, answer in answers:
            self._link.post(call.sender, answer_frame(call, answer, self._link.rank))
        return True

    def _send_outputs(self, outputs: list[SequenceOutput]) -> None:
        if outputs:
            items = [_output_item(output) for output in outputs]
            self._control.send(messages.Outputs(rank=self._link.rank, items=items))

    # --- counters

    def _send_stats(self, now: float) -> None:
        if now < self._next_stats:
            return
        self._next_stats = now + STATS_SECONDS
        counters = self.counters()
        load = self._load.take_changes()
        if counters != self._reported or load:
            self._reported = counters
            self._control.send(messages.Stats(rank=self._link.rank, counters=counters, expert_load=load))

    def counters(self) -> dict[str, float]:
        """What `Stats` reports: see RANK_COUNTERS and RANK_GAUGES in metrics."""
        stats = self._link.stats()
        counters: dict[str, float] = {f"frames_sent:{kind.name.lower()}": n for kind, n in stats.frames_sent.items()}
        counters["bytes_sent"] = stats.bytes_sent
        counters["busy_seconds"] = self._busy_seconds
        counters["kernel_seconds"] = kernels.native_seconds()
        for layer, tokens in self._experts.stats.tokens_by_layer.items():
            counters[f"dispatched_tokens:{layer}"] = tokens
        if self._client is not None:
            counters["dispatch_bytes"] = self._client.stats.bytes_sent
            counters["dispatch_seconds"] = self._client.stats.seconds
        if self._member is not None:
            counters["steps"] = self._member.num_steps
            if self._member.scheduler is not None:
                scheduler = self._member.scheduler.stats()
                counters["running"] = scheduler.num_running
                counters["waiting"] = scheduler.num_waiting
                counters["cache_blocks"] = scheduler.num_blocks
                counters["cache_blocks_used"] = scheduler.num_blocks_used
                counters["cache_usage"] = scheduler.num_blocks_used / scheduler.num_blocks
                counters["preemptions"] = scheduler.num_preemptions
                counters["prefix_cache_queries"] = scheduler.num_prefix_queries
                counters["prefix_cache_hits"] = scheduler.num_prefix_hits
        return counters


def _output_item(output: SequenceOutput) -> messages.OutputItem:
    sampled = output.sampled
    return messages.OutputItem(
        request_id=output.seq_id,
        position=output.position,
        token_ids=[] if sampled is None else [sampled.token_id],
        logprobs=None if sampled is None or sampled.logprob is None else [sampled.to_wire()],
        prompt_logprobs=None
        if output.prompt_logprobs is None
        else [None if entry is None else entry.to_wire() for entry in output.prompt_logprobs],
        finish_reason=output.finish_reason,
        error=output.error,
        cached_tokens=output.cached_tokens,
    )
