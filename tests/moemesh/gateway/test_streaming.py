"""Clients that leave, that are slow, that wait long; and the port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable

import aiohttp
import pytest
from aiohttp import web

from moemesh.gateway import run_gateway
from moemesh.gateway.choices import Piece
from moemesh.gateway.event_stream import EventStream
from moemesh.gateway.piece_queue import run_choices
from moemesh.port import listen
from tests.moemesh.gateway.fake_engine import FakeEngine
from tests.moemesh.gateway.serving import run, serve


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(stream: bool) -> None:
    async def check() -> None:
        engine = FakeEngine(gate=asyncio.Semaphore(3))
        async with serve(engine) as served:
            async with aiohttp.ClientSession() as session:
                body = {"prompt": "hi", "stream": stream, "n": 3, "max_tokens": 50}
                leaving = asyncio.create_task(session.post(served.url + "/v1/completions", json=body))
                await until(lambda: engine.num_outputs == 3)
                leaving.cancel()
                await asyncio.gather(leaving, return_exceptions=True)
            await until(lambda: engine.closed == 3)
            assert served.metrics.open_requests._value.get() == 0
            assert 'moemesh_requests_total{outcome="cancelled"} 3.0' in served.metrics.render().decode()

    run(check())


def test_a_failed_choice_ends_the_others() -> None:
    async def check() -> None:
        engine = FakeEngine(error=RuntimeError("x"), fail_after=3)
        async with serve(engine) as served:
            status, _ = await served.post("/v1/completions", {"prompt": "hi", "n": 4})
            assert status == 500
            assert engine.closed == 4

    run(check())


def test_nobody_reads_ahead_for_a_slow_client() -> None:
    """Once the queue is full the engine's stream is left alone; when reading goes on, so does it."""

    async def check() -> None:
        made = 0

        async def pieces() -> AsyncGenerator[Piece, None]:
            nonlocal made
            for number in range(1000):
                made += 1
                yield Piece(index=0, finish_reason="stop" if number == 999 else None)

        async with run_choices([pieces()]) as queue:
            for _ in range(1000):
                await asyncio.sleep(0)
            assert 10 < made < 100
            count = 0
            while batch := await queue.next_pieces():
                count += len(batch)
            assert count == made == 1000

    run(check())


async def flood(events: EventStream) -> None:
    while True:
        await events.send([{"text": "x" * 1_000_000}])


def test_a_client_that_takes_nothing_is_let_go() -> None:
    async def check() -> None:
        let_go = asyncio.Event()

        async def talk(request: web.Request) -> web.StreamResponse:
            events = EventStream(request, client_timeout_s=0.1)
            await events.open()
            with pytest.raises(ConnectionResetError, match=r"took nothing for 0\.1 seconds"):
                await flood(events)
            let_go.set()
            return events.response

        app = web.Application()
        app.router.add_get("/", talk)
        (bound,) = listen("127.0.0.1", 0)
        address = bound.getsockname()
        async with run_gateway(app, [bound]):
            _, writer = await asyncio.open_connection(*address, limit=1024)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await let_go.wait()
            writer.transport.abort()

    run(check())


def test_a_request_that_does_not_arrive_is_let_go() -> None:
    async def check() -> None:
        async with serve(client_timeout_s=0.1) as served:
            host, port = served.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: 10\r\n\r\n{")
            answer = await reader.readuntil(b"}}")
            assert b" 408 " in answer
            writer.close()
            await writer.wait_closed()

    run(check())


def test_silence_is_broken_by_comments() -> None:
    async def check() -> None:
        engine = FakeEngine(gate=asyncio.Semaphore(0))
        async with serve(engine, keep_alive_s=0.01) as served:
            body = {"prompt": "hi", "stream": True, "max_tokens": 2}
            async with served.session.post(served.url + "/v1/completions", json=body) as response:
                assert response.headers["Cache-Control"] == "no-cache"
                assert (await response.content.readuntil(b"\n\n")) == b": keep-alive\n\n"
                assert engine.gate is not None
                engine.gate.release()
                engine.gate.release()
                text = await response.text()
            assert text.count("data: ") == 3

    run(check())


def test_headers_do_not_wait_for_a_first_token_that_takes_long() -> None:
    async def check() -> None:
        engine = FakeEngine(gate=asyncio.Semaphore(0))
        async with serve(engine, headers_after_s=0.01) as served:
            body = {"prompt": "hi", "stream": True, "max_tokens": 1}
            async with served.session.post(served.url + "/v1/completions", json=body) as response:
                assert response.status == 200
                assert engine.num_outputs == 0
                assert engine.gate is not None
                engine.gate.release()
                assert (await response.text()).endswith("data: [DONE]\n\n")

    run(check())


def test_the_port_is_free_when_serving_ends() -> None:
    async def check() -> None:
        async with serve() as served:
            port = int(served.url.rpartition(":")[2])
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))

    run(check())
