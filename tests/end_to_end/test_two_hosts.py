"""A mesh over two hosts (network namespaces with their own names, /tmp and /dev/shm), under a user's own mpirun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos.hosts import TwoHosts, no_namespaces, two_hosts
from tests.end_to_end.harness import SMALL_CACHE, Mesh, eventually, running_server, started
from tests.end_to_end.probes import alone, probes, together

pytestmark = pytest.mark.skipif(bool(no_namespaces()), reason=no_namespaces())


@contextmanager
def mesh_over_two_hosts(folder: Path, *flags: str) -> Iterator[tuple[Mesh, TwoHosts]]:
    temporary = folder / "tmp"
    temporary.mkdir()
    with (
        two_hosts(folder, temporary) as hosts,
        started(hosts.serve_command(flags, num_ranks=4), temporary=temporary) as mesh,
    ):
        mesh.wait_ready()
        yield mesh, hosts


def test_it_gives_the_same_bits_and_leaves_nothing(tmp_path: Path) -> None:
    requests = probes(320, [1, 7, 40, 90], new_tokens=(5, 30))
    with running_server(*SMALL_CACHE) as single:
        expected = alone(single, requests)
    with mesh_over_two_hosts(tmp_path, *SMALL_CACHE, "--redundant-experts", "64") as (mesh, hosts):
        ranks = mesh.get("/mesh").body["ranks"]
        assert [rank["attention_group"] for rank in ranks] == [0, 0, 1, 1], "a group lies within a host"
        assert len({rank["host"] for rank in ranks[:2]}) == 1
        assert len({rank["host"] for rank in ranks}) == 2
        assert together(mesh, requests) == expected
        mesh.find_process("attached-frontend").terminate()
        eventually(lambda: not mesh.left() and not hosts.left(), what="nothing is left on either host")


def test_the_other_host_ends_with_the_frontend(tmp_path: Path) -> None:
    with mesh_over_two_hosts(tmp_path, *SMALL_CACHE) as (mesh, hosts):
        mesh.find_process("attached-frontend").kill()
        eventually(lambda: not mesh.processes() and not hosts.left(), what="nothing is left on either host")
