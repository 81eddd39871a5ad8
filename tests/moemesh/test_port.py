"""A port in use is refused by name; a port taken is held."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from moemesh.port import PortError, check_port_free, listen


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    (taken,) = listen("127.0.0.1", 0)
    with closing(taken):
        yield taken


def test_a_second_listener_is_refused_by_name(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    with pytest.raises(PortError, match=f"127.0.0.1:{port} is in use by another process; stop it or choose another"):
        check_port_free("127.0.0.1", port)


def test_an_address_of_all_networks_collides_with_one_of_them(listening: socket.socket) -> None:
    with pytest.raises(PortError, match="is in use"):
        check_port_free("0.0.0.0", listening.getsockname()[1])


def test_connections_wait_until_somebody_accepts(listening: socket.socket) -> None:
    with closing(socket.create_connection(listening.getsockname(), timeout=5)) as client:
        client.sendall(b"early")
        listening.setblocking(True)
        connection, _ = listening.accept()
        with closing(connection):
            assert connection.recv(5) == b"early"


def test_a_closed_port_is_free_at_once(listening: socket.socket) -> None:
    address = listening.getsockname()
    with closing(socket.create_connection(address, timeout=5)):
        connection, _ = listening.accept()
        connection.close()  # this side goes to TIME_WAIT
    listening.close()
    check_port_free(*address)


def test_all_addresses_of_a_host_get_one_port() -> None:
    sockets = listen("localhost", 0)
    assert len({taken.getsockname()[1] for taken in sockets}) == 1
    for taken in sockets:
        taken.close()


def test_a_foreign_address_is_refused() -> None:
    with pytest.raises(PortError, match=r"--host 192\.0\.2\.1 is no address of this machine"):
        check_port_free("192.0.2.1", 0)


def test_a_host_without_address_is_refused() -> None:
    with pytest.raises(PortError, match=r"--host no\.such\.host\.invalid"):
        check_port_free("no.such.host.invalid", 0)
