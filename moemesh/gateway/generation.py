"""What completions and chat share: from checked fields to choices, and from pieces to one answer or a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web

from moemesh.detokenizer import compile_stops
from moemesh.gateway.choices import Choice, Piece, TextRules, generate_choice, joined
from moemesh.gateway.errors import bad_request, is_expected, to_api_error
from moemesh.gateway.event_stream import EventStream
from moemesh.gateway.piece_queue import PieceQueue, run_choices
from moemesh.gateway.prompts import Prompt
from moemesh.gateway.sampling_fields import sampling_params
from moemesh.gateway.service import Gateway

_log = logging.getLogger(__name__)
# Fewer tokens are written out in less time than a thread takes to wake up.
_INLINE_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class AnswerHead:
    """What every chunk of an answer repeats."""

    id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


UsageFields = Mapping[str, int | Mapping[str, int]]


class AnswerFormat(Protocol):
    """How pieces are written for clients."""

    def chunks(self, piece: Piece, *, first: bool) -> list[dict[str, Any]]:
        """The events for a piece; `first` where it is the first of its choice."""
        ...

    def usage_chunk(self, usage: UsageFields) -> dict[str, Any]: ...

    def body(self, pieces: Sequence[Piece], usage: UsageFields) -> dict[str, Any]:
        """The whole answer, from one joined piece per choice, in order."""
        ...


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Whether and how to stream."""

    stream: bool
    usage_at_end: bool
    usage_always: bool


def answer_head(prefix: str, fields: Mapping[str, Any], model: str) -> AnswerHead:
    name = fields.get("request_id") or uuid.uuid4().hex
    return AnswerHead(id=f"{prefix}-{name}", created=int(time.time()), model=model)


def stream_options(fields: Mapping[str, Any]) -> StreamOptions:
    """ApiError 400 for options without a stream, or prompt_logprobs with one."""
    stream = fields.get("stream", False)
    options = fields.get("stream_options", {})
    if options and not stream:
        raise bad_request("stream_options is only allowed when stream is true", "stream_options")
    if stream and "prompt_logprobs" in fields:
        raise bad_request("prompt_logprobs is not available when stream is true", "prompt_logprobs")
    usage = options.get("include_usage", False)
    return StreamOptions(
        stream=stream, usage_at_end=usage, usage_always=usage and options.get("continuous_usage_stats", False)
    )


