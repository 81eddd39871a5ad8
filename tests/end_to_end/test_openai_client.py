"""The `openai` package, which nobody here wrote, against a mesh of two ranks that wants an API key."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.end_to_end.harness import ANSWER_SECONDS, DEMO_NAME, SMALL_CACHE, Mesh, running_server

KEY = "a-secret"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You explain Python."},
    {"role": "user", "content": "What does os.path.join do?"},
]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running_server("--ranks", "2", "--api-key", KEY, *SMALL_CACHE) as mesh:
        yield mesh


def connect(mesh: Mesh, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=key, max_retries=0, timeout=ANSWER_SECONDS)


@pytest.fixture
def client(mesh: Mesh) -> Iterator[openai.OpenAI]:
    with connect(mesh, KEY) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [DEMO_NAME]
    assert client.models.retrieve(DEMO_NAME).owned_by == "moemesh"


def test_text_ids_and_lists_of_both(mesh: Mesh, client: openai.OpenAI) -> None:
    text = "import os"
    headers = {"Authorization": f"Bearer {KEY}"}
    ids = mesh.post("/tokenize", {"prompt": text}, **headers).body["tokens"]
    texts = []
    for prompt in (text, ids, [text], [ids]):
        answer = client.completions.create(model=DEMO_NAME, prompt=prompt, max_tokens=8, temperature=0)
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 8)
        assert answer.choices[0].finish_reason == "length"
        texts.append(answer.choices[0].text)
    assert len(set(texts)) == 1
    assert texts[0]


def test_stream_with_usage_is_the_same_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=DEMO_NAME, prompt="def main(", max_tokens=20, temperature=0)
    stream = client.completions.create(
        model=DEMO_NAME,
        prompt="def main(",
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage == whole.usage


def test_seed_and_n(client: openai.OpenAI) -> None:
    def texts(seed: int, n: int) -> list[str]:
        answer = client.completions.create(
            model=DEMO_NAME, prompt="The", max_tokens=12, n=n, seed=seed, temperature=1.0, top_p=1.0
        )
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.text for choice in answer.choices]

    first = texts(7, 3)
    assert texts(7, 3) == first
    assert len(set(first)) > 1
    assert texts(8, 3) != first
    assert texts(7, 1) == first[:1]


def test_stop(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=DEMO_NAME, prompt="Return", max_tokens=24, temperature=0)
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:3]
    cut = client.completions.create(model=DEMO_NAME, prompt="Return", max_tokens=24, temperature=0, stop=[stop])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_echo_and_logprobs(client: openai.OpenAI) -> None:
    scored = client.completions.create(
        model=DEMO_NAME, prompt="import sys\nimport os", max_tokens=0, echo=True, logprobs=2
    )
    choice = scored.choices[0]
    assert choice.text == "import sys\nimport os"
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert logprobs.token_logprobs
    assert logprobs.top_logprobs
    assert logprobs.text_offset is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    assert logprobs.token_logprobs[0] is None
    for token, logprob, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[
        1:
    ]:
        assert top[token] == logprob
        assert max(top.values()) >= logprob


def test_chat_plain_and_streamed(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model=DEMO_NAME, messages=MESSAGES, max_completion_tokens=16, temperature=0)
    message = plain.choices[0].message
    assert message.role == "assistant"
    assert message.content
    chunks = list(
        client.chat.completions.create(
            model=DEMO_NAME, messages=MESSAGES, max_completion_tokens=16, temperature=0, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=DEMO_NAME, messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy: the token is the best one
        assert entry.token == entry.top_logprobs[0].token


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=DEMO_NAME) as caught:
        client.completions.create(model="gpt-5", prompt="a")
    assert caught.value.code == "model_not_found"


def test_prompt_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"2048 tokens, but the prompt has 3000") as caught:
        client.completions.create(model=DEMO_NAME, prompt=[5] * 3000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"2048 .* 10 tokens and 2040 tokens are asked for"):
        client.completions.create(model=DEMO_NAME, prompt=[5] * 10, max_tokens=2040)


def test_wrong_values_name_their_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=DEMO_NAME, prompt="a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=DEMO_NAME, messages=MESSAGES, response_format={"type": "json_object"})
    assert caught.value.param == "response_format"


def test_wrong_key(mesh: Mesh) -> None:
    with connect(mesh, "another") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
