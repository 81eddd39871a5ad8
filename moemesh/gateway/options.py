"""What the gateway may be told at start. Validated once; nothing here changes afterwards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moemesh.sampling_params import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    SamplingParams,
    SamplingParamsError,
)


@dataclass(frozen=True, kw_only=True)
class GatewayLimits:
    """The most one request may ask for; checked before anything of that size is made."""

    max_n: int = MAX_CHOICES
    max_logprobs: int = MAX_LOGPROBS
    max_stop_strings: int = MAX_STOP_STRINGS
    max_stop_length: int = MAX_STOP_LENGTH
    max_prompts: int = 1024
    max_messages: int = 4096
    # Prompts times n: each is a request of its own to the engine.
    max_choices: int = 1024
    # Over all requests now open; beyond it a request gets 503 before its prompt is looked at.
    max_open_choices: int = 8192

    def __post_init__(self) -> None:
        for limit in dataclasses.fields(self):
            if getattr(self, limit.name) < 1:
                raise ValueError(f"{limit.name} must be at least 1, not {getattr(self, limit.name)}")
        hard = {
            "max_n": MAX_CHOICES,
            "max_logprobs": MAX_LOGPROBS,
            "max_stop_strings": MAX_STOP_STRINGS,
            "max_stop_length": MAX_STOP_LENGTH,
        }
        for name, most in hard.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}, at most {most} are supported")


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request that leaves a parameter out gets; None = the API's own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        SamplingParams(**self.given())

    def given(self) -> dict[str, Any]:
        """The parameters that have a default of their own."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None}


def load_sampling_defaults(folder: str | Path) -> SamplingDefaults:
    """The sampling parameters in a model folder's generation_config.json, as vLLM's `--generation-config auto` has it.

    No file, or none of these fields in it: the API's defaults. ValueError names a malformed file.
    """
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return SamplingDefaults()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(config).__name__}")
    names = [item.name for item in dataclasses.fields(SamplingDefaults)]
    try:
        return SamplingDefaults(**{name: config[name] for name in names if config.get(name) is not None})
    except SamplingParamsError as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """The first of `served_model_names` is the one in answers. With no `api_keys` everybody is served."""

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    version: str = "0"
    max_body_bytes: int = 32 * 1024 * 1024
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    # Variables for the chat template where a request's chat_template_kwargs does not set them.
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # A stream that has been silent for so long gets a comment, lest a proxy take it for dead.
    keep_alive_s: float = 15.0
    # What fails within so long of a stream's admission is an ordinary error answer; then its headers are sent.
    headers_after_s: float = 0.5
    # A client that takes nothing for so long, or does not finish sending its request, is let go.
    client_timeout_s: float = 120.0
    # Threads that tokenize, render templates and write long answers, off the event loop.
    worker_threads: int = 2

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ValueError("served_model_names must hold at least one name, and no empty one")
        if not all(self.api_keys):
            raise ValueError("an API key is empty: leave api_keys empty to serve everybody")
        for name in ("max_body_bytes", "keep_alive_s", "headers_after_s", "client_timeout_s", "worker_threads"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
