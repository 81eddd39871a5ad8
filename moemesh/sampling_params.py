"""What a client may ask of sampling: names and defaults as vLLM has them, validated once, at construction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_TOKEN_ID = 2**31 - 1
MAX_TOKENS = 2**31 - 1
SEED_RANGE = (-(2**63), 2**63 - 1)

# Below it a temperature is greedy: logits divided by less would overflow float32.
GREEDY_TEMPERATURE = 1e-5


class SamplingParamsError(ValueError):
    """A sampling parameter that cannot be honoured; `param` names the field."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. A value out of range, of the wrong type or NaN is a SamplingParamsError (a ValueError).

    - `max_tokens`: None = as many as the context holds; 0 = only score the prompt.
    - `temperature`: below 1e-5 = greedy. `top_k`: 0 or -1 = all tokens.
    - `seed`: None = drawn at admission; choice i of `n` uses hash(seed, i).
    - `logprobs` / `prompt_logprobs`: how many best tokens to report beside the token itself; None = no
      log-probabilities at all.
    - `stop` strings end a text without being part of it; `stop_token_ids` do so for ids, beside the model's
      end-of-sequence ids, which alone `ignore_eos` switches off. Neither can end a text before `min_tokens`.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._normalise()
        _check_int("n", self.n, 1, MAX_CHOICES)
        _check_optional_int("max_tokens", self.max_tokens, 0, MAX_TOKENS)
        _check_int("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        _check_int("top_k", self.top_k, -1, MAX_TOKEN_ID)
        _check_optional_int("seed", self.seed, *SEED_RANGE)
        _check_optional_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_optional_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, math.inf, low_open=True)
        if not isinstance(self.ignore_eos, bool):
            raise SamplingParamsError("ignore_eos", f"ignore_eos must be true or false, not {_shown(self.ignore_eos)}")
        self._check_stops()
        self._check_bias()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(
                "min_tokens", f"min_tokens ({self.min_tokens}) must not be larger than max_tokens ({self.max_tokens})"
            )

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, without a draw."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def penalises(self) -> bool:
        """Whether tokens that were there before are worth less, or more."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    def _normalise(self) -> None:
        """Lists become tuples and one stop string a tuple of one, so that the value cannot change later."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, ())
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    def _check_stops(self) -> None:
        _check_sequence("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise SamplingParamsError("stop", f"stop must be non-empty strings, not {_shown(text)}")
            if len(text) > MAX_STOP_LENGTH:
                raise SamplingParamsError(
                    "stop", f"a stop string has {len(text)} characters, at most {MAX_STOP_LENGTH} are allowed"
                )
        _check_sequence("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, MAX_TOKEN_ID)

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise SamplingParamsError(
                "logit_bias", f"logit_bias must map token ids to numbers, not {_shown(self.logit_bias)}"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise SamplingParamsError(
                "logit_bias", f"logit_bias has {len(self.logit_bias)} entries, at most {MAX_LOGIT_BIAS} are allowed"
            )
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, MAX_TOKEN_ID)
            _check_float("logit_bias", bias, -100.0, 100.0)

    def to_wire(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, as plain values for msgpack, whose maps have text keys."""
        wire: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name == "logit_bias":
                value = [[token_id, float(bias)] for token_id, bias in value.items()]
            elif isinstance(value, tuple):
                value = list(value)
            wire[field.name] = value
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> SamplingParams:
        """The inverse of to_wire, as strict as the constructor; an unknown name is a SamplingParamsError."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in wire:
            if name not in known:
                raise SamplingParamsError(str(name), f"unknown sampling parameter {_shown(name)}")
        values = dict(wire)
        if values.get("logit_bias") is not None:
            values["logit_bias"] = _bias_from_pairs(values["logit_bias"])
        return cls(**values)


def _bias_from_pairs(pairs: object) -> dict[int, float]:
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise SamplingParamsError("logit_bias", f"logit_bias must be [token id, bias] pairs, not {_shown(pairs)}")
    for token_id, _ in pairs:
        _check_int("logit_bias", token_id, 0, MAX_TOKEN_ID)
    return dict(pairs)


def _shown(value: object) -> str:
    """The value for an error message, cut: a client's megabyte must not come back in the error or fill the log."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_sequence(name: str, values: Sequence[object], most: int) -> None:
    if not isinstance(values, tuple):
        raise SamplingParamsError(name, f"{name} must be a list, not {_shown(values)}")
    if len(values) > most:
        raise SamplingParamsError(name, f"{name} has {len(values)} entries, at most {most} are allowed")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise SamplingParamsError(name, f"{name} must be an integer, not {_shown(value)}")
    if not low <= value <= high:
        raise SamplingParamsError(name, f"{name} must be between {low} and {high}, not {_shown(value)}")


def _check_optional_int(name: str, value: object, low: int, high: int) -> None:
    if value is not None:
        _check_int(name, value, low, high)


def _check_float(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SamplingParamsError(name, f"{name} must be a number, not {_shown(value)}")
    # An integer too large for a float counts as infinite; NaN fails every comparison, hence `not (...)`.
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise SamplingParamsError(name, f"{name} must be a finite number, not {_shown(value)}")
    if number < low or number > high or (low_open and number == low):
        above = "above" if low_open else "at least"
        interval = f"{above} {low:g}" + ("" if math.isinf(high) else f" and at most {high:g}")
        raise SamplingParamsError(name, f"{name} must be {interval}, not {_shown(value)}")
