"""The control plane in memory, in virtual time: what the production sockets do, including what they may delay or lose.

Messages of one socket stay in order and are encoded and decoded as on the wire. They may come late. What waits for a
name that is given up is lost, and a name that nobody bears takes none.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.simulation.virtual_time import VirtualLoop, VirtualTime
from transport import messages
from transport.control import Channel
from transport.errors import Overloaded
from transport.life import Life
from transport.messages import decode_message, encode_message


@dataclass
class Weather:
    """What may befall messages: they take up to `usual` seconds and, by the chance `slow`, up to `longest`."""

    usual: float = 0.002
    slow: float = 0.0
    longest: float = 0.0


@dataclass
class _Direction:
    """One direction of a socket: nothing overtakes, nothing arrives before `held_until`."""

    last_due: float = 0.0
    held_until: float = 0.0


class VirtualServer:
    """The frontend's end; implements ControlPlane. `observe` is told of everything that is sent to a rank."""

    def __init__(self, time: VirtualTime, loop: VirtualLoop, rng: random.Random, weather: Weather) -> None:
        self._time, self._loop, self._rng, self._weather = time, loop, rng, weather
        self._ports: dict[tuple[Life, Channel], VirtualPort] = {}
        self._arrived: asyncio.Queue[tuple[Life, bytes, object]] = asyncio.Queue()
        self.observe: Callable[[Life, messages.Message], None] = lambda life, message: None
        self.open = True
        self.note: object = None
        """What the sender noted beside the message that `receive` gave last."""

    def send(self, life: Life, message: messages.Message, channel: Channel = "rank") -> None:
        port = self._ports.get((life, channel))
        if port is None:
            raise Overloaded(f"{life} is not connected")
        self.observe(life, message)
        data = encode_message(message)
        self._carry(port.to_rank, lambda: port.arrive(life, data))

    def close(self) -> None:
        """Nobody is heard any more, and nobody hears."""
        self.open = False
        self._ports.clear()

    async def receive(self) -> tuple[Life, messages.Message]:
        life, data, self.note = await self._arrived.get()
        return life, decode_message(data)

    # --- for the ports

    def connect(self, port: VirtualPort) -> None:
        """The frontend knows a socket from its first greeting on."""
        life = port.life
        self._carry(port.to_frontend, lambda: self._loop.hear(lambda: self._greet(life, port)))

    def _greet(self, life: Life, port: VirtualPort) -> None:
        if self.open and port.life == life and port.open:
            self._ports[life, port.channel] = port

    def disconnect(self, port: VirtualPort) -> None:
        """What is under way to the socket is lost."""
        self._ports.pop((port.life, port.channel), None)

    def take(self, port: VirtualPort, message: messages.Message) -> None:
        """A rank says something."""
        life, data, note = port.life, encode_message(message), port.note()
        self._carry(port.to_frontend, lambda: self._loop.hear(lambda: self._arrived.put_nowait((life, data, note))))

    def _carry(self, direction: _Direction, arrive: Callable[[], None]) -> None:
        is_slow = self._rng.random() < self._weather.slow
        delay = self._rng.uniform(0.0001, self._weather.longest if is_slow else self._weather.usual)
        direction.last_due = max(direction.last_due, direction.held_until, self._time.now + delay)
        self._time.at(direction.last_due, arrive)


class VirtualPort:
    """One of a rank's two sockets; implements ControlPort and HeartPort. `wake` is called when something comes."""

    def __init__(self, server: VirtualServer, life: Life, channel: Channel, wake: Callable[[], None]) -> None:
        self._server = server
        self._wake = wake
        self._inbox: list[messages.Message] = []
        self.life = life
        self.channel: Channel = channel
        self.open = True
        self.to_rank, self.to_frontend = _Direction(), _Direction()
        self.note: Callable[[], object] = lambda: None
        self.rest: float | None = None
        """How long the rank wants to sleep."""
        server.connect(self)

    def begin_life(self, life: Life) -> None:
        self._server.disconnect(self)
        self._inbox.clear()
        self.life = life
        self._server.connect(self)

    def send(self, message: messages.Message) -> None:
        self._server.take(self, message)

    def receive_all(self) -> list[messages.Message]:
        received, self._inbox = self._inbox, []
        return received

    def wait(self, timeout_s: float, also: int | None = None) -> bool:
        self.rest = timeout_s
        return bool(self._inbox)

    def take_rest(self) -> float | None:
        """How long the rank wants to sleep since it was asked last; None where it does not."""
        rest, self.rest = self.rest, None
        return rest

    def arrive(self, life: Life, data: bytes) -> None:
        """A message for the life that had this socket when it was sent."""
        if self.open and life == self.life:
            self._inbox.append(decode_message(data))
            self._wake()

    def hold(self, until: float, *, outwards: bool, inwards: bool) -> None:
        """Nothing gets through before."""
        if outwards:
            self.to_frontend.held_until = max(self.to_frontend.held_until, until)
        if inwards:
            self.to_rank.held_until = max(self.to_rank.held_until, until)

    def close(self) -> None:
        """The process is gone. What it has said may still arrive."""
        self.open = False
        self._server.disconnect(self)
