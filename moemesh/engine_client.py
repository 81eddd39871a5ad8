"""The seam between the HTTP gateway and whatever computes tokens: a mesh behind the controller, or a fake in a test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from moemesh.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mesh_config.model_config import ModelConfig

FinishReason = Literal["stop", "length"]
EngineState = Literal["loading", "ready", "draining", "failed"]


class RequestError(Exception):
    """A request that ends without its result. The message goes to the client: no paths, no reprs of internals."""


class InvalidRequest(RequestError):
    """The engine can never serve this request as it is (a prompt longer than the whole cache, for instance)."""


class Overloaded(RequestError):
    """The queue is full; the same request may succeed after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotReady(RequestError):
    """The engine takes no requests now: it is loading, draining or has failed."""

    def __init__(self, message: str, *, retry_after: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailed(RequestError):
    """The engine lost the request through a fault of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of the best ones at its position.

    `rank` is the token's place among all tokens, 1 = the best. `top_ids` and `top_logprobs` are equally long, best
    first, and hold as many entries as were asked for; the token itself need not be among them.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt and one choice of it. `choice` is its index in `params.n`, mixed into the seed.

    `request_id` is for logs and need not be unique. `params.max_tokens` None means up to the context length.
    Requests with different `cache_salt` share no cache: what one of them takes says nothing about the other's prompt.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    choice: int = 0
    request_id: str = ""
    cache_salt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOutput:
    """What came since the last output of a request, in order.

    - `logprobs`: one entry per token id where `params.logprobs` is not None, else None.
    - `prompt_logprobs`: where `params.prompt_logprobs` is not None, the next entries for the prompt in order, all of
      them before or together with the first token; the first position has None, for nothing precedes it.
    - `finish_reason` is set on the last output only. With `max_tokens` 0 that output has no token.
    - `stop_token`: the end-of-sequence id or stop_token_id that ended it. It is the last of `token_ids` too, with its
      log-probability.
    - `cached_tokens`: tokens of the prompt that came from the prefix cache; with the first token, 0 elsewhere.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    """`ready`: requests are taken and tokens move. `detail` says why not, or what a degraded mesh misses."""

    state: EngineState
    ready: bool
    detail: str = ""
    degraded: bool = False


class TokenStream(Protocol):
    """The outputs of one request; every async generator of TokenOutput is one."""

    def __aiter__(self) -> AsyncIterator[TokenOutput]: ...

    async def __anext__(self) -> TokenOutput: ...

    async def aclose(self) -> None:
        """Cancels the request, if it has not ended, and frees its cache. Closing twice is harmless."""
        ...


class EngineClient(Protocol):
    """Computes tokens. All methods are called on one asyncio event loop."""

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def max_model_len(self) -> int: ...

    def generate(self, request: GenerationRequest) -> TokenStream:
        """The outputs of the request; the caller closes the stream, early or not.

        Raises a RequestError from the first or any later step of the stream. End of sequence, stop_token_ids,
        max_tokens and min_tokens are the engine's; stop strings are the caller's, who closes the stream at one.
        """
        ...

    def status(self) -> EngineStatus: ...

    def mesh(self) -> dict[str, Any]:
        """The JSON of `/mesh`."""
        ...
