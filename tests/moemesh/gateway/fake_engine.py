"""An engine without a model: log-probabilities are a function of a position and the token before it."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from mesh_config.model_config import ModelConfig, parse_model_config
from moemesh.engine_client import EngineState, EngineStatus, GenerationRequest, TokenLogprob, TokenOutput

EOS = 1
VOCAB_SIZE = 300


@lru_cache
def model_config() -> ModelConfig:
    """A small DeepSeek-V3 as its config.json has it."""
    return parse_model_config(
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 4096,
            "eos_token_id": EOS,
        }
    )


@lru_cache(maxsize=4096)
def logprobs_after(token_id: int, position: int) -> tuple[float, ...]:
    """A log-softmax over the vocabulary."""
    seed = hashlib.sha256(f"{token_id},{position}".encode()).digest()
    logits = [random.Random(seed).gauss(0, 2)] + [
        random.Random(seed + bytes([i % 256, i // 256])).gauss(0, 2) for i in range(1, VOCAB_SIZE)
    ]
    total = math.log(sum(math.exp(logit) for logit in logits))
    return tuple(logit - total for logit in logits)


def token_logprob(token_id: int, before: int, position: int, count: int) -> TokenLogprob:
    """What an engine says of `token_id` at `position` behind the token `before`, with the best `count` tokens."""
    logprobs = logprobs_after(before, position)
    best = sorted(range(VOCAB_SIZE), key=lambda i: (-logprobs[i], i))
    return TokenLogprob(
        token_id=token_id,
        logprob=logprobs[token_id],
        rank=best.index(token_id) + 1,
        top_ids=tuple(best[:count]),
        top_logprobs=tuple(logprobs[i] for i in best[:count]),
    )


def greedy(request: GenerationRequest) -> list[int]:
    """The best token after each, never the end of the text."""
    before, tokens = request.prompt_token_ids[-1], []
    for position in range(
        len(request.prompt_token_ids), len(request.prompt_token_ids) + (request.params.max_tokens or 0)
    ):
        logprobs = logprobs_after(before, position)
        before = max(range(4, VOCAB_SIZE), key=lambda i: (logprobs[i], -i))
        tokens.append(before)
    return tokens


@dataclass
class FakeEngine:
    """Puts out the script's tokens, `burst` at a time, as long as max_tokens and stop tokens allow.

    It says that `cached` tokens of a request's prompt came from its cache.
    `gate`, where there is one, is waited for before every output; `fail_after` outputs the error is raised.
    """

    script: Callable[[GenerationRequest], Sequence[int]] = greedy
    burst: int = 1
    state: EngineState = "ready"
    ready: bool = True
    detail: str = ""
    degraded: bool = False
    max_model_len: int = 128
    gate: asyncio.Semaphore | None = None
    error: Exception | None = None
    fail_after: int = 0
    requests: list[GenerationRequest] = field(default_factory=list)
    closed: int = 0
    num_outputs: int = 0
    cached: Callable[[GenerationRequest], int] = lambda request: 0

    @property
    def model_config(self) -> ModelConfig:
        return model_config()

    def status(self) -> EngineStatus:
        return EngineStatus(state=self.state, ready=self.ready, detail=self.detail, degraded=self.degraded)

    def mesh(self) -> dict[str, Any]:
        return {"epoch": 1, "ranks": []}

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        try:
            told = False
            outputs = _outputs(request, list(self.script(request)), self.burst)
            for number, output in enumerate(outputs):
                if self.gate is not None:
                    await self.gate.acquire()
                if self.error is not None and number >= self.fail_after:
                    raise self.error
                await asyncio.sleep(0)
                self.num_outputs += 1
                if not told and (output.token_ids or output.finish_reason is not None):
                    output, told = replace(output, cached_tokens=self.cached(request)), True
                yield output
        finally:
            self.closed += 1


def _outputs(request: GenerationRequest, tokens: list[int], burst: int) -> list[TokenOutput]:
    params = request.params
    tokens = tokens[: params.max_tokens]
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    stop = next((i for i, token in enumerate(tokens) if token in ends and i >= params.min_tokens), None)
    if stop is not None:
        tokens = tokens[: stop + 1]
    outputs = _prompt_outputs(request)
    sequence = [*request.prompt_token_ids, *tokens]
    start = len(request.prompt_token_ids)
    for first in range(start, len(sequence), burst):
        ids = sequence[first : first + burst]
        logprobs = None
        if params.logprobs is not None:
            logprobs = [
                token_logprob(token, sequence[first + i - 1], first + i, params.logprobs) for i, token in enumerate(ids)
            ]
        last = first + burst >= len(sequence)
        outputs.append(
            TokenOutput(
                token_ids=ids,
                logprobs=logprobs,
                finish_reason=("length" if stop is None else "stop") if last else None,
                stop_token=tokens[-1] if last and stop is not None else None,
            )
        )
    return outputs if tokens else [*outputs, TokenOutput(finish_reason="length")]


def _prompt_outputs(request: GenerationRequest) -> list[TokenOutput]:
    """The prompt's log-probabilities in two parts, as chunked prefill gives them."""
    count, ids = request.params.prompt_logprobs, request.prompt_token_ids
    if count is None:
        return []
    entries: list[TokenLogprob | None] = [None]
    entries += [token_logprob(ids[i], ids[i - 1], i, count) for i in range(1, len(ids))]
    half = len(entries) // 2
    return [TokenOutput(prompt_logprobs=part) for part in (entries[:half], entries[half:]) if part]
