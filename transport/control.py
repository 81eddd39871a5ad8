"""Control sockets: the frontend's ROUTER (asyncio) and each rank's DEALER (synchronous, for the engine thread).

On one host over `ipc://` in a directory that only its owner may enter; across hosts over TCP with CURVE, where every
client must know the server's public key and the server admits the one client key it gave out. Messages are msgpack (see
messages); what cannot be read is counted and dropped. Queues are bounded and closing never waits (linger 0).

Who says something is a life of a rank, by the name of its socket: late words of a dead one are not taken for those of
its successor. Each has two sockets: one for its engine, one for the thread that is its heart.
"""

import asyncio
import os
import re
import select
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import zmq
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator

from transport.errors import Overloaded, ProtocolError
from transport.life import Life
from transport.messages import MAX_MESSAGE_BYTES, Message, decode_message, encode_message

Channel = Literal["rank", "heart"]
"""Which of a life's two sockets."""

HIGH_WATER_MARK = 10_000
"""Messages that wait in each direction for each peer before sending fails."""

_EVENTS, _READABLE = zmq.EVENTS, int(zmq.POLLIN)
_NAME = re.compile(rb"(?:rank|heart) (\d{1,9}) (\d{1,9})")


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveKeys:
    """Keys of one mesh, Z85. A server needs all four; a client all but the server's secret key (see `for_client`)."""

    server_public: str
    server_secret: str
    client_public: str
    client_secret: str

    def for_client(self) -> "CurveKeys":
        """What may be handed to a rank."""
        return CurveKeys(
            server_public=self.server_public,
            server_secret="",
            client_public=self.client_public,
            client_secret=self.client_secret,
        )


def new_curve_keys() -> CurveKeys:
    """Fresh keys for one mesh."""
    server_public, server_secret = (key.decode() for key in zmq.curve_keypair())
    client_public, client_secret = (key.decode() for key in zmq.curve_keypair())
    return CurveKeys(
        server_public=server_public,
        server_secret=server_secret,
        client_public=client_public,
        client_secret=client_secret,
    )


def check_endpoint(endpoint: str, keys: CurveKeys | None) -> None:
    """Refuse an endpoint that strangers could reach: an ipc path in a shared directory, TCP without keys."""
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
            raise ValueError(f"control path {path} is longer than {zmq.IPC_PATH_MAX_LEN} bytes: set a shorter TMPDIR")
        folder = Path(path).parent
        status = folder.stat()
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077 or status.st_uid != os.getuid():
            raise ValueError(f"control folder {folder} has mode {mode:04o}, owner {status.st_uid}: needs 0700, our own")
    elif not endpoint.startswith("tcp://"):
        raise ValueError(f"control endpoint {endpoint!r} is neither ipc:// nor tcp://")
    elif keys is None:
        raise ValueError(f"control endpoint {endpoint} needs keys: pass new_curve_keys()")


