"""The official client, which nobody here wrote, against a real port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from moemesh.engine_client import Overloaded
from tests.moemesh.gateway.fake_engine import FakeEngine
from tests.moemesh.gateway.serving import run, serve


@asynccontextmanager
async def client(engine: FakeEngine | None = None, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serve(engine, api_keys=("key",), **options) as served,
        openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="key", max_retries=0) as api,
    ):
        yield api


def test_models_and_completions() -> None:
    async def check() -> None:
        async with client() as api:
            assert [model.id async for model in api.models.list()] == ["m", "org/m"]
            assert (await api.models.retrieve("m")).id == "m"
            answer = await api.completions.create(
                model="m", prompt=["a", "b"], n=2, max_tokens=3, logprobs=2, echo=True
            )
            assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.token_logprobs is not None
            assert len(logprobs.token_logprobs) == 5
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 12

    run(check())


def test_chat() -> None:
    async def check() -> None:
        async with client() as api:
            answer = await api.chat.completions.create(
                model="m",
                messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
                max_completion_tokens=4,
                logprobs=True,
                top_logprobs=3,
                extra_body={"top_k": 5, "ignore_eos": True},
            )
            choice = answer.choices[0]
            assert choice.message.role == "assistant"
            assert choice.finish_reason == "length"
            assert choice.logprobs is not None
            assert choice.logprobs.content is not None
            assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [3] * 4

    run(check())


def test_streams() -> None:
    async def check() -> None:
        async with client() as api:
            stream = await api.completions.create(model="m", prompt="a", max_tokens=5, stream=True)
            texts = [chunk.choices[0].text async for chunk in stream]
            whole = await api.completions.create(model="m", prompt="a", max_tokens=5)
            assert "".join(texts) == whole.choices[0].text
            chat = await api.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=5,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in chat]
            assert chunks[0].choices[0].delta.role == "assistant"
            assert chunks[-2].choices[0].finish_reason == "length"
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 5

    run(check())


def test_errors() -> None:
    async def check() -> None:
        async with client() as api:
            with pytest.raises(openai.NotFoundError) as missing:
                await api.completions.create(model="nope", prompt="a")
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as bad:
                await api.completions.create(model="m", prompt="a", temperature=-1)
            assert bad.value.param == "temperature"
            with pytest.raises(openai.BadRequestError):
                await api.completions.create(model="m", prompt="a", max_tokens=10_000)
            with pytest.raises(openai.AuthenticationError):
                await api.with_options(api_key="other").models.list()
        async with client(FakeEngine(error=Overloaded("full"))) as api:
            with pytest.raises(openai.InternalServerError) as full:
                await api.completions.create(model="m", prompt="a")
            assert full.value.status_code == 503

    run(check())


def test_an_error_in_the_middle_of_a_stream() -> None:
    async def check() -> None:
        async with client(FakeEngine(error=Overloaded("lost"), fail_after=2)) as api:
            stream = await api.completions.create(model="m", prompt="a", max_tokens=5, stream=True)
            with pytest.raises(openai.APIError, match="lost"):
                [chunk async for chunk in stream]

    run(check())
