"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from moemesh.gateway.choices import Choice, Piece
from moemesh.gateway.errors import bad_request
from moemesh.gateway.generation import AnswerHead, UsageFields, answer, answer_head, make_choices, stream_options
from moemesh.gateway.logprob_format import TokenNames, chat_logprobs, prompt_logprobs
from moemesh.gateway.prompts import max_tokens_for
from moemesh.gateway.request_schemas import chat_request
from moemesh.gateway.service import GATEWAY

_ROLE = "assistant"


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answers a conversation n times, as the model's chat template puts it."""
    gateway = request.app[GATEWAY]
    fields = await gateway.read(request, chat_request(gateway.options.limits))
    options = stream_options(fields)
    logprobs = _wanted_logprobs(fields)
    gateway.require_serving()
    reader = gateway.prompts
    prompt = await gateway.offload(reader.chat_prompt, fields, gateway.options.chat_template_kwargs)
    asked = fields.get("max_completion_tokens", fields.get("max_tokens"))
    room = max_tokens_for(len(prompt.token_ids), asked, None, max_model_len=reader.max_model_len, param="messages")
    head = answer_head("chatcmpl", fields, gateway.model_name(fields))
    choices = make_choices(
        gateway,
        fields,
        [(prompt, room)],
        request_id=head.id,
        logprobs=logprobs,
        prompt_logprobs=fields.get("prompt_logprobs"),
    )
    form = ChatFormat(
        head=head,
        choices=choices,
        names=TokenNames(tokenizer=gateway.tokenizer, as_ids=fields.get("return_tokens_as_token_ids", False)),
        logprobs=logprobs is not None,
        prompt_logprobs="prompt_logprobs" in fields,
        return_token_ids=fields.get("return_token_ids", False),
    )
    return await answer(request, gateway, choices, form, options)


def _wanted_logprobs(fields: Mapping[str, Any]) -> int | None:
    if fields.get("logprobs", False):
        return int(fields.get("top_logprobs", 0))
    if fields.get("top_logprobs", 0):
        raise bad_request("top_logprobs is only allowed when logprobs is true", "top_logprobs")
    return None


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Pieces as OpenAI's `chat.completion` objects, with vLLM's additions where they are asked for."""

    head: AnswerHead
    choices: Sequence[Choice]
    names: TokenNames
    logprobs: bool
    prompt_logprobs: bool
    return_token_ids: bool

    def chunks(self, piece: Piece, *, first: bool) -> list[dict[str, Any]]:
        """The role before all else, then the text, then the reason of the end by itself."""
        events = []
        if first:
            role = self._chunk(piece, {"role": _ROLE, "content": ""})
            if self.return_token_ids:
                role["prompt_token_ids"] = list(self.choices[piece.index].prompt.token_ids)
            events.append(role)
        if piece.token_ids or piece.text:
            events.append(self._chunk(piece, {"content": piece.text}, with_tokens=True))
        if piece.finish_reason is not None:
            end = self._chunk(piece, {})
            end["choices"][0] |= {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
            events.append(end)
        return events

    def usage_chunk(self, usage: UsageFields) -> dict[str, Any]:
        return self.head.fields("chat.completion.chunk") | {"choices": [], "usage": dict(usage)}

    def body(self, pieces: Sequence[Piece], usage: UsageFields) -> dict[str, Any]:
        written = self.head.fields("chat.completion") | {
            "choices": [self._choice(piece) for piece in pieces],
            "usage": dict(usage),
        }
        if self.prompt_logprobs:
            written["prompt_logprobs"] = prompt_logprobs(pieces[0].prompt_logprobs, names=self.names)
        if self.return_token_ids:
            written["prompt_token_ids"] = list(self.choices[0].prompt.token_ids)
        return written

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index,
            "message": {"role": _ROLE, "content": piece.text, "refusal": None},
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        } | self._token_fields(piece)

    def _chunk(self, piece: Piece, delta: Mapping[str, str], *, with_tokens: bool = False) -> dict[str, Any]:
        choice = {"index": piece.index, "delta": dict(delta), "logprobs": None, "finish_reason": None}
        if with_tokens:
            choice |= self._token_fields(piece)
        return self.head.fields("chat.completion.chunk") | {"choices": [choice]}

    def _token_fields(self, piece: Piece) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "logprobs": chat_logprobs(piece.logprobs, names=self.names) if self.logprobs else None
        }
        if self.return_token_ids:
            fields["token_ids"] = list(piece.token_ids)
        return fields
