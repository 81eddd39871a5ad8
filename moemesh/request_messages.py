"""A request on the wire: what a leader is told of it, and what comes back. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moemesh.engine_client import FinishReason, TokenLogprob, TokenOutput
from moemesh.ledger import LedgerEntry
from moemesh.sampling_params import SamplingParams
from moemesh.sequence import Sequence, SequenceOutput
from transport import messages

_FINISH_REASONS: dict[str | None, FinishReason | None] = {None: None, "stop": "stop", "length": "length"}


def submit_message(entry: LedgerEntry) -> messages.Submit:
    """What a group needs to compute a request from where it is."""
    return messages.Submit(
        request_id=entry.request_id,
        prompt=list(entry.prompt),
        params=entry.params.to_wire(),
        generated=list(entry.tokens),
        cache_salt=entry.cache_salt,
    )


def submitted_sequence(message: messages.Submit, eos_ids: Iterable[int]) -> Sequence:
    """What a leader makes of it."""
    params = SamplingParams.from_wire(message.params)
    return Sequence(
        seq_id=message.request_id,
        prompt_ids=tuple(message.prompt),
        params=params,
        seed=params.seed or 0,
        eos_ids=frozenset(eos_ids),
        output_ids=list(message.generated),
        cache_salt=message.cache_salt,
    )


def output_item(output: SequenceOutput) -> messages.OutputItem:
    """What the frontend is told of what a step gave."""
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


def token_output(item: messages.OutputItem, known: int) -> TokenOutput:
    """What a client gets of an output whose first `known` tokens it has already, with what came beside them."""
    logprobs = None if item.logprobs is None else [_logprob(wire) for wire in item.logprobs[known:]]
    token_ids = item.token_ids[known:]
    stopped = item.finish_reason == "stop" and bool(token_ids)
    return TokenOutput(
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=None
        if item.prompt_logprobs is None or known
        else [None if wire is None else _logprob(wire) for wire in item.prompt_logprobs],
        finish_reason=_FINISH_REASONS[item.finish_reason],
        stop_token=token_ids[-1] if stopped else None,
        cached_tokens=0 if known else item.cached_tokens,
    )


def _logprob(wire: list[Any]) -> TokenLogprob:
    token_id, logprob, rank, top_ids, top_logprobs = wire
    return TokenLogprob(
        token_id=token_id, logprob=logprob, rank=rank, top_ids=tuple(top_ids), top_logprobs=tuple(top_logprobs)
    )
