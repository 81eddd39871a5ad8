"""Control sockets over ipc and over TCP with keys."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from transport import control
from transport.control import ControlClient, ControlServer, CurveKeys, new_curve_keys
from transport.errors import Overloaded
from transport.life import Life
from transport.messages import (
    Cancel,
    Drain,
    Failed,
    Heard,
    Heartbeat,
    Hello,
    Message,
    Ready,
    Stop,
    Submit,
    encode_message,
)

HELLO = Hello(3, 1, 0, "host", 1, "avx2")
PATIENCE_S = 10.0
"""Only a failing test waits this long."""


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, CurveKeys | None]:
    if request.param == "ipc":
        tmp_path.chmod(0o700)
        return f"ipc://{tmp_path}/control", None
    return "tcp://127.0.0.1:*", new_curve_keys()


@contextmanager
def server_at(endpoint: tuple[str, CurveKeys | None]) -> Iterator[ControlServer]:
    server = ControlServer(endpoint[0], keys=endpoint[1])
    try:
        yield server
    finally:
        server.close()


@contextmanager
def client_of(server: ControlServer, rank: int, keys: CurveKeys | None) -> Iterator[ControlClient]:
    client = ControlClient(server.endpoints[0], Life(rank), keys=keys and keys.for_client())
    try:
        yield client
    finally:
        client.close()


async def heard(server: ControlServer) -> tuple[Life, Message]:
    return await asyncio.wait_for(server.receive(), PATIENCE_S)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await body()

    asyncio.run(main())


def test_both_ways_in_order(endpoint: tuple[str, CurveKeys | None]) -> None:
    async def body() -> None:
        with server_at(endpoint) as server, client_of(server, 3, endpoint[1]) as client:
            client.send(HELLO)
            client.send(Ready(3, 7))
            assert await heard(server) == (Life(3), HELLO)
            assert await heard(server) == (Life(3), Ready(3, 7))
            assert client.receive_all() == []
            sent: list[Message] = [Submit(1, [1, 2], {"n": 1}, []), Cancel(1), Drain()]
            for message in sent:
                server.send(Life(3), message)
            got: list[Message] = []
            while len(got) < len(sent):
                assert client.wait(PATIENCE_S)
                got += client.receive_all()
            assert got == sent

    run(body)


def test_sending_does_not_lose_what_arrives_meanwhile(endpoint: tuple[str, CurveKeys | None]) -> None:
    """The server's send is synchronous and its receive is not: neither may starve the other."""

    async def body() -> None:
        with server_at(endpoint) as server, client_of(server, 0, endpoint[1]) as client:
            client.send(HELLO)
            await heard(server)
            for number in range(200):
                pending = asyncio.ensure_future(heard(server))
                await asyncio.sleep(0)
                client.send(Ready(0, number))
                server.send(Life(0), Cancel(number))
                assert await pending == (Life(0), Ready(0, number))

    run(body)


def test_each_life_has_its_own_name_and_a_heart(endpoint: tuple[str, CurveKeys | None]) -> None:
    async def body() -> None:
        keys = endpoint[1] and endpoint[1].for_client()
        with server_at(endpoint) as server, client_of(server, 1, endpoint[1]) as client:
            heart = ControlClient(server.endpoints[0], Life(1, 1), channel="heart", keys=keys)
            client.send(HELLO)
            assert await heard(server) == (Life(1), HELLO)
            client.begin_life(Life(1, 1))
            client.send(HELLO)
            assert await heard(server) == (Life(1, 1), HELLO)
            heart.send(Heartbeat(5, True))
            assert await heard(server) == (Life(1, 1), Heartbeat(5, True))
            server.send(Life(1, 1), Heard(), "heart")
            server.send(Life(1, 1), Stop())
            for end, expected in ((heart, Heard()), (client, Stop())):
                assert end.wait(PATIENCE_S)
                assert end.receive_all() == [expected]
            heart.close()

    run(body)


def test_unknown_rank_is_refused(endpoint: tuple[str, CurveKeys | None]) -> None:
    async def body() -> None:
        with server_at(endpoint) as server, pytest.raises(Overloaded, match="rank 9 was not sent"):
            server.send(Life(9), Stop())

    run(body)


def test_malformed_messages_are_counted_and_skipped(tmp_path: Path) -> None:
    async def body() -> None:
        tmp_path.chmod(0o700)
        endpoint = f"ipc://{tmp_path}/control"
        context = zmq.Context()
        with server_at((endpoint, None)) as server, context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            stranger.identity = b"rank 1 0"
            stranger.connect(endpoint)
            for parts in ([b"junk"], [b"a", b"b"], [b""], [encode_message(Ready(1, 2))]):
                stranger.send_multipart(parts)
            assert await heard(server) == (Life(1), Ready(1, 2))
            assert server.malformed == 3
        context.term()

    run(body)


def test_nameless_peers_are_ignored(tmp_path: Path) -> None:
    async def body() -> None:
        tmp_path.chmod(0o700)
        endpoint = f"ipc://{tmp_path}/control"
        context = zmq.Context()
        with server_at((endpoint, None)) as server, context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            stranger.connect(endpoint)
            stranger.send(encode_message(Stop()))
            stranger.identity = b"rank 2"
            stranger.connect(endpoint)
            with client_of(server, 1, None) as client:
                client.send(HELLO)
                assert await heard(server) == (Life(1), HELLO)
        context.term()

    run(body)


def test_strangers_keys_are_refused() -> None:
    """A client with the server's public key but another key pair gets nowhere; the right one does."""

    async def body() -> None:
        keys, other = new_curve_keys(), new_curve_keys()
        forged = CurveKeys(
            server_public=keys.server_public,
            server_secret="",
            client_public=other.client_public,
            client_secret=other.client_secret,
        )
        with server_at(("tcp://127.0.0.1:*", keys)) as server, client_of(server, 5, forged) as stranger:
            stranger.send(Failed(5, "let me in"))
            with client_of(server, 1, keys) as client:
                client.send(HELLO)
                assert await heard(server) == (Life(1), HELLO)
            assert server.malformed == 0

    run(body)


def test_server_that_is_not_there_fills_a_bounded_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(control, "HIGH_WATER_MARK", 5)
    client = ControlClient(f"ipc://{tmp_path}/nobody", Life(0))
    for number in range(5):
        client.send(Ready(0, number))
    with pytest.raises(Overloaded, match="5 control messages of rank 0 wait"):
        client.send(Ready(0, 5))
    client.close()


def test_wait_ends_without_a_message(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    client = ControlClient(f"ipc://{tmp_path}/nobody", Life(0))
    assert [client.wait(timeout) for timeout in (0.0, 0.0001, 0.001)] == [False, False, False]
    client.close()


def test_unsafe_endpoints_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ValueError, match=r"has mode 0755.* needs 0700"):
        ControlClient(f"ipc://{tmp_path}/control", Life(0))
    with pytest.raises(ValueError, match=r"tcp://127.0.0.1:1 needs keys"):
        ControlClient("tcp://127.0.0.1:1", Life(0))
    with pytest.raises(ValueError, match=r"longer than \d+ bytes: set a shorter TMPDIR"):
        ControlClient(f"ipc:///{'x' * 120}", Life(0))
    with pytest.raises(ValueError, match="neither ipc:// nor tcp://"):
        ControlClient("inproc://x", Life(0))


def test_ranks_get_no_server_secret() -> None:
    keys = new_curve_keys()
    assert keys.for_client().server_secret == ""
    assert keys.server_secret not in repr(keys.for_client())
