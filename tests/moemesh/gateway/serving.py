"""A gateway on a real port of this machine, and what tests say to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from tokenizers import Tokenizer as Backend

from moemesh.chat_template import ChatTemplate
from moemesh.gateway import GatewayOptions, create_app, run_gateway
from moemesh.metrics import Metrics
from moemesh.port import listen
from moemesh.tokenizer import Tokenizer
from tests.moemesh.gateway.fake_engine import FakeEngine
from tests.moemesh.tiny_tokenizer import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, USER, tokenizer_json

SPECIAL = {"bos_token": BOS, "eos_token": EOS, "user_token": USER, "assistant_token": ASSISTANT}


def tiny_tokenizer() -> Tokenizer:
    config = {"bos_token": {"content": BOS}, "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    return Tokenizer(Backend.from_str(tokenizer_json()), decoder={"type": "ByteLevel"}, config=config)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running gateway. `post` and `get` give (status, JSON)."""

    url: str
    session: aiohttp.ClientSession
    engine: FakeEngine
    tokenizer: Tokenizer | None
    metrics: Metrics

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | headers
        async with self.session.post(self.url + path, data=data, headers=headers) as response:
            return response.status, await response.json()

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path, headers=headers) as response:
            return response.status, await response.json()

    async def complete(self, prompt: object, **fields: object) -> Any:
        status, body = await self.post("/v1/completions", {"model": "m", "prompt": prompt, **fields})
        assert status == 200, body
        return body

    async def chat(self, content: object = "hi", **fields: object) -> Any:
        messages = [{"role": "user", "content": content}]
        status, body = await self.post("/v1/chat/completions", {"model": "m", "messages": messages, **fields})
        assert status == 200, body
        return body

    async def events(self, path: str, body: dict[str, object]) -> list[Any]:
        """The payloads of a stream, the last one "[DONE]" if it was whole."""
        async with self.session.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            text = await response.text()
        lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


@asynccontextmanager
async def serve(
    engine: FakeEngine | None = None, *, with_tokenizer: bool = True, **options: Any
) -> AsyncIterator[Served]:
    engine = engine or FakeEngine()
    tokenizer = tiny_tokenizer() if with_tokenizer else None
    template = ChatTemplate(CHAT_TEMPLATE, special_tokens=SPECIAL) if with_tokenizer else None
    metrics = Metrics()
    app = create_app(
        engine, GatewayOptions(**({"served_model_names": ("m", "org/m")} | options)), tokenizer, template, metrics
    )
    sockets = listen("127.0.0.1", 0)
    async with run_gateway(app, sockets), aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        yield Served(url=url, session=session, engine=engine, tokenizer=tokenizer, metrics=metrics)


def run(test: Coroutine[Any, Any, None]) -> None:
    """Runs one test on a loop of its own, never longer than a machine under load may need."""

    async def limited() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(limited())
