"""How the ranks of a mesh reach its frontend, from its own host and from others.

On one host through a socket in the run directory. Where mpirun has started ranks on several, the frontend listens on
TCP as well, with CURVE keys that the ranks get over MPI, and each host has a run directory of its own.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transport.control import CurveKeys

ANY_ADDRESS = "tcp://*:*"
"""Where a frontend listens for other hosts; whoever has not got the keys is refused."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
_CONNECT_SECONDS = 3.0
_REFUSE_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Contact:
    """`endpoint`: where ranks of this host connect. `keys`: None where nobody but this user can reach it.

    `machines`: of each rank, where they are not all on one.
    """

    endpoint: str
    keys: CurveKeys | None = None
    machines: tuple[str, ...] = ()

    def to_json(self) -> str:
        """For a file in a private folder, or a message: the keys are in it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Contact:
        """The inverse of `to_json`."""
        values = json.loads(text)
        keys = values["keys"]
        return cls(
            endpoint=values["endpoint"],
            keys=None if keys is None else CurveKeys(**keys),
            machines=tuple(values["machines"]),
        )


def is_refused(endpoint: str) -> bool:
    """The host of a TCP endpoint says that nobody listens there. False where nothing is heard of it."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_REFUSE_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def this_machine() -> str:
    """Equal for two processes exactly where they run on one host: its name, and which start of it this is."""
    try:
        boot = _BOOT.read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def own_addresses() -> list[str]:
    """The IPv4 addresses of this host's interfaces, without the loopback's."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in found if not address.startswith("127.")]


def first_reachable(addresses: Sequence[str], port: int) -> str | None:
    """The first of the addresses at which somebody accepts a connection from this host."""
    for address in addresses:
        try:
            with socket.create_connection((address, port), timeout=_CONNECT_SECONDS):
                return address
        except OSError:
            continue
    return None
