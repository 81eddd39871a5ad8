"""The fields of every request: what is taken, what is known but not supported, and what each may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from moemesh.gateway.errors import ApiError
from moemesh.gateway.json_schema import Schema, shown, validated
from moemesh.gateway.options import GatewayLimits
from moemesh.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, MAX_TOKEN_ID, MAX_TOKENS, SEED_RANGE

_BOOLEAN: Schema = {"type": "boolean"}
_TEXT: Schema = {"type": "string"}
_TOKEN_ID: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
_TOKEN_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_TOKENS}
_CACHE_SALT: Schema = {"type": "string", "minLength": 1, "maxLength": 256}
_PROMPT_TEXT: Schema = {"type": "string", "minLength": 1}
_PROMPT: Schema = {
    "anyOf": [
        _PROMPT_TEXT,
        {"type": "array", "items": _PROMPT_TEXT, "minItems": 1},
        {"type": "array", "items": _TOKEN_ID, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": _TOKEN_ID, "minItems": 1}, "minItems": 1},
    ]
}
_CONTENT_PART: Schema = {
    "type": "object",
    "properties": {"type": {"type": "string"}, "text": _TEXT},
    "required": ["type"],
    "additionalProperties": True,
}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _CONTENT_PART, "minItems": 1}]},
        "name": _TEXT,
        "reasoning_content": _TEXT,
    },
    "required": ["role", "content"],
    # Clients send back an assistant's message as they got it, with fields that are null or empty.
    "additionalProperties": True,
}
# Neutral values: what a client that does not use the feature may still send. None (null) is always one.
Unsupported = Mapping[str, tuple[Any, ...]]

_UNSUPPORTED_SAMPLING: Final[Unsupported] = {
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "detokenize": (True,),
    "priority": (0,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "logits_processors": ([],),
    "kv_transfer_params": (),
    "vllm_xargs": (),
}
_UNSUPPORTED_COMPLETION: Final[Unsupported] = {**_UNSUPPORTED_SAMPLING, "suffix": ("",), "prompt_embeds": ()}
_UNSUPPORTED_CHAT: Final[Unsupported] = {
    **_UNSUPPORTED_SAMPLING,
    "best_of": (1,),
    "chat_template": (),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "include_reasoning": (True,),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "metadata": ({},),
    "prompt_cache_key": (),
    "safety_identifier": (),
    "documents": ([],),
    "echo": (False,),
    "mm_processor_kwargs": (),
}


@dataclass(frozen=True, kw_only=True)
class RequestSchema:
    """One endpoint's request. `unchecked` fields are checked by their reader: token ids by the hundred thousand."""

    schema: Schema
    unsupported: Unsupported = field(default_factory=dict)
    unchecked: frozenset[str] = frozenset()

    def read(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The checked fields of a request; one that is null is left out, which says the same."""
        given = {name: value for name, value in body.items() if value is not None}
        for name in [name for name in given if name in self.unsupported]:
            value = given.pop(name)
            if not any(value == neutral for neutral in self.unsupported[name]):
                raise ApiError(
                    HTTPStatus.BAD_REQUEST,
                    f"{name} is not supported by this server (got {shown(value)}): leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
        fields: dict[str, Any] = validated(given, self.schema, "", skip=self.unchecked)
        return fields


def completion_request(limits: GatewayLimits) -> RequestSchema:
    """POST /v1/completions."""
    properties = _sampling_properties(limits) | {
        "prompt": _PROMPT,
        "echo": _BOOLEAN,
        "best_of": {"type": "integer", "minimum": 1, "maximum": limits.max_n},
        "logprobs": {"type": "integer", "minimum": 0, "maximum": limits.max_logprobs},
    }
    schema = _object(properties, required=("prompt",))
    return RequestSchema(schema=schema, unsupported=_UNSUPPORTED_COMPLETION, unchecked=frozenset({"prompt"}))


def chat_request(limits: GatewayLimits) -> RequestSchema:
    """POST /v1/chat/completions."""
    properties = _sampling_properties(limits) | _chat_properties(limits)
    properties |= {
        "max_completion_tokens": _TOKEN_COUNT,
        "logprobs": _BOOLEAN,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": limits.max_logprobs},
    }
    return RequestSchema(schema=_object(properties, required=("messages",)), unsupported=_UNSUPPORTED_CHAT)


def tokenize_request(limits: GatewayLimits) -> RequestSchema:
    """POST /tokenize: a prompt or messages."""
    properties = _chat_properties(limits) | {
        "model": _TEXT,
        "prompt": _TEXT,
        "add_special_tokens": _BOOLEAN,
        "return_token_strs": _BOOLEAN,
    }
    return RequestSchema(schema=_object(properties), unsupported={"chat_template": (), "tools": ([],)})


def detokenize_request() -> RequestSchema:
    """POST /detokenize."""
    properties = {"model": _TEXT, "tokens": {"type": "array", "items": _TOKEN_ID}}
    return RequestSchema(schema=_object(properties, required=("tokens",)), unchecked=frozenset({"tokens"}))


def _object(properties: Mapping[str, Schema], *, required: tuple[str, ...] = ()) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def _chat_properties(limits: GatewayLimits) -> dict[str, Schema]:
    return {
        "messages": {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": limits.max_messages},
        "add_generation_prompt": _BOOLEAN,
        "continue_final_message": _BOOLEAN,
        "chat_template_kwargs": {"type": "object", "additionalProperties": True},
    }


def _sampling_properties(limits: GatewayLimits) -> dict[str, Schema]:
    stop = {"type": "string", "minLength": 1, "maxLength": limits.max_stop_length}
    penalty = {"type": "number", "minimum": -2, "maximum": 2}
    return {
        "model": _TEXT,
        "max_tokens": _TOKEN_COUNT,
        "min_tokens": _TOKEN_COUNT,
        "n": {"type": "integer", "minimum": 1, "maximum": limits.max_n},
        "temperature": {"type": "number", "minimum": 0},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": "integer", "minimum": -1, "maximum": MAX_TOKEN_ID},
        "min_p": {"type": "number", "minimum": 0, "maximum": 1},
        "seed": {"type": "integer", "minimum": SEED_RANGE[0], "maximum": SEED_RANGE[1]},
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
        "logit_bias": {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        },
        "stop": {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": limits.max_stop_strings}]},
        "stop_token_ids": {"type": "array", "items": _TOKEN_ID, "maxItems": MAX_STOP_TOKEN_IDS},
        "ignore_eos": _BOOLEAN,
        "include_stop_str_in_output": _BOOLEAN,
        "skip_special_tokens": _BOOLEAN,
        "add_special_tokens": _BOOLEAN,
        "prompt_logprobs": {"type": "integer", "minimum": 0, "maximum": limits.max_logprobs},
        "return_token_ids": _BOOLEAN,
        "return_tokens_as_token_ids": _BOOLEAN,
        "stream": _BOOLEAN,
        "stream_options": {
            "type": "object",
            "properties": {
                "include_usage": _BOOLEAN,
                "continuous_usage_stats": _BOOLEAN,
                # Padding against guessing texts from the sizes of encrypted packets, which is OpenAI's business.
                "include_obfuscation": {"type": "boolean", "enum": [False]},
            },
            "additionalProperties": False,
        },
        "user": _TEXT,
        "cache_salt": _CACHE_SALT,
        "request_id": {"type": "string", "minLength": 1, "maxLength": 128},
    }
