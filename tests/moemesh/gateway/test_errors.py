"""Every refusal: status, the field it names, the words a user needs. One table; nothing here reaches the engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from moemesh.engine_client import EngineFailed, InvalidRequest, NotReady, Overloaded, RequestError
from moemesh.gateway import GatewayLimits
from tests.moemesh.gateway.fake_engine import VOCAB_SIZE, FakeEngine
from tests.moemesh.gateway.serving import Served, run, serve

P: dict[str, Any] = {"prompt": "hi"}
C: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def check_error(status: int, body: Any, *, expected: int, param: str | None, words: str) -> None:
    assert status == expected, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 600
    assert "Traceback" not in error["message"]


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"} | fields]}


COMPLETION_ERRORS: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "prompt", "missing"),
    ({"prompt": None}, "prompt", "missing"),
    ({"prompt": 3}, "prompt", "a list of token ids"),
    ({"prompt": {}}, "prompt", "not an object"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["a", ""]}, "prompt", "empty"),
    ({"prompt": ["a", [1]]}, "prompt", "not both"),
    ({"prompt": [1, "a"]}, "prompt", "not both"),
    ({"prompt": [1, 2.5]}, "prompt", "token ids"),
    ({"prompt": [True]}, "prompt", "token ids"),
    ({"prompt": [[1, None]]}, "prompt", "token ids"),
    (
        {"prompt": [VOCAB_SIZE]},
        "prompt",
        f"token id {VOCAB_SIZE} is out of range: the model's vocabulary has {VOCAB_SIZE}",
    ),
    ({"prompt": [5, -1]}, "prompt", "token id -1"),
    ({"prompt": [10**30]}, "prompt", "out of range"),
    ({"prompt": ["a"] * 9}, "prompt", "9 prompts, at most 8"),
    ({"prompt": ["a"] * 8, "n": 4}, "n", "32 choices, at most 16"),
    ({"prompt": [5] * 128}, "prompt", "maximum context length is 128 tokens, but the prompt has 128"),
    ({"prompt": [5] * 100, "max_tokens": 29}, "max_tokens", "100 tokens and 29 tokens are asked for, 129 in all"),
    ({"prompt": "a" * 100_000}, "prompt", "100000 characters"),
    (P | {"max_tokens": -1}, "max_tokens", "at least 0, not -1"),
    (P | {"max_tokens": "5"}, "max_tokens", "must be an integer"),
    (P | {"max_tokens": 1.5}, "max_tokens", "must be an integer"),
    (P | {"max_tokens": True}, "max_tokens", "must be an integer"),
    (P | {"min_tokens": 17}, "min_tokens", "17"),
    (P | {"temperature": -1}, "temperature", "at least 0, not -1"),
    (P | {"temperature": "hot"}, "temperature", "must be a number"),
    (P | {"top_p": 0}, "top_p", "above 0"),
    (P | {"top_p": 1.5}, "top_p", "at most 1"),
    (P | {"top_k": -2}, "top_k", "at least -1"),
    (P | {"min_p": 2}, "min_p", "at most 1"),
    (P | {"presence_penalty": 3}, "presence_penalty", "at most 2"),
    (P | {"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    (P | {"seed": 2**63}, "seed", "at most"),
    (P | {"n": 0}, "n", "at least 1"),
    (P | {"n": 5}, "n", "at most 4"),
    (P | {"n": 2, "best_of": 3}, "best_of", "not supported"),
    (P | {"logprobs": 21}, "logprobs", "at most 20"),
    (P | {"logprobs": True}, "logprobs", "must be an integer"),
    (P | {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    (P | {"stop": ""}, "stop", "at least 1 characters"),
    (P | {"stop": ["a"] * 65}, "stop", "65 entries, at most 64"),
    (P | {"stop": "a" * 1025}, "stop", "1025 characters"),
    (P | {"stop": [1]}, "stop[0]", "must be a string"),
    (P | {"stop": 1}, "stop", "a string or an array"),
    (P | {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "out of range"),
    (P | {"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
    (P | {"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", "out of range"),
    (P | {"logit_bias": {"1": 101}}, "logit_bias.1", "at most 100"),
    (P | {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1025 entries"),
    (P | {"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
    (P | {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unrecognized request argument"),
    (P | {"stream": "yes"}, "stream", "true or false"),
    (P | {"suffix": "x"}, "suffix", "not supported"),
    (P | {"use_beam_search": True}, "use_beam_search", "not supported"),
    (P | {"prompt_embeds": "x"}, "prompt_embeds", "not supported"),
    (P | {"detokenize": False}, "detokenize", "not supported"),
    (P | {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (P | {"guided_json": {}}, "guided_json", "not supported"),
    (P | {"nonsense": 1, "other": 2}, "nonsense", "Unrecognized request argument: nonsense, other"),
    (P | {"x" * 5000: 1}, "x" * 80, "Unrecognized"),
    (P | {"request_id": ""}, "request_id", "at least 1"),
]
CHAT_ERRORS: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "messages", "missing"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "an array"),
    ({"messages": ["hi"]}, "messages[0]", "an object"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    (message(role="robot"), "messages[0].role", "must be one of"),
    (message(role="tool"), "messages[0].role", "must be one of"),
    (message(role="developer"), "messages", "no such role: developer"),
    (message(content=3), "messages[0].content", "a string or an array"),
    (message(content=[]), "messages[0].content", "at least 1"),
    (message(content=[{"type": "image_url"}]), "messages[0].content[0].type", "only text is"),
    (message(content=[{"type": "text"}]), "messages[0].content[0].text", "a string"),
    (message(tool_calls=[{"id": 1}]), "messages[0].tool_calls", "not supported"),
    (C | {"tools": [{"type": "function"}]}, "tools", "not supported"),
    (C | {"tool_choice": "auto"}, "tool_choice", "not supported"),
    (C | {"functions": [{}]}, "functions", "not supported"),
    (C | {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (C | {"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
    (C | {"chat_template_kwargs": {"chat_template": "x"}}, "messages", "chat_template"),
    (C | {"chat_template_kwargs": 3}, "chat_template_kwargs", "an object"),
    (C | {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "exclude"),
    (C | {"logprobs": 3}, "logprobs", "true or false"),
    (C | {"top_logprobs": 3}, "top_logprobs", "logprobs is true"),
    (C | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    (C | {"prompt": "x"}, "prompt", "Unrecognized"),
    (C | {"max_completion_tokens": 500}, "max_tokens", "128 tokens"),
    (message(content="a b c d " * 10_000), "messages", "more than 128 tokens can hold"),
    (message(content="a b c d " * 30), "messages", "maximum context length is 128"),
]
BODY_ERRORS: list[tuple[bytes, str, int, str]] = [
    (b"", "application/json", 400, "not valid JSON"),
    (b"{", "application/json", 400, "not valid JSON"),
    (b"[1]", "application/json", 400, "a JSON object"),
    (b'{"prompt": "hi", "temperature": NaN}', "application/json", 400, "NaN"),
    (b'{"prompt": "hi", "temperature": -Infinity}', "application/json", 400, "-Infinity"),
    (b'{"prompt": "hi", "temperature": 1e999}', "application/json", 400, "finite"),
    (b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}", "application/json", 400, "too many digits"),
    (b'{"prompt": "\xff"}', "application/json", 400, "UTF-8"),
    (b'{"prompt": "\\ud800"}', "application/json", 400, "surrogate"),
    (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "application/json", 400, "nested"),
    (b'{"x": ' + b"[" * 100_000, "application/json", 400, "nested"),
    (b'{"prompt": "hi"}', "text/plain", 415, "application/json"),
    (b"prompt=hi", "application/x-www-form-urlencoded", 415, "application/json"),
    (b'{"prompt": "' + b"a" * 200_000 + b'"}', "application/json", 413, "150000 bytes"),
]


def refused(path: str, body: object, *, expected: int, param: str | None, words: str, **headers: str) -> None:
    """The request is refused so, the engine never hears of it, and the next one is served."""

    async def check() -> None:
        limits = GatewayLimits(max_n=4, max_prompts=8, max_choices=16)
        async with serve(limits=limits, max_body_bytes=150_000) as served:
            status, answer = await served.post(path, body, **headers)
            check_error(status, answer, expected=expected, param=param, words=words)
            assert served.engine.requests == []
            status, _ = await served.post("/v1/completions", P)
            assert status == 200

    run(check())


@pytest.mark.parametrize(("body", "param", "words"), COMPLETION_ERRORS, ids=lambda value: str(value)[:60])
def test_completions(body: dict[str, Any], param: str | None, words: str) -> None:
    refused("/v1/completions", body, expected=400, param=param, words=words)


@pytest.mark.parametrize(("body", "param", "words"), CHAT_ERRORS, ids=lambda value: str(value)[:60])
def test_chat(body: dict[str, Any], param: str | None, words: str) -> None:
    refused("/v1/chat/completions", body, expected=400, param=param, words=words)


@pytest.mark.parametrize(("body", "content_type", "expected", "words"), BODY_ERRORS, ids=lambda value: str(value)[:60])
def test_bodies(body: bytes, content_type: str, expected: int, words: str) -> None:
    param = "temperature" if words == "finite" else None
    headers = {"Content-Type": content_type}
    refused("/v1/completions", body, expected=expected, param=param, words=words, **headers)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", P), ("/v1/chat/completions", C), ("/tokenize", P), ("/detokenize", {"tokens": []})],
)
def test_an_unknown_model(path: str, body: dict[str, Any]) -> None:
    refused(path, body | {"model": "gpt-5"}, expected=404, param="model", words="`gpt-5` does not exist")


def test_paths_and_methods() -> None:
    async def check() -> None:
        async with serve() as served:
            await check_paths(served)

    async def check_paths(served: Served) -> None:
        for path in ("/", "/v1", "/v1/completion", "/v1/models/nope", "/docs"):
            status, answer = await served.get(path)
            check_error(status, answer, expected=404, param="model" if "nope" in path else None, words="")
        status, answer = await served.get("/v1/completions")
        check_error(status, answer, expected=405, param=None, words="it takes POST")
        async with served.session.delete(served.url + "/v1/models") as response:
            assert response.status == 405
            assert "GET" in response.headers["Allow"]
            assert response.headers["Server"] == "moemesh"
            check_error(405, await response.json(), expected=405, param=None, words="DELETE")
        async with served.session.head(served.url + "/v1/models") as response:
            assert response.status == 200
            assert await response.read() == b""

    run(check())


ENGINE_ERRORS: list[tuple[Exception, int, str, str]] = [
    (InvalidRequest("too long for the cache"), 400, "invalid_request_error", "too long for the cache"),
    (Overloaded("64 wait", retry_after=2.5), 503, "overloaded_error", "64 wait"),
    (NotReady("draining"), 503, "overloaded_error", "draining"),
    (EngineFailed("rank 3 was lost"), 500, "server_error", "rank 3 was lost"),
    (RequestError("poison"), 500, "server_error", "poison"),
    (RuntimeError("/secret/path"), 500, "server_error", "internal error"),
]


@pytest.mark.parametrize(("error", "expected", "kind", "words"), ENGINE_ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine(error: Exception, expected: int, kind: str, words: str, stream: bool) -> None:
    async def check() -> None:
        async with serve(FakeEngine(error=error)) as served:
            body = P | {"stream": stream, "n": 2}
            async with served.session.post(served.url + "/v1/completions", json=body) as response:
                answer = await response.json()
                assert response.status == expected
                assert answer["error"]["type"] == kind
                assert words in answer["error"]["message"]
                assert "secret" not in json.dumps(answer)
                if expected == 503:
                    assert response.headers["Retry-After"] == ("3" if isinstance(error, Overloaded) else "5")
            assert served.engine.closed == len(served.engine.requests)

    run(check())


@pytest.mark.parametrize(("error", "expected", "kind", "words"), ENGINE_ERRORS)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_that_breaks_off(error: Exception, expected: int, kind: str, words: str, path: str) -> None:
    async def check() -> None:
        async with serve(FakeEngine(error=error, fail_after=2)) as served:
            events = await served.events(path, P if path == "/v1/completions" else C)
            assert events[-1]["error"]["type"] == kind
            assert words in events[-1]["error"]["message"]
            assert "secret" not in json.dumps(events)
            assert len(events) == (3 if path == "/v1/completions" else 4)
            assert "[DONE]" not in events

    run(check())


def test_an_engine_that_stops_without_a_reason() -> None:
    async def check() -> None:
        async with serve(FakeEngine(error=StopAsyncIteration())) as served:
            status, answer = await served.post("/v1/completions", P)
            assert status == 500
            assert answer["error"]["type"] == "server_error"

    run(check())


@pytest.mark.parametrize("state", ["loading", "draining", "failed"])
def test_no_requests_while_not_serving(state: Any) -> None:
    async def check() -> None:
        async with serve(FakeEngine(state=state, ready=False, detail="3 of 4 ranks")) as served:
            for path, body in (("/v1/completions", P), ("/v1/chat/completions", C)):
                status, answer = await served.post(path, body)
                assert status == 503
                assert state in answer["error"]["message"]
                assert "3 of 4 ranks" in answer["error"]["message"]
            assert served.engine.requests == []

    run(check())


def test_too_many_open_requests() -> None:
    async def check() -> None:
        engine = FakeEngine(gate=asyncio.Semaphore(0))
        async with serve(engine, limits=GatewayLimits(max_open_choices=2)) as served:
            first = asyncio.create_task(served.complete("hi", n=2, max_tokens=1))
            while len(engine.requests) < 2:
                await asyncio.sleep(0)
            status, answer = await served.post("/v1/completions", P)
            assert status == 503
            assert "at most 2" in answer["error"]["message"]
            assert engine.gate is not None
            engine.gate.release()
            engine.gate.release()
            assert (await first)["usage"]["completion_tokens"] == 2
            engine.gate.release()
            await served.complete("hi", max_tokens=1)

    run(check())