def make_choices(
    gateway: Gateway,
    fields: Mapping[str, Any],
    prompts: Sequence[tuple[Prompt, int]],
    *,
    request_id: str,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> list[Choice]:
    """n choices of each (prompt, max_tokens), numbered through. Everything is checked before the first one starts."""
    count = fields.get("n", 1)
    most = gateway.options.limits.max_choices
    if len(prompts) * count > most:
        raise bad_request(
            f"{len(prompts)} prompts times n={count} are {len(prompts) * count} choices, at most {most} are allowed",
            "n",
        )
    stop = fields.get("stop", ())
    if stop and gateway.tokenizer is None:
        raise bad_request("stop needs a tokenizer, which this model lacks: use stop_token_ids", "stop")
    rules = TextRules(
        tokenizer=gateway.tokenizer,
        stops=compile_stops((stop,) if isinstance(stop, str) else stop),
        include_stop=fields.get("include_stop_str_in_output", False),
        skip_special_tokens=fields.get("skip_special_tokens", True),
    )
    choices: list[Choice] = []
    for prompt, max_tokens in prompts:
        params = sampling_params(
            fields,
            defaults=gateway.options.sampling_defaults,
            vocab_size=gateway.engine.model_config.vocab_size,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        for number in range(count):
            choices.append(
                Choice(
                    index=len(choices),
                    number=number,
                    prompt=prompt,
                    params=params,
                    rules=rules,
                    request_id=request_id,
                    cache_salt=fields.get("cache_salt", ""),
                )
            )
    return choices


async def answer(
    request: web.Request,
    gateway: Gateway,
    choices: Sequence[Choice],
    form: AnswerFormat,
    options: StreamOptions,
) -> web.StreamResponse:
    """Runs the choices and writes what they give, whole or as events."""
    gateway.require_serving()
    usage = Usage(choices)
    gateway.metrics.prompt_tokens.inc(usage.prompt_tokens)
    runs = [generate_choice(gateway.engine, choice, gateway.metrics) for choice in choices]
    response: web.StreamResponse
    with gateway.open_choices(len(choices)):
        async with run_choices(runs) as pieces:
            if options.stream:
                chunks = _Chunks(form, usage, options, gateway)
                response = await _answer_in_events(request, gateway, pieces, chunks)
            else:
                response = await _answer_at_once(gateway, pieces, form, usage)
    return response


class Usage:
    """Token counts of one answer."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        # A prompt is computed for each of its choices but counts once, as in OpenAI's bill.
        billed = [choice for choice in choices if choice.number == 0]
        self.prompt_tokens = sum(len(choice.prompt.token_ids) for choice in billed)
        self._billed = {choice.index for choice in billed}
        self._cached_tokens = 0
        self._completion_tokens = 0

    def count(self, piece: Piece) -> None:
        self._completion_tokens += len(piece.token_ids)
        if piece.index in self._billed:
            self._cached_tokens += piece.cached_tokens

    def fields(self) -> UsageFields:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self.prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


async def _answer_at_once(gateway: Gateway, pieces: PieceQueue, form: AnswerFormat, usage: Usage) -> web.Response:
    by_choice: dict[int, list[Piece]] = {}
    while batch := await pieces.next_pieces():
        for piece in batch:
            usage.count(piece)
            by_choice.setdefault(piece.index, []).append(piece)

    def written() -> bytes:
        body = form.body([joined(by_choice[index]) for index in sorted(by_choice)], usage.fields())
        return json.dumps(body, separators=(",", ":")).encode()

    size = sum(_size(piece) for parts in by_choice.values() for piece in parts)
    data = written() if size <= _INLINE_TOKENS else await gateway.offload(written)
    return web.Response(body=data, content_type="application/json")


def _size(piece: Piece) -> int:
    return len(piece.token_ids) + len(piece.prompt_logprobs)


class _Chunks:
    """Pieces to events, with the usage where it is wanted."""

    def __init__(self, form: AnswerFormat, usage: Usage, options: StreamOptions, gateway: Gateway) -> None:
        self._form = form
        self._usage = usage
        self._options = options
        self._gateway = gateway
        self._seen: set[int] = set()

    async def of(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        if sum(map(_size, pieces)) <= _INLINE_TOKENS:
            return self._of(pieces)
        return await self._gateway.offload(self._of, pieces)

    def last(self) -> list[dict[str, Any]]:
        return [self._form.usage_chunk(self._usage.fields())] if self._options.usage_at_end else []

    def _of(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        events = []
        for piece in pieces:
            self._usage.count(piece)
            first = piece.index not in self._seen
            self._seen.add(piece.index)
            for event in self._form.chunks(piece, first=first):
                if self._options.usage_at_end:
                    event["usage"] = self._usage.fields() if self._options.usage_always else None
                events.append(event)
        return events


async def _answer_in_events(
    request: web.Request, gateway: Gateway, pieces: PieceQueue, chunks: _Chunks
) -> web.StreamResponse:
    """Events as the pieces come. What fails before the first piece, and soon, is an ordinary error answer."""
    keep_alive_s = gateway.options.keep_alive_s
    batch = await pieces.next_pieces(min(keep_alive_s, gateway.options.headers_after_s))
    events = EventStream(request, client_timeout_s=gateway.options.client_timeout_s)
    await events.open()
    try:
        while batch is None or batch:
            if batch is None:
                await events.keep_alive()
            else:
                await events.send(await chunks.of(batch))
            batch = await pieces.next_pieces(keep_alive_s)
        await events.send(chunks.last())
        await events.finish()
    except ConnectionError:
        _log.debug("a client left its stream")
    except Exception as error:
        if not is_expected(error):
            _log.exception("a stream broke off")
        await _fail(events, error)
    return events.response


async def _fail(events: EventStream, error: Exception) -> None:
    try:
        await events.fail(to_api_error(error))
    except (ConnectionError, asyncio.IncompleteReadError):
        _log.debug("a client left before it could be told of an error")
