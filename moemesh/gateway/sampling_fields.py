"""The sampling parameters of a checked request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moemesh.gateway.errors import bad_request
from moemesh.gateway.json_schema import shown
from moemesh.gateway.options import SamplingDefaults
from moemesh.sampling_params import MAX_LOGIT_BIAS, SamplingParams

_SAME_NAME = (
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
)


def sampling_params(
    fields: Mapping[str, Any],
    *,
    defaults: SamplingDefaults,
    vocab_size: int,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """What to ask of the engine. SamplingParamsError or ApiError 400 for what cannot be honoured."""
    values = defaults.given() | {name: fields[name] for name in _SAME_NAME if name in fields}
    values["logit_bias"] = _logit_bias(fields.get("logit_bias"), vocab_size)
    stop = fields.get("stop", ())
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    params = SamplingParams(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **values)
    check_token_ids(params.stop_token_ids, vocab_size, "stop_token_ids")
    return params


def check_token_ids(token_ids: tuple[int, ...] | list[int], vocab_size: int, param: str) -> None:
    """ApiError 400 naming the first id that the model has no embedding for."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise bad_request(
            f"{param}: token id {shown(wrong)} is out of range: the model's vocabulary has {vocab_size} tokens "
            f"(ids 0 to {vocab_size - 1})",
            param,
        )


def _logit_bias(given: Mapping[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not given:
        return None
    if len(given) > MAX_LOGIT_BIAS:
        raise bad_request(f"logit_bias has {len(given)} entries, at most {MAX_LOGIT_BIAS} are allowed", "logit_bias")
    bias: dict[int, float] = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise bad_request(f"logit_bias: {shown(name)} is not a token id", "logit_bias")
        bias[int(name)] = float(value)
    check_token_ids(list(bias), vocab_size, "logit_bias")
    return bias