class ControlServer:
    """The frontend's end: talks to the lives of ranks. Must be made and used on one running asyncio event loop."""

    def __init__(self, *endpoints: str, keys: CurveKeys | None = None) -> None:
        """Bind. For `tcp://host:*` the attribute `endpoints` says the port that was found.

        Raises ValueError for an unsafe endpoint, OSError (zmq.ZMQError) for one in use.
        """
        for endpoint in endpoints:
            check_endpoint(endpoint, keys)
        self.malformed = 0
        # Not zmq.asyncio: its futures and timers cost several times what the messages do.
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Future[None] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator: AsyncioAuthenticator | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        _bound(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A socket that was cut off and comes back takes over its name.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            if keys is not None:
                self._require_keys(keys)
            self.endpoints = tuple(self._bind(endpoint) for endpoint in endpoints)
            self._loop.add_reader(self._socket.fileno(), self._look)
        except BaseException:
            self.close()
            raise

    def _bind(self, endpoint: str) -> str:
        self._socket.bind(endpoint)
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _require_keys(self, keys: CurveKeys) -> None:
        provider = _OneClient(keys.client_public)
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", credentials_provider=provider)
        self._socket.curve_server = True
        self._socket.curve_publickey = keys.server_public.encode()
        self._socket.curve_secretkey = keys.server_secret.encode()

    def send(self, life: Life, message: Message, channel: Channel = "rank") -> None:
        """Queue a message for a rank. Raises Overloaded when it is not connected or its queue is full."""
        try:
            self._socket.send_multipart((_identity(life, channel), encode_message(message)), flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            raise Overloaded(f"control message to {life} was not sent: {error}") from None
        finally:
            self._look()

    async def receive(self) -> tuple[Life, Message]:
        """The next message and who sent it; for one task. Malformed ones are counted in `malformed` and skipped."""
        while True:
            while not _has_message(self._socket):
                await self._arrival()
            try:
                return _read(self._socket.recv_multipart(flags=zmq.DONTWAIT))
            except ProtocolError:
                self.malformed += 1

    async def _arrival(self) -> None:
        self._arrived = self._loop.create_future()
        try:
            await self._arrived
        finally:
            self._arrived = None

    def _look(self) -> None:
        """Wake the receiver if a message is there. The descriptor says only once that there may be news, and whoever
        uses the socket then, be it to send, has taken that in: hence after every sending, too."""
        there = _has_message(self._socket)
        if there and self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def close(self) -> None:
        """Close at once; what was not sent is lost."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close(linger=0)
        self._context.term()


class ControlClient:
    """A rank's end. For one thread; nothing blocks but `wait`."""

    def __init__(self, endpoint: str, life: Life, *, channel: Channel = "rank", keys: CurveKeys | None = None) -> None:
        """Connect (the server may come later). Raises ValueError for an unsafe endpoint."""
        check_endpoint(endpoint, keys)
        self.malformed = 0
        self._endpoint = endpoint
        self._channel: Channel = channel
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        if hasattr(os, "SCHED_BATCH"):
            # ZeroMQ's thread wakes at every sending: it is not to take the core from the kernels that go on then.
            self._context.set(zmq.THREAD_SCHED_POLICY, os.SCHED_BATCH)
        self.life = life
        self._socket = self._connected()

    def begin_life(self, life: Life) -> None:
        """Speak as `life` from now on. What was said before and has not left is lost."""
        self._socket.close(linger=0)
        self.life = life
        self._socket = self._connected()

    def _connected(self) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.DEALER)
        _bound(socket)
        socket.setsockopt(zmq.IDENTITY, _identity(self.life, self._channel))
        if self._keys is not None:
            socket.curve_serverkey = self._keys.server_public.encode()
            socket.curve_publickey = self._keys.client_public.encode()
            socket.curve_secretkey = self._keys.client_secret.encode()
        socket.connect(self._endpoint)
        return socket

    def send(self, message: Message) -> None:
        """Queue a message for the frontend. Raises Overloaded when the queue is full."""
        try:
            self._socket.send(encode_message(message), flags=zmq.DONTWAIT)
        except zmq.Again:
            raise Overloaded(
                f"{HIGH_WATER_MARK} control messages of {self.life} wait: the frontend takes none of them"
            ) from None

    def receive_all(self) -> list[Message]:
        """All messages that are there. Malformed ones are counted in `malformed` and skipped."""
        messages: list[Message] = []
        while _has_message(self._socket):
            try:
                messages.append(decode_message(self._socket.recv(flags=zmq.DONTWAIT)))
            except ProtocolError:
                self.malformed += 1
        return messages

    def wait(self, timeout_s: float, also: int | None = None) -> bool:
        """Sleep until a message is there, `also` (a file's descriptor) is readable, or the time is over; says whether a
        message is there. The engine's idle sleep."""
        # Not ZeroMQ's poll: that counts in milliseconds. Its descriptor only says that there may be something new.
        deadline = time.monotonic() + timeout_s
        files = [self._socket.fileno()] if also is None else [self._socket.fileno(), also]
        while not _has_message(self._socket):
            left = deadline - time.monotonic()
            readable, _, _ = select.select(files, (), (), max(0.0, left))
            if also in readable or left <= 0:
                return _has_message(self._socket)
        return True

    def close(self, *, linger_s: float = 0.0) -> None:
        """Close, after at most `linger_s` for what has not been sent; the rest is lost."""
        self._socket.close(linger=int(linger_s * 1000))
        self._context.term()


class _OneClient:
    """Admits the one client key of the mesh."""

    def __init__(self, client_public: str) -> None:
        self._key = client_public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._key


def _has_message(socket: "zmq.Socket[bytes]") -> bool:
    # Asked at every turn of a rank's loop: the exception of an empty socket would cost more than the rest of it.
    return bool(int(socket.get(_EVENTS)) & _READABLE)


def _bound(socket: "zmq.Socket[bytes]") -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)


def _identity(life: Life, channel: Channel) -> bytes:
    # A name that begins with a zero byte is reserved by ZeroMQ.
    return b"%s %d %d" % (channel.encode(), life.rank, life.incarnation)


def _read(parts: list[bytes]) -> tuple[Life, Message]:
    name = _NAME.fullmatch(parts[0]) if len(parts) == 2 else None
    if name is None:
        raise ProtocolError(f"control message of {len(parts)} parts is not from a rank")
    return Life(int(name.group(1)), int(name.group(2))), decode_message(parts[1])
