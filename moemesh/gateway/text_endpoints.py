"""/tokenize, /detokenize and /tokenizer_info: the tokenizer as vLLM offers it, and lm-eval looks for it."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import web

from moemesh.gateway.errors import ApiError, bad_request
from moemesh.gateway.json_schema import shown
from moemesh.gateway.prompts import is_id_list
from moemesh.gateway.request_schemas import detokenize_request, tokenize_request
from moemesh.gateway.sampling_fields import check_token_ids
from moemesh.gateway.service import GATEWAY, Gateway


async def tokenize(request: web.Request) -> web.Response:
    """The ids of a prompt or of a conversation."""
    gateway = request.app[GATEWAY]
    fields = await gateway.read(request, tokenize_request(gateway.options.limits))
    if ("prompt" in fields) == ("messages" in fields):
        raise bad_request("send either prompt or messages", "prompt")
    token_ids = await gateway.offload(_token_ids, gateway, fields)
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": gateway.engine.max_model_len,
        "tokens": token_ids,
    }
    if fields.get("return_token_strs"):
        tokenizer = gateway.prompts.require_tokenizer("prompt")
        answer["token_strs"] = [tokenizer.token_piece(token_id) for token_id in token_ids]
    return web.json_response(answer)


def _token_ids(gateway: Gateway, fields: Mapping[str, Any]) -> list[int]:
    if "messages" in fields:
        return list(gateway.prompts.chat_prompt(fields, gateway.options.chat_template_kwargs).token_ids)
    tokenizer = gateway.prompts.require_tokenizer("prompt")
    return tokenizer.encode(fields["prompt"], add_special_tokens=fields.get("add_special_tokens", True))


async def detokenize(request: web.Request) -> web.Response:
    """The text of ids."""
    gateway = request.app[GATEWAY]
    fields = await gateway.read(request, detokenize_request())
    text = await gateway.offload(_text_of, gateway, fields["tokens"])
    return web.json_response({"prompt": text})


def _text_of(gateway: Gateway, token_ids: object) -> str:
    tokenizer = gateway.prompts.require_tokenizer("tokens")
    if token_ids == []:
        return ""
    if not is_id_list(token_ids):
        raise bad_request(f"tokens must be a list of token ids, not {shown(token_ids)}", "tokens")
    assert isinstance(token_ids, list)
    check_token_ids(token_ids, gateway.engine.model_config.vocab_size, "tokens")
    return tokenizer.decode(token_ids)


async def tokenizer_info(request: web.Request) -> web.Response:
    """tokenizer_config.json, with special tokens as plain texts and the chat template in force."""
    gateway = request.app[GATEWAY]
    if gateway.tokenizer is None:
        raise ApiError(HTTPStatus.NOT_FOUND, "this model has no tokenizer.json", code="no_tokenizer")
    info = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(gateway.tokenizer.config)
    info |= gateway.tokenizer.special_tokens
    info["chat_template"] = gateway.template.source if gateway.template else None
    return web.json_response(info)
