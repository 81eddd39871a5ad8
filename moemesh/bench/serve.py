"""`moemesh bench serve`: clients of an OpenAI-compatible endpoint, ours or a peer's, and what they see.

Every request is a streamed completion of a random prompt that goes on for exactly the wanted number of tokens
(`ignore_eos`, which vLLM, SGLang and llama.cpp's server know too).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any

import aiohttp

from moemesh.bench.latency import RequestTrace, summarize
from moemesh.bench.options import BenchServeOptions
from moemesh.bench.results import result_document, write_result
from moemesh.bench.serve_report import result_block, result_fields

# Lower ids are special tokens in most vocabularies.
_FIRST_TOKEN = 10
_WORDS = (
    "time",
    "way",
    "day",
    "thing",
    "world",
    "life",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "group",
    "night",
    "home",
)

Prompt = list[int] | str


class EndpointError(ValueError):
    """The endpoint does not answer, or not as an OpenAI-compatible one does."""


def bench_serve(options: BenchServeOptions) -> bool:
    """Measure, print the block, write the JSON where it was asked for; whether every request succeeded."""
    model, traces, duration = asyncio.run(_measure(options))
    statistics = summarize(traces, duration)
    print(result_block(options, statistics))
    if statistics.errors:
        print(f"first error: {statistics.errors[0]}")
    if options.save_result:
        now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        name = options.result_filename or f"moemesh-{model.rsplit('/')[-1]}-{now}.json"
        write_result(name, result_document(options, result_fields(options, model, statistics, traces)))
    return not statistics.failed


async def _measure(options: BenchServeOptions) -> tuple[str, list[RequestTrace], float]:
    headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    draw = random.Random(options.seed)
    prompts = [_prompt(options, draw) for _ in range(options.num_warmups + options.num_prompts)]
    async with aiohttp.ClientSession(
        options.base_url, headers=headers, connector=connector, timeout=timeout
    ) as session:
        model = options.model or await _first_model(session)
        client = _Client(session, model, options.random_output_len)
        for prompt in prompts[: options.num_warmups]:
            warmup = await client.complete(prompt)
            if warmup.error is not None:
                raise EndpointError(f"{options.base_url} does not complete a prompt: {warmup.error}")
        started = time.perf_counter()
        traces = await _send_all(options, client, prompts[options.num_warmups :], draw)
        return model, traces, time.perf_counter() - started


async def _send_all(
    options: BenchServeOptions, client: _Client, prompts: Sequence[Prompt], draw: random.Random
) -> list[RequestTrace]:
    limit = nullcontext() if options.max_concurrency is None else asyncio.Semaphore(options.max_concurrency)

    async def limited(prompt: Prompt) -> RequestTrace:
        async with limit:
            return await client.complete(prompt)

    offsets = arrival_offsets(len(prompts), options.request_rate, draw)
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for prompt, offset in zip(prompts, offsets, strict=True):
            await asyncio.sleep(max(0.0, started + offset - time.perf_counter()))
            tasks.append(group.create_task(limited(prompt)))
    return [task.result() for task in tasks]


def arrival_offsets(count: int, request_rate: float, draw: random.Random) -> list[float]:
    """Seconds after the start at which requests are sent: a Poisson process, scaled to end when its rate says."""
    if math.isinf(request_rate):
        return [0.0] * count
    gaps = [draw.expovariate(request_rate) for _ in range(count)]
    scale = count / request_rate / sum(gaps)
    offsets, moment = [], 0.0
    for gap in gaps:
        offsets.append(moment)
        moment += gap * scale
    return offsets


def _prompt(options: BenchServeOptions, draw: random.Random) -> Prompt:
    if options.prompt_type == "text":
        return " ".join(draw.choices(_WORDS, k=options.random_input_len))
    return draw.choices(range(_FIRST_TOKEN, options.vocab_size), k=options.random_input_len)


async def _first_model(session: aiohttp.ClientSession) -> str:
    try:
        async with session.get("/v1/models") as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, ValueError, KeyError, IndexError, TypeError) as error:
        raise EndpointError(f"cannot ask the endpoint for its models ({error}): check --base-url") from error


class _Client:
    """Sends completions and notes when their tokens come. Failures become traces with an error."""

    def __init__(self, session: aiohttp.ClientSession, model: str, output_tokens: int) -> None:
        self._session = session
        self._model = model
        self._output_tokens = output_tokens

    async def complete(self, prompt: Prompt) -> RequestTrace:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": self._output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        arrivals: list[float] = []
        usage: dict[str, Any] = {}
        sent = time.perf_counter()
        try:
            async with self._session.post("/v1/completions", json=body) as response:
                if response.status != 200:
                    raise EndpointError(f"status {response.status}: {(await response.text())[:300]}")
                async for event in _events(response.content):
                    now = time.perf_counter()
                    if "error" in event:
                        raise EndpointError(f"the stream broke off: {event['error']}")
                    if event.get("choices"):
                        arrivals.append(now)
                    usage = event.get("usage") or usage
            if not arrivals or "completion_tokens" not in usage:
                raise EndpointError("the stream held no token, or no usage at its end")
        except (EndpointError, aiohttp.ClientError, json.JSONDecodeError) as error:
            return RequestTrace(sent=sent, arrivals=tuple(arrivals), error=str(error) or type(error).__name__)
        return RequestTrace(
            sent=sent,
            # Some servers (llama.cpp's) say why a stream ends in an event of its own, which holds no token.
            arrivals=tuple(arrivals[: usage["completion_tokens"]]),
            input_tokens=usage["prompt_tokens"],
            output_tokens=usage["completion_tokens"],
        )


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, without the closing [DONE]."""
    async for line in content:
        if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
            yield json.loads(data)
