"""What ranks need to reach the frontend, and which of its addresses they take."""

from __future__ import annotations

import socket

import pytest

from moemesh import contact
from moemesh.contact import Contact, first_reachable, is_refused, own_addresses, this_machine
from transport.control import new_curve_keys


@pytest.mark.parametrize(
    "made",
    [
        Contact(endpoint="ipc:///run/control"),
        Contact(endpoint="tcp://10.0.0.1:5000", keys=new_curve_keys(), machines=("a", "b")),
    ],
)
def test_it_comes_back_as_it_was(made: Contact) -> None:
    assert Contact.from_json(made.to_json()) == made


def test_a_machine_is_itself_and_named() -> None:
    assert this_machine() == this_machine()
    assert this_machine().split()[0] == socket.gethostname()


def test_the_loopback_is_no_address_for_others() -> None:
    for address in own_addresses():
        assert not address.startswith("127.")
        socket.inet_aton(address)


def test_the_first_address_that_answers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact, "_CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert first_reachable(["127.0.0.2", "127.0.0.1"], port) == "127.0.0.1"
        assert not is_refused(f"tcp://127.0.0.1:{port}")
    assert first_reachable(["127.0.0.1"], port) is None
    assert is_refused(f"tcp://127.0.0.1:{port}")
