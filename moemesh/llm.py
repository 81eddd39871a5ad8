"""`LLM`: a mesh inside a Python program, without HTTP.

The same parts as behind `moemesh serve` (controller, control socket, ranks), driven from an event loop in a thread of
its own.
"""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from moemesh.controller import Controller
from moemesh.detokenizer import compile_stops
from moemesh.engine_client import FinishReason, TokenLogprob
from moemesh.frontend import show_loading
from moemesh.gateway.choices import Choice, Piece, TextRules, generate_choice, joined
from moemesh.gateway.options import load_sampling_defaults
from moemesh.gateway.prompts import Prompt
from moemesh.mesh import started_mesh
from moemesh.mesh_plan import plan_mesh
from moemesh.metrics import Metrics
from moemesh.options import OFFLINE_BATCHED_TOKENS, EngineOptions
from moemesh.sampling_params import SamplingParams
from moemesh.tokenizer import load_tokenizer

T = TypeVar("T")
PromptInput = str | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt. `logprobs`: one entry per token where they were asked for."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and its continuations; `prompt_logprobs` has None for the first token, which nothing precedes.

    `num_cached_tokens` of the prompt came from the prefix cache.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...]
    num_cached_tokens: int
    outputs: tuple[CompletionOutput, ...]


class LLM:
    """A mesh that serves this program. `options` are those of `moemesh serve` that concern the model and the mesh.

    Blocks until the mesh is ready. Use it as a context manager, or call `close`: ranks are processes. Raises
    ConfigError or CheckpointError for a model that cannot be served, EngineFailed when a rank cannot start.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        given = (
            {"max_num_batched_tokens": OFFLINE_BATCHED_TOKENS} | ({} if model is None else {"model": model}) | options
        )
        self._options = EngineOptions.from_mapping(given, source="LLM")
        self._plan = plan_mesh(self._options)
        self._tokenizer = load_tokenizer(self._options.model_folder)
        self._metrics = Metrics()
        self._cleanup = ExitStack()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="moemesh frontend", daemon=True)
        self._thread.start()
        self._cleanup.callback(self._end_loop)
        try:
            self._controller = self._start()
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: PromptInput | Sequence[PromptInput], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Continue prompts, all at once: texts or lists of token ids. Raises ValueError or a RequestError."""
        listed = [prompts] if _is_one_prompt(prompts) else list(prompts)
        params = self.default_sampling_params() if sampling_params is None else sampling_params
        encoded = [self._encode(prompt) for prompt in listed]  # type: ignore[arg-type]
        return self._run(self._generate_all(encoded, params))

    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json says, else vLLM's defaults."""
        if self._options.generation_config != "auto":
            return SamplingParams()
        return SamplingParams(**load_sampling_defaults(self._options.model_folder).given())

    def close(self) -> None:
        """End the ranks. Idempotent."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> Controller:
        stack = AsyncExitStack()
        mesh = started_mesh(self._options, self._plan, self._metrics)
        controller = self._run(stack.enter_async_context(mesh))
        self._cleanup.callback(lambda: self._run(stack.aclose()))
        self._run(show_loading(controller))
        return controller

    def _encode(self, prompt: PromptInput) -> Prompt:
        if not isinstance(prompt, str):
            token_ids = tuple(prompt)
        elif self._tokenizer is None:
            raise ValueError(f"{self._options.model} has no tokenizer.json: give token ids instead of text")
        else:
            token_ids = tuple(self._tokenizer.encode(prompt))
        if not token_ids:
            raise ValueError("a prompt is empty: at least one token is needed")
        vocab = self._plan.model.vocab_size
        outside = [token_id for token_id in token_ids if not 0 <= token_id < vocab]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of {vocab} tokens")
        return Prompt(token_ids=token_ids, text=prompt if isinstance(prompt, str) else None)

    async def _generate_all(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RequestOutput]:
        rules = TextRules(tokenizer=self._tokenizer, stops=compile_stops(params.stop))
        tasks: list[list[asyncio.Task[Piece]]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for prompt in prompts:
                    choices = [
                        Choice(index=i, number=i, prompt=prompt, params=params, rules=rules, request_id="")
                        for i in range(params.n)
                    ]
                    tasks.append([group.create_task(self._one(choice)) for choice in choices])
        except ExceptionGroup as failures:  # the first of them is what the caller can act on
            raise failures.exceptions[0] from None
        return [
            _request_output(prompt, [task.result() for task in choices])
            for prompt, choices in zip(prompts, tasks, strict=True)
        ]

    async def _one(self, choice: Choice) -> Piece:
        async with aclosing(generate_choice(self._controller, choice, self._metrics)) as pieces:
            return joined([piece async for piece in pieces])

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _is_one_prompt(prompts: PromptInput | Sequence[PromptInput]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _request_output(prompt: Prompt, pieces: Sequence[Piece]) -> RequestOutput:
    return RequestOutput(
        prompt=prompt.text,
        prompt_token_ids=prompt.token_ids,
        prompt_logprobs=pieces[0].prompt_logprobs,
        num_cached_tokens=pieces[0].cached_tokens,
        outputs=tuple(
            CompletionOutput(
                index=piece.index,
                text=piece.text,
                token_ids=piece.token_ids,
                logprobs=piece.logprobs,
                finish_reason=piece.finish_reason,
                stop_reason=piece.stop_reason,
            )
            for piece in pieces
        ),
    )
