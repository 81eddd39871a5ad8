"""What clients see of the prefix cache: `cached_tokens` in the usage, and `cache_salt` on its way to the engine."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from moemesh.engine_client import GenerationRequest
from tests.moemesh.gateway.fake_engine import FakeEngine
from tests.moemesh.gateway.serving import run, serve

MESSAGES = [{"role": "user", "content": "hi"}]


def by_salt(request: GenerationRequest) -> int:
    return {"": 32, "a": 64}.get(request.cache_salt, 0)


def cached(usage: Any) -> int:
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens"}
    return int(usage["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize(("salt", "tokens"), [(None, 32), ("a", 64), ("b", 0)])
def test_the_salt_reaches_the_engine_and_the_count_comes_back(salt: str | None, tokens: int) -> None:
    async def check() -> None:
        async with serve(FakeEngine(cached=by_salt)) as served:
            completion = await served.complete([5] * 100, max_tokens=3, cache_salt=salt)
            chat = await served.chat(cache_salt=salt)
            assert cached(completion["usage"]) == cached(chat["usage"]) == tokens
            for path, body in (
                ("/v1/completions", {"prompt": [5] * 100}),
                ("/v1/chat/completions", {"messages": MESSAGES}),
            ):
                options = {"include_usage": True, "continuous_usage_stats": True}
                request = {**body, "max_tokens": 3, "cache_salt": salt, "stream_options": options}
                *chunks, usage, _ = await served.events(path, request)
                assert cached(usage["usage"]) == tokens
                assert {cached(chunk["usage"]) for chunk in chunks} == {tokens}
            assert {request.cache_salt for request in served.engine.requests} == {salt or ""}

    run(check())


def test_a_prompt_counts_once_for_all_its_choices() -> None:
    async def check() -> None:
        engine = FakeEngine(cached=lambda request: request.prompt_token_ids[0] + request.choice)
        async with serve(engine) as served:
            body = await served.complete([[10] * 50, [20] * 50], n=3, max_tokens=2)
            assert cached(body["usage"]) == 30

    run(check())


def test_it_is_told_where_nothing_is_generated_and_where_prompts_are_scored() -> None:
    async def check() -> None:
        async with serve(FakeEngine(cached=by_salt)) as served:
            assert cached((await served.complete([5] * 100, max_tokens=0, echo=True))["usage"]) == 32
            assert cached((await served.complete([5] * 100, prompt_logprobs=1))["usage"]) == 32

    run(check())


def test_the_openai_client_finds_it() -> None:
    async def check() -> None:
        async with serve(FakeEngine(cached=by_salt)) as served:
            async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as api:
                completion = await api.completions.create(
                    model="m", prompt="a", max_tokens=1, extra_body={"cache_salt": "a"}
                )
                chat = await api.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
            for answer, tokens in ((completion, 64), (chat, 32)):
                assert answer.usage is not None
                assert answer.usage.prompt_tokens_details is not None
                assert answer.usage.prompt_tokens_details.cached_tokens == tokens

    run(check())


@pytest.mark.parametrize(
    ("salt", "message"),
    [("", "at least 1"), ("x" * 257, "257"), (7, "must be a string"), (["a"], "must be a string")],
)
def test_a_salt_is_a_short_text(salt: object, message: str) -> None:
    async def check() -> None:
        async with serve() as served:
            status, body = await served.post("/v1/completions", {"prompt": "a", "cache_salt": salt})
            assert status == 400
            assert body["error"]["param"] == "cache_salt"
            assert message in body["error"]["message"]

    run(check())
