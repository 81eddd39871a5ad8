"""The endpoint's port, taken before anything is loaded."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import cast

_BACKLOG = 1024

# `localhost` often names an IPv6 address on machines without IPv6; its other address will do.
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

_Address = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]


class PortError(OSError):
    """The endpoint's address cannot be had; the message names it and the remedy."""


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, one for each address of `host`; port 0 gives them all the same free port.

    The caller owns them. They hold the port from now on: connections queue until somebody accepts. Raises PortError.
    """
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, address in _addresses(host, port):
            chosen = _with_port(address, sockets[0].getsockname()[1]) if sockets else address
            try:
                sockets.append(_listen_on(family, chosen))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error
        if absent is not None and not sockets:
            raise absent
    except OSError as error:
        for taken in sockets:
            taken.close()
        raise _explained(error, host, port) from error
    return sockets


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """`listen`, for as long as the block runs."""
    sockets = listen(host, port)
    try:
        yield sockets
    finally:
        for taken in sockets:
            taken.close()


def check_port_free(host: str, port: int) -> None:
    """Raises PortError when `listen` would now."""
    with listening(host, port):
        return


def _addresses(host: str, port: int) -> list[tuple[int, _Address]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((int(family), address) for family, _, _, _, address in found))


def _with_port(address: _Address, port: int) -> _Address:
    host, _, *rest = address
    return cast(_Address, (host, port, *rest))


def _listen_on(family: int, address: _Address) -> socket.socket:
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Reuse lets a restart follow at once. On Linux it never allows two listeners: not bind, then listen tells.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(address)
        taken.listen(_BACKLOG)
        taken.setblocking(False)
    except BaseException:
        taken.close()
        raise
    return taken


def _explained(error: OSError, host: str, port: int) -> PortError:
    if error.errno == errno.EADDRINUSE:
        return PortError(f"{host}:{port} is in use by another process; stop it or choose another --port")
    if isinstance(error, socket.gaierror):
        return PortError(f"--host {host} is no address of this machine: {error.strerror}")
    if error.errno == errno.EADDRNOTAVAIL:
        return PortError(f"--host {host} is no address of this machine; use 127.0.0.1 or 0.0.0.0")
    if error.errno == errno.EACCES:
        return PortError(f"{host}:{port} is not allowed for this user; choose a --port from 1024 on")
    return PortError(f"cannot listen on {host}:{port}: {error.strerror}")
