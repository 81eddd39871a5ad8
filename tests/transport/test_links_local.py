"""The link contract over the local network, and what only the local network can do."""

from collections.abc import Callable

import pytest
import torch

from tests.transport.link_contract import CONTRACT, Program, Sync
from tests.transport.local_runs import run_programs
from transport import buffers
from transport.buffers import WireBuffer
from transport.frame import Frame, Header, Kind
from transport.links import Link
from transport.local_link import LocalNetwork


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN in every format."""
    fresh = buffers.new_buffer

    def poisoned(size: int) -> WireBuffer:
        buffer = fresh(size)
        torch.frombuffer(buffer.memory, dtype=torch.uint8).fill_(0xFF)
        return buffer

    monkeypatch.setattr(buffers, "new_buffer", poisoned)


@pytest.mark.parametrize("program", CONTRACT, ids=lambda program: program.__name__)
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("seed", [None, 1])
def test_contract(program: Callable[[Link, Sync], Program], num_ranks: int, seed: int | None) -> None:
    run_programs(LocalNetwork(num_ranks, seed=seed), program)


def frame_from(rank: int, step: int = 0) -> Frame:
    return Frame(Header(Kind.ANSWER, rank, step=step), (torch.ones(2),))


def test_seed_decides_the_order() -> None:
    def arrivals(seed: int) -> list[list[tuple[int, int]]]:
        network = LocalNetwork(4, seed=seed)
        for step in range(10):
            for sender in (1, 2, 3):
                network.links[sender].post(0, frame_from(sender, step))
        return [[(f.header.sender, f.header.step) for f in network.links[0].poll()] for _ in range(20)]

    assert arrivals(5) == arrivals(5)
    assert arrivals(5) != arrivals(6)


def test_lost_peer_is_named_once_and_its_frames_are_dropped() -> None:
    network = LocalNetwork(3)
    healthy, doomed, _ = network.links
    for step in range(20):
        healthy.post(1, frame_from(0, step))
    doomed.post(0, frame_from(1))
    network.kill(1)
    assert healthy.take_lost() == [1]
    assert healthy.take_lost() == []
    assert healthy.poll() == []
    assert healthy.idle()
    healthy.post(1, frame_from(0))
    doomed.post(0, frame_from(1))
    assert healthy.poll() == []
    assert healthy.stats().dropped == 5
    healthy.post(2, frame_from(0))
    assert len(network.links[2].poll()) == 1


def test_refuses_what_is_not_its_own_to_send() -> None:
    link = LocalNetwork(2).links[0]
    for peer in (0, 2, -1):
        with pytest.raises(ValueError, match="cannot post to"):
            link.post(peer, frame_from(0))
    with pytest.raises(ValueError, match="of sender 1"):
        link.post(1, frame_from(1))
    for kind in (Kind.CREDIT, Kind.PROBE):
        with pytest.raises(ValueError, match=kind.name):
            link.post(1, Frame(Header(kind, 0)))


def test_what_is_no_frame_is_counted_and_costs_nothing() -> None:
    network = LocalNetwork(2)
    sender, receiver = network.links
    for step in range(7):
        sender.post(1, frame_from(0, step))
    network.carry(sender, 1, memoryview(bytearray(b"not a frame" * 20)))
    sender.post(1, frame_from(0, 7))
    assert [frame.header.step for frame in receiver.poll()] == list(range(8))
    assert receiver.stats().protocol_errors == 1
    assert receiver.frames_sent(Kind.CREDIT) == 1
    assert sender.poll() == []
    assert sender.stats().in_flight == 0


def test_close_drops_what_is_queued() -> None:
    link = LocalNetwork(2).links[0]
    for step in range(20):
        link.post(1, frame_from(0, step))
    assert not link.idle()
    link.close()
    assert link.idle()
