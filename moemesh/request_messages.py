"""A request on the wire: what a leader is told of it, and what comes back. Pure."""

from __future__ import annotations

from typing import Any

from moemesh.engine_client import FinishReason, TokenLogprob, TokenOutput
from moemesh.ledger import LedgerEntry
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


def token_output(item: messages.OutputItem, known: int) -> TokenOutput:
    """What a client gets of an output whose first `known` tokens it has already."""
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
