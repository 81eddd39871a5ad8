"""Two hosts in one: network namespaces with a link between them that can be cut, each with its own /dev/shm and /tmp.

here (clients) --- a (frontend, mpirun, half of the ranks) --- b (the other half)
                                                           ^ the link that is cut
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.end_to_end.harness import eventually, moemesh_command, mpirun_command

_FORWARDING = b"3"  # BR_STATE_FORWARDING of linux/if_bridge.h


class TwoHosts:
    """Namespaces and links; `close` is left to `two_hosts`."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        number = os.getpid() % 250
        self._net = f"10.213.{number}"
        self._a, self._b, self._bridge = (f"moemesh-{name}-{os.getpid()}" for name in ("a", "b", "bridge"))
        self._outer = f"mmo{os.getpid()}"
        self._agent = folder / "agent"
        self._temporary = temporary
        self._other_tmp = folder / "tmp-of-b"

    def build(self, stack: ExitStack) -> None:
        for name in (self._a, self._b, self._bridge):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", self._outer, "type", "veth", "peer", "name", "out", "netns", self._a)
        stack.callback(_ip, "link", "del", self._outer)
        self._address(f"{self._net}.1/30", self._outer)
        self._address(f"{self._net}.2/30", "out", self._a)
        _ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
        _ip("-n", self._bridge, "link", "set", "bridge", "up")
        for name, port, address in ((self._a, "to-a", 9), (self._b, "to-b", 10)):
            _ip("-n", name, "link", "add", "between", "type", "veth", "peer", "name", port, "netns", self._bridge)
            self._address(f"{self._net}.{address}/29", "between", name)
            _ip("-n", self._bridge, "link", "set", port, "master", "bridge")
            _ip("-n", self._bridge, "link", "set", port, "up")
        eventually(self._forwards, what="the bridge forwards")
        self._other_tmp.mkdir()
        self._agent.write_text(self._agent_script())
        self._agent.chmod(0o700)

    def _forwards(self) -> bool:
        ports = [f"/sys/class/net/{port}/brport/state" for port in ("to-a", "to-b")]
        done = subprocess.run(["ip", "netns", "exec", self._bridge, "cat", *ports], capture_output=True, check=True)
        return done.stdout.split() == [_FORWARDING] * len(ports)

    def _address(self, address: str, device: str, name: str | None = None) -> None:
        where = ("-n", name) if name else ()
        _ip(*where, "addr", "add", address, "dev", device)
        _ip(*where, "link", "set", device, "up")

    def cut(self) -> None:
        """From now on nothing passes between the hosts, and nobody is told."""
        _ip("-n", self._bridge, "link", "set", "to-b", "nomaster")

    def heal(self) -> None:
        _ip("-n", self._bridge, "link", "set", "to-b", "master", "bridge")

    def left(self) -> list[Path]:
        """What the mesh has left in the second host's TMPDIR."""
        return list(self._other_tmp.iterdir())

    def within(self, host: str, *command: str) -> list[str]:
        """A command line for host "a" or "b"."""
        return ["ip", "netns", "exec", self._a if host == "a" else self._b, *command]

    @property
    def address_of_b(self) -> str:
        return f"{self._net}.10"

    def serve_command(self, flags: tuple[str, ...], *, num_ranks: int) -> list[str]:
        """A user's own mpirun over both hosts, half of the ranks on each."""
        half = num_ranks // 2
        subnet = f"{self._net}.8/29"
        hosts = [
            *("--host", f"{self._net}.9:{half},{self._net}.10:{half}"),
            *("--prtemca", "plm_ssh_agent", str(self._agent), "--prtemca", "prte_if_include", subnet),
            *("--mca", "btl_tcp_if_include", subnet),
        ]
        serve = moemesh_command("serve", "--host", f"{self._net}.2", "--port", "0", *flags)
        return self.within("a", *mpirun_command(num_ranks), *hosts, *serve)

    def _agent_script(self) -> str:
        """In place of ssh: `agent HOST COMMAND`, on the other host, with folders of its own."""
        setup = [
            f"hostname {self._b}",
            f"mount --bind {self._other_tmp} {self._temporary}",
            "mount -t tmpfs tmpfs /dev/shm",
            'exec sh -c "$*"',
        ]
        enter = " ".join(self.within("b", "unshare", "--mount", "--uts"))
        return f"#!/bin/sh\nshift\nexec {enter} sh -c '{' && '.join(setup)}' sh \"$@\"\n"


@contextmanager
def two_hosts(folder: Path, temporary: Path) -> Iterator[TwoHosts]:
    """`folder` for what the hosts need, `temporary`: the TMPDIR that is another folder on each of them."""
    hosts = TwoHosts(folder, temporary)
    with ExitStack() as stack:
        hosts.build(stack)
        yield hosts


@contextmanager
def small_disk(folder: Path, size_mib: int = 64) -> Iterator[Path]:
    """A file system of its own at `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take every byte that is free; the file that does."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return filler


def no_namespaces() -> str:
    """Why namespaces cannot be made here; empty when they can."""
    return _cannot("unshare", "--net", "--mount", "--uts", "ip", "link", "set", "lo", "up")


def no_mounts() -> str:
    """Why no file system can be mounted here; empty when one can."""
    return _cannot("unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt")


def _cannot(*command: str) -> str:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(command)}` is not permitted: {error.stderr.strip()}"
    except OSError as error:
        return str(error)
    return ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)
