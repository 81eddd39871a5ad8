from __future__ import annotations

from typing import Any

import pytest

from moemesh.gateway.auth import OPEN_PATHS, KeyRing
from tests.moemesh.gateway.fake_engine import FakeEngine
from tests.moemesh.gateway.serving import run, serve
from tests.moemesh.tiny_tokenizer import CHAT_TEMPLATE


def test_models() -> None:
    async def check() -> None:
        async with serve() as served:
            status, body = await served.get("/v1/models")
            assert status == 200
            assert [model["id"] for model in body["data"]] == ["m", "org/m"]
            assert body["data"][0]["max_model_len"] == 128
            for name in ("m", "org/m"):
                status, model = await served.get(f"/v1/models/{name}")
                assert (status, model["id"]) == (200, name)
            await served.complete("x", model="org/m")
            assert (await served.complete("x", model=None))["model"] == "m"

    run(check())


@pytest.mark.parametrize(
    ("state", "ready", "degraded", "expected"),
    [
        ("ready", True, False, 200),
        ("ready", True, True, 200),
        ("ready", False, False, 503),
        ("loading", False, False, 503),
        ("draining", False, False, 503),
        ("failed", False, False, 503),
    ],
)
def test_health(state: Any, ready: bool, degraded: bool, expected: int) -> None:
    async def check() -> None:
        engine = FakeEngine(state=state, ready=ready, degraded=degraded, detail="rank 2 is dead")
        async with serve(engine) as served:
            status, body = await served.get("/health")
            assert status == expected
            assert (body["state"], body["degraded"], body["detail"]) == (state, degraded, "rank 2 is dead")
            assert ("error" in body) == (expected == 503)
            assert (await served.get("/live"))[0] == 200

    run(check())


def test_version_and_mesh() -> None:
    async def check() -> None:
        async with serve(version="1.2") as served:
            assert await served.get("/version") == (200, {"version": "1.2"})
            assert await served.get("/mesh") == (200, {"epoch": 1, "ranks": []})

    run(check())


def test_tokenize_and_detokenize() -> None:
    async def check() -> None:
        async with serve() as served:
            _, body = await served.post("/tokenize", {"prompt": "hello", "model": "m", "return_token_strs": True})
            assert body["tokens"][0] == 0
            assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 128)
            assert body["token_strs"][0] == "<bos>"
            _, plain = await served.post("/tokenize", {"prompt": "hello", "add_special_tokens": False})
            assert plain["tokens"] == body["tokens"][1:]
            assert "token_strs" not in plain
            assert await served.post("/detokenize", {"tokens": plain["tokens"]}) == (200, {"prompt": "hello"})
            assert await served.post("/detokenize", {"tokens": []}) == (200, {"prompt": ""})
            _, chat = await served.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
            _, text = await served.post("/detokenize", {"tokens": chat["tokens"]})
            assert text == {"prompt": "<bos><user>hi<assistant>"}
            empty = await served.post("/tokenize", {"prompt": "", "add_special_tokens": False})
            assert empty[1]["tokens"] == []

    run(check())


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "either"),
        ("/tokenize", {"prompt": 3}, "a string"),
        ("/tokenize", {"prompt": "x", "chat_template": "y"}, "not supported"),
        ("/detokenize", {}, "missing"),
        ("/detokenize", {"tokens": "x"}, "token ids"),
        ("/detokenize", {"tokens": [1.5]}, "token ids"),
        ("/detokenize", {"tokens": [300]}, "out of range"),
    ],
)
def test_what_they_refuse(path: str, body: dict[str, Any], words: str) -> None:
    async def check() -> None:
        async with serve() as served:
            status, answer = await served.post(path, body)
            assert status == 400
            assert words in answer["error"]["message"]

    run(check())


def test_tokenizer_info_is_what_lm_eval_reads() -> None:
    async def check() -> None:
        async with serve() as served:
            status, info = await served.get("/tokenizer_info")
            assert status == 200
            assert (info["bos_token"], info["eos_token"]) == ("<bos>", "<eos>")
            assert info["chat_template"] == CHAT_TEMPLATE
            assert info["tokenizer_class"]
        async with serve(with_tokenizer=False) as served:
            assert (await served.get("/tokenizer_info"))[0] == 404
            assert (await served.post("/tokenize", {"prompt": "x"}))[0] == 400
            assert (await served.post("/detokenize", {"tokens": [1]}))[0] == 400

    run(check())


def test_metrics_count_what_happened() -> None:
    async def check() -> None:
        async with serve() as served:
            await served.complete([5, 6], max_tokens=3)
            await served.get("/nowhere")
            async with served.session.get(served.url + "/metrics") as response:
                assert response.status == 200
                assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                lines = (await response.text()).splitlines()
            for line in (
                "moemesh_prompt_tokens_total 2.0",
                "moemesh_generation_tokens_total 3.0",
                'moemesh_requests_total{outcome="length"} 1.0',
                "moemesh_time_to_first_token_seconds_count 1.0",
                "moemesh_inter_token_latency_seconds_count 2.0",
                "moemesh_e2e_request_latency_seconds_count 1.0",
                "moemesh_open_requests 0.0",
                'moemesh_http_requests_total{method="POST",path="/v1/completions",status="200"} 1.0',
                'moemesh_http_requests_total{method="GET",path="other",status="404"} 1.0',
            ):
                assert line in lines

    run(check())


def test_every_path_but_two_wants_a_key() -> None:
    async def check() -> None:
        async with serve(api_keys=("first-key", "second-key")) as served:
            _, document = await served.get("/openapi.json", Authorization="Bearer first-key")
            paths = [path.replace("{model}", "m") for path in document["paths"]]
            assert len(paths) > 10
            for path in [*paths, "/openapi.json", "/nowhere", "//live", "/live/", "/health?x=1", "/LIVE"]:
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-key"}):
                    status, body = await served.get(path, **headers)
                    if path.partition("?")[0] in OPEN_PATHS:
                        assert status == 200
                    else:
                        assert (status, body["error"]["code"]) == (401, "invalid_api_key"), path
            for key in ("first-key", "second-key"):
                assert (await served.get("/v1/models", Authorization=f"Bearer {key}"))[0] == 200
            status, body = await served.post("/v1/completions", {"prompt": "x"})
            assert status == 401
            assert served.engine.requests == []
            assert "securitySchemes" in document["components"]

    run(check())


@pytest.mark.parametrize(
    ("key", "admitted"), [("a", True), ("bb", True), ("", False), ("A", False), ("a\udcff", False)]
)
def test_key_ring(key: str, admitted: bool) -> None:
    assert KeyRing(["a", "bb"]).admits(key) == admitted


def test_openapi_names_every_endpoint_and_field() -> None:
    async def check() -> None:
        async with serve() as served:
            status, document = await served.get("/openapi.json")
            assert status == 200
            assert document["openapi"].startswith("3.1")
            completion = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
            properties = completion["schema"]["properties"]
            assert {"prompt", "max_tokens", "stop", "logprobs", "echo", "seed", "stream"} <= set(properties)
            for path, operations in document["paths"].items():
                for method in operations:
                    url = served.url + path.replace("{model}", "m")
                    async with served.session.request(method, url, json={} if method == "post" else None) as response:
                        assert response.status in (200, 400), (method, path)

    run(check())
