from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from moemesh.engine_client import GenerationRequest
from moemesh.gateway import SamplingDefaults
from tests.moemesh.gateway.fake_engine import EOS, FakeEngine, greedy, token_logprob
from tests.moemesh.gateway.serving import run, serve, tiny_tokenizer


def says(text: str, *, end: bool = True) -> FakeEngine:
    """An engine that answers everything with a text, and then ends it."""
    ids = tiny_tokenizer().encode(text, add_special_tokens=False)

    def script(request: GenerationRequest) -> list[int]:
        return ids + [EOS] * end

    return FakeEngine(script=script)


def counts(usage: Any) -> tuple[int, int, int, int]:
    """Prompt, completion, total, cached."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"], cached


def test_the_four_forms_of_a_prompt_are_one() -> None:
    async def check() -> None:
        async with serve() as served:
            assert served.tokenizer is not None
            ids = served.tokenizer.encode("hello world")
            texts = []
            for prompt in ("hello world", ["hello world"], ids, [ids]):
                body = await served.complete(prompt)
                assert body["usage"] == {
                    "prompt_tokens": len(ids),
                    "completion_tokens": 16,
                    "total_tokens": len(ids) + 16,
                    "prompt_tokens_details": {"cached_tokens": 0},
                }
                texts.append(body["choices"][0]["text"])
            assert len(set(texts)) == 1
            assert {request.prompt_token_ids for request in served.engine.requests} == {tuple(ids)}

    run(check())


def test_the_shape_of_an_answer() -> None:
    async def check() -> None:
        async with serve(says("fine")) as served:
            body = await served.complete("hi", request_id="mine")
            assert body.pop("created") > 1_700_000_000
            assert body == {
                "id": "cmpl-mine",
                "object": "text_completion",
                "model": "m",
                "choices": [
                    {"index": 0, "text": "fine", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
                ],
                "usage": body["usage"],
            }

    run(check())


def test_several_prompts_times_n() -> None:
    async def check() -> None:
        engine = FakeEngine(script=lambda request: [request.prompt_token_ids[0] + request.choice])
        async with serve(engine) as served:
            body = await served.complete([[10], [20]], n=2, max_tokens=1, seed=7, return_token_ids=True)
            assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
            assert [choice["token_ids"] for choice in body["choices"]] == [[10], [11], [20], [21]]
            assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[10], [10], [20], [20]]
            assert counts(body["usage"]) == (2, 4, 6, 0)
            assert [request.choice for request in served.engine.requests] == [0, 1, 0, 1]
            assert {request.params.seed for request in served.engine.requests} == {7}

    run(check())


def test_parameters_reach_the_engine() -> None:
    fields = {
        "max_tokens": 5,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": 2,
    }

    async def check() -> None:
        async with serve() as served:
            await served.complete("hi", **fields, logit_bias={"5": -3}, stop="zzz", user="me", best_of=1)
            params = served.engine.requests[0].params
            assert {name: getattr(params, name) for name in fields} == fields | {"stop_token_ids": (9,)}
            assert params.logit_bias == {5: -3.0}
            assert params.stop == ("zzz",)

    run(check())


def test_defaults_of_the_model() -> None:
    async def check() -> None:
        async with serve(sampling_defaults=SamplingDefaults(temperature=0.3, top_p=0.95)) as served:
            await served.complete("hi")
            await served.complete("hi", temperature=1, top_p=None)
            first, second = (request.params for request in served.engine.requests)
            assert (first.temperature, first.top_p, first.max_tokens) == (0.3, 0.95, 16)
            assert (second.temperature, second.top_p) == (1, 0.95)

    run(check())


@pytest.mark.parametrize("burst", [1, 3, 100])
def test_stop_strings(burst: int) -> None:
    async def check() -> None:
        engine = says("one two three four")
        engine.burst = burst
        async with serve(engine) as served:
            body = await served.complete("x", stop=[" three", "four"], max_tokens=50)
            choice = body["choices"][0]
            assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one two", "stop", " three")
            kept = await served.complete("x", stop=" three", max_tokens=50, include_stop_str_in_output=True)
            assert kept["choices"][0]["text"] == "one two three"
            late = await served.complete("x", stop="o", min_tokens=1, max_tokens=50)
            first = tiny_tokenizer().token_text(served.engine.script(served.engine.requests[0])[0])
            rest = "one two three four"[len(first) :]
            assert late["choices"][0]["text"] == first + rest.partition("o")[0]
            unmet = await served.complete("x", stop="four!", max_tokens=50)
            assert unmet["choices"][0]["text"] == "one two three four"
            assert served.engine.closed == 4

    run(check())


def test_stop_tokens_are_counted_but_not_shown() -> None:
    async def check() -> None:
        async with serve(says("fine")) as served:
            assert served.tokenizer is not None
            token = served.tokenizer.encode("fine", add_special_tokens=False)[-1]
            count = len(served.tokenizer.encode("fine", add_special_tokens=False))
            body = await served.complete("x", stop_token_ids=[token], return_token_ids=True)
            choice = body["choices"][0]
            assert choice["stop_reason"] == token
            assert choice["token_ids"][-1] == token
            assert "fine".startswith(choice["text"])
            assert choice["text"] != "fine"
            assert body["usage"]["completion_tokens"] == count
            shown = await served.complete("x", stop_token_ids=[token], include_stop_str_in_output=True)
            assert shown["choices"][0]["text"] == "fine"
            end = await served.complete("x", skip_special_tokens=False, include_stop_str_in_output=True)
            assert end["choices"][0]["text"] == "fine<eos>"

    run(check())


def check_logprobs(logprobs: Any, ids: list[int], first: int, before: list[int], count: int) -> None:
    for i in range(first, len(ids)):
        expected = token_logprob(ids[i], before[i], i, count)
        assert logprobs["token_logprobs"][i] == expected.logprob
        top = logprobs["top_logprobs"][i]
        assert top[logprobs["tokens"][i]] == expected.logprob
        assert max(top.values()) == max(expected.logprob, *expected.top_logprobs)
        assert len(top) == count + (ids[i] not in expected.top_ids)


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_scores_a_prompt(max_tokens: int, as_ids: bool) -> None:
    async def check() -> None:
        async with serve() as served:
            assert served.tokenizer is not None
            ids = served.tokenizer.encode("hello \u00e9 world\U0001f600")
            prompt = ids if as_ids else "hello \u00e9 world\U0001f600"
            body = await served.complete(prompt, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
            choice = body["choices"][0]
            answer = greedy(served.engine.requests[0])
            logprobs = choice["logprobs"]
            assert choice["text"].startswith("hello \u00e9 world\U0001f600")
            assert choice["finish_reason"] == "length"
            assert {len(values) for values in logprobs.values()} == {len(ids) + max_tokens}
            assert logprobs["token_logprobs"][0] is None
            assert logprobs["top_logprobs"][0] is None
            everything = ids + answer
            check_logprobs(logprobs, everything, 1, [0, *everything], 1)
            assert logprobs["text_offset"][:2] == [0, 0]
            for i in range(1, len(ids)):
                piece = logprobs["tokens"][i]
                if "\ufffd" not in piece:
                    assert choice["text"].startswith(piece, logprobs["text_offset"][i])
            assert body["usage"]["completion_tokens"] == max_tokens

    run(check())


@pytest.mark.parametrize("count", [0, 5])
def test_logprobs_of_the_answer(count: int) -> None:
    async def check() -> None:
        async with serve() as served:
            body = await served.complete([5, 6], logprobs=count, max_tokens=6)
            logprobs = body["choices"][0]["logprobs"]
            answer = greedy(served.engine.requests[0])
            for i, (token, before) in enumerate(zip(answer, [6, *answer], strict=False)):
                expected = token_logprob(token, before, 2 + i, count)
                assert logprobs["token_logprobs"][i] == expected.logprob
                assert len(logprobs["top_logprobs"][i]) == max(1, count)
            named = await served.complete([5, 6], logprobs=count, max_tokens=6, return_tokens_as_token_ids=True)
            assert named["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in answer]

    run(check())


def test_prompt_logprobs_as_vllm_has_them() -> None:
    async def check() -> None:
        async with serve() as served:
            body = await served.complete([5, 6, 7], prompt_logprobs=2, echo=True, logprobs=4, max_tokens=1)
            choice = body["choices"][0]
            first, second, third = choice["prompt_logprobs"]
            assert first is None
            assert len(second) in (2, 3)
            expected = token_logprob(7, 6, 2, 2)
            assert third["7"]["logprob"] == expected.logprob
            assert third["7"]["rank"] == expected.rank
            assert len(choice["logprobs"]["top_logprobs"][1]) in (4, 5)

    run(check())


def test_streaming_gives_the_same_as_an_answer_at_once() -> None:
    async def check() -> None:
        for fields in ({}, {"echo": True}, {"logprobs": 3, "echo": True}, {"n": 3, "stop": "e"}, {"max_tokens": 0}):
            async with serve() as served:
                request = {"prompt": "hello world", "max_tokens": 9, "n": 1, "return_token_ids": True, **fields}
                whole = await served.complete(**request)
                events = await served.events("/v1/completions", request)
                assert events.pop() == "[DONE]"
                for choice in whole["choices"]:
                    parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
                    assert "".join(part["text"] for part in parts) == choice["text"]
                    assert list(chain.from_iterable(part["token_ids"] for part in parts)) == choice["token_ids"]
                    assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
                    assert parts[-1]["finish_reason"] == choice["finish_reason"]
                    if fields.get("logprobs"):
                        for name, values in choice["logprobs"].items():
                            assert list(chain.from_iterable(part["logprobs"][name] for part in parts)) == values
                assert {event["id"] for event in events} == {events[0]["id"]}
                assert all("usage" not in event for event in events)

    run(check())


def test_usage_in_a_stream() -> None:
    async def check() -> None:
        async with serve() as served:
            request: dict[str, object] = {"prompt": [5, 6], "max_tokens": 3}
            events = await served.events("/v1/completions", request | {"stream_options": {"include_usage": True}})
            *chunks, usage, done = events
            assert done == "[DONE]"
            assert usage["choices"] == []
            assert counts(usage["usage"]) == (2, 3, 5, 0)
            assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
            options = {"include_usage": True, "continuous_usage_stats": True}
            events = await served.events("/v1/completions", request | {"stream_options": options})
            assert [event["usage"]["completion_tokens"] for event in events[:-1]] == [1, 2, 3, 3]

    run(check())


def test_a_long_answer_is_written_off_the_loop() -> None:
    async def check() -> None:
        async with serve(FakeEngine(max_model_len=2000)) as served:
            prompt = [4 + i % 200 for i in range(300)]
            body = await served.complete(prompt, echo=True, logprobs=1, max_tokens=1)
            assert len(body["choices"][0]["logprobs"]["tokens"]) == 301
            events = await served.events(
                "/v1/completions", {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1}
            )
            assert len(events[0]["choices"][0]["logprobs"]["tokens"]) == 301

    run(check())


def test_the_context_may_be_filled_to_the_last_token() -> None:
    async def check() -> None:
        async with serve(FakeEngine(max_model_len=20)) as served:
            assert (await served.complete([5] * 15))["usage"]["completion_tokens"] == 5
            assert (await served.complete([5] * 15, max_tokens=5))["usage"]["completion_tokens"] == 5
            assert (await served.complete([5] * 20, max_tokens=0, echo=True))["usage"]["completion_tokens"] == 0

    run(check())


def test_without_a_tokenizer_ids_are_served() -> None:
    async def check() -> None:
        async with serve(with_tokenizer=False) as served:
            body = await served.complete([5, 6], max_tokens=3, logprobs=1, echo=True, return_token_ids=True)
            choice = body["choices"][0]
            assert choice["text"] == ""
            assert len(choice["token_ids"]) == 3
            assert choice["logprobs"]["tokens"][:2] == ["token_id:5", "token_id:6"]
            assert choice["logprobs"]["text_offset"] == [0] * 5
            for fields in ({"prompt": "text"}, {"prompt": [5], "stop": "x"}):
                status, error = await served.post("/v1/completions", fields)
                assert status == 400
                assert "token" in error["error"]["message"]

    run(check())
