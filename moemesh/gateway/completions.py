"""POST /v1/completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from moemesh.engine_client import TokenLogprob
from moemesh.gateway.choices import Choice, Piece
from moemesh.gateway.errors import bad_request
from moemesh.gateway.generation import AnswerHead, UsageFields, answer, answer_head, make_choices, stream_options
from moemesh.gateway.logprob_format import TokenNames, legacy_logprobs, prompt_logprobs
from moemesh.gateway.prompts import Prompt, max_tokens_for
from moemesh.gateway.request_schemas import completion_request
from moemesh.gateway.service import GATEWAY, Gateway

_DEFAULT_MAX_TOKENS = 16


async def completions(request: web.Request) -> web.StreamResponse:
    """Continues each prompt n times; with `echo` and `max_tokens` 0 it only scores them."""
    gateway = request.app[GATEWAY]
    fields = await gateway.read(request, completion_request(gateway.options.limits))
    _check(fields)
    options = stream_options(fields)
    gateway.require_serving()
    prompts = await gateway.offload(_read_prompts, gateway, fields)
    head = answer_head("cmpl", fields, gateway.model_name(fields))
    logprobs = fields.get("logprobs")
    wanted = [fields.get("prompt_logprobs"), logprobs if fields.get("echo") else None]
    choices = make_choices(
        gateway,
        fields,
        prompts,
        request_id=head.id,
        logprobs=logprobs,
        prompt_logprobs=max((number for number in wanted if number is not None), default=None),
    )
    form = CompletionFormat(
        head=head,
        choices=choices,
        names=TokenNames(tokenizer=gateway.tokenizer, as_ids=fields.get("return_tokens_as_token_ids", False)),
        echo=fields.get("echo", False),
        logprobs=logprobs,
        prompt_logprobs=fields.get("prompt_logprobs"),
        return_token_ids=fields.get("return_token_ids", False),
    )
    return await answer(request, gateway, choices, form, options)


def _check(fields: Mapping[str, Any]) -> None:
    count = fields.get("n", 1)
    if fields.get("best_of", count) != count:
        raise bad_request(f"best_of ({fields['best_of']}) other than n ({count}) is not supported", "best_of")


def _read_prompts(gateway: Gateway, fields: Mapping[str, Any]) -> list[tuple[Prompt, int]]:
    """Each prompt with the number of tokens it may get."""
    reader = gateway.prompts
    found = []
    for prompt in reader.completion_prompts(
        fields["prompt"], add_special_tokens=fields.get("add_special_tokens", True)
    ):
        room = max_tokens_for(
            len(prompt.token_ids),
            fields.get("max_tokens"),
            _DEFAULT_MAX_TOKENS,
            max_model_len=reader.max_model_len,
            param="prompt",
        )
        if fields.get("echo"):
            prompt = reader.echoed(
                prompt,
                skip_special_tokens=fields.get("skip_special_tokens", True),
                with_offsets="logprobs" in fields,
            )
        found.append((prompt, room))
    return found


@dataclass(frozen=True, kw_only=True)
class CompletionFormat:
    """Pieces as OpenAI's `text_completion` objects, with vLLM's additions where they are asked for."""

    head: AnswerHead
    choices: Sequence[Choice]
    names: TokenNames
    echo: bool
    logprobs: int | None
    prompt_logprobs: int | None
    return_token_ids: bool

    def chunks(self, piece: Piece, *, first: bool) -> list[dict[str, Any]]:
        return [self.head.fields("text_completion") | {"choices": [self._choice(piece, first=first)]}]

    def usage_chunk(self, usage: UsageFields) -> dict[str, Any]:
        return self.head.fields("text_completion") | {"choices": [], "usage": dict(usage)}

    def body(self, pieces: Sequence[Piece], usage: UsageFields) -> dict[str, Any]:
        choices = [self._choice(piece, first=True) for piece in pieces]
        return self.head.fields("text_completion") | {"choices": choices, "usage": dict(usage)}

    def _choice(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        prompt = self.choices[piece.index].prompt
        written = {
            "index": piece.index,
            "text": (prompt.text or "") + piece.text if self.echo and first else piece.text,
            "logprobs": self._logprobs(piece, prompt, first=first),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.prompt_logprobs is not None and first:
            entries = [cut(entry, self.prompt_logprobs) for entry in piece.prompt_logprobs]
            written["prompt_logprobs"] = prompt_logprobs(entries, names=self.names)
        if self.return_token_ids:
            written["token_ids"] = list(piece.token_ids)
            written["prompt_token_ids"] = list(prompt.token_ids) if first else None
        return written

    def _logprobs(self, piece: Piece, prompt: Prompt, *, first: bool) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        base = len(prompt.text or "") if self.echo else 0
        token_ids, offsets = piece.token_ids, tuple(base + offset for offset in piece.offsets)
        entries: tuple[TokenLogprob | None, ...] = piece.logprobs
        if self.echo and first:
            token_ids = prompt.token_ids + token_ids
            offsets = prompt.offsets + offsets
            entries = piece.prompt_logprobs + entries
        return legacy_logprobs(token_ids, [cut(entry, self.logprobs) for entry in entries], offsets, names=self.names)


def cut(entry: TokenLogprob | None, count: int) -> TokenLogprob | None:
    """The entry with the best `count` tokens only: two fields of a request may want different numbers of them."""
    if entry is None or len(entry.top_ids) <= count:
        return entry
    return dataclasses.replace(entry, top_ids=entry.top_ids[:count], top_logprobs=entry.top_logprobs[:count])
