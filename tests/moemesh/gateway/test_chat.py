from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from moemesh.engine_client import GenerationRequest
from tests.moemesh.gateway.fake_engine import EOS, FakeEngine, token_logprob
from tests.moemesh.gateway.serving import run, serve, tiny_tokenizer


def says(text: str) -> FakeEngine:
    ids = [*tiny_tokenizer().encode(text, add_special_tokens=False), EOS]

    def script(request: GenerationRequest) -> list[int]:
        return ids

    return FakeEngine(script=script)


def test_the_shape_of_an_answer() -> None:
    async def check() -> None:
        async with serve(says("fine")) as served:
            body = await served.chat("hi")
            assert body["id"].startswith("chatcmpl-")
            assert body["object"] == "chat.completion"
            assert body["choices"] == [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "fine", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                    "stop_reason": None,
                }
            ]
            assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]

    run(check())


async def prompt_of(messages: list[Any], **fields: object) -> str:
    """The prompt that the engine gets for a conversation."""
    async with serve() as served:
        body = {"messages": messages, "max_tokens": 1, **fields}
        status, answer = await served.post("/v1/chat/completions", body)
        assert status == 200, answer
        assert served.tokenizer is not None
        return served.tokenizer.decode(served.engine.requests[0].prompt_token_ids)


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("messages", "fields", "prompt"),
    [
        ([USER], {}, "<bos><user>hi<assistant>"),
        ([USER], {"add_generation_prompt": False}, "<bos><user>hi"),
        ([USER], {"add_special_tokens": True}, "<bos><bos><user>hi<assistant>"),
        ([{"role": "system", "content": "S"}, USER], {}, "<bos>S<user>hi<assistant>"),
        (
            [USER, {"role": "assistant", "content": "so"}],
            {"continue_final_message": True},
            "<bos><user>hi<assistant>so",
        ),
        ([USER | {"name": None, "tool_calls": [], "audio": None}], {"tools": [], "tool_choice": "none"}, None),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {}, None),
    ],
)
def test_conversations_become_prompts(messages: list[Any], fields: dict[str, object], prompt: str | None) -> None:
    async def check() -> None:
        content = "a\nb" if isinstance(messages[-1]["content"], list) else "hi"
        assert await prompt_of(messages, **fields) == (prompt or f"<bos><user>{content}<assistant>")

    run(check())


def test_max_tokens_defaults_to_the_rest_of_the_context() -> None:
    async def check() -> None:
        async with serve(FakeEngine(max_model_len=20)) as served:
            body = await served.chat("hi")
            assert body["usage"]["total_tokens"] == 20
            for fields in (
                {"max_tokens": 2},
                {"max_completion_tokens": 2},
                {"max_tokens": 9, "max_completion_tokens": 2},
            ):
                assert (await served.chat("hi", **fields))["usage"]["completion_tokens"] == 2

    run(check())


def test_logprobs() -> None:
    async def check() -> None:
        async with serve(says("caf\u00e9")) as served:
            body = await served.chat("hi", logprobs=True, top_logprobs=2, return_token_ids=True, prompt_logprobs=0)
            choice = body["choices"][0]
            content = choice["logprobs"]["content"]
            prompt = served.engine.requests[0].prompt_token_ids
            assert body["prompt_token_ids"] == list(prompt)
            assert len(body["prompt_logprobs"]) == len(prompt)
            before = [prompt[-1], *choice["token_ids"]]
            for i, (token, entry) in enumerate(zip(choice["token_ids"], content, strict=True)):
                expected = token_logprob(token, before[i], len(prompt) + i, 2)
                assert entry["logprob"] == expected.logprob
                assert [top["logprob"] for top in entry["top_logprobs"]] == list(expected.top_logprobs)
            assert bytes(chain.from_iterable(entry["bytes"] for entry in content[:-1])).decode() == "caf\u00e9"
            plain = await served.chat("hi", logprobs=True)
            assert [entry["top_logprobs"] for entry in plain["choices"][0]["logprobs"]["content"]] == [[]] * len(
                content
            )

    run(check())


def test_a_stream_is_role_text_reason_usage_done() -> None:
    async def check() -> None:
        async with serve(says("one two")) as served:
            request: dict[str, Any] = {
                "messages": [USER],
                "stream_options": {"include_usage": True},
                "logprobs": True,
                "top_logprobs": 1,
                "return_token_ids": True,
            }
            role, *texts, end, usage, done = await served.events("/v1/chat/completions", request)
            assert role["object"] == "chat.completion.chunk"
            assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert role["prompt_token_ids"] == list(served.engine.requests[0].prompt_token_ids)
            assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in texts) == "one two"
            assert all(chunk["choices"][0]["finish_reason"] is None for chunk in texts)
            assert all(len(chunk["choices"][0]["logprobs"]["content"]) == 1 for chunk in texts)
            assert end["choices"][0]["delta"] == {}
            assert end["choices"][0]["finish_reason"] == "stop"
            assert usage["choices"] == []
            assert usage["usage"]["completion_tokens"] == len(texts)
            assert done == "[DONE]"

    run(check())


def test_streams_of_several_choices_are_told_apart_by_index() -> None:
    async def check() -> None:
        async with serve() as served:
            events = await served.events("/v1/chat/completions", {"messages": [USER], "n": 3, "max_tokens": 4})
            assert events.pop() == "[DONE]"
            for index in range(3):
                mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
                assert mine[0]["delta"]["role"] == "assistant"
                assert mine[-1]["finish_reason"] == "length"
                assert len(mine) == 6

    run(check())


def test_template_variables() -> None:
    async def check() -> None:
        async with serve(chat_template_kwargs={"bos_token": "A"}) as served:
            await served.chat("hi", max_tokens=1)
            await served.chat("hi", max_tokens=1, chat_template_kwargs={"bos_token": "B"})
            assert served.tokenizer is not None
            prompts = [served.tokenizer.decode(request.prompt_token_ids) for request in served.engine.requests]
            assert [prompt[0] for prompt in prompts] == ["A", "B"]

    run(check())
