"""What can befall a local network: frames lost, doubled, late and damaged; ranks killed, stopped, slow and revived."""

from collections import Counter

import pytest
import torch

from transport.frame import Frame, Header, Kind
from transport.links import Link
from transport.local_link import NOTICE_SECONDS, LocalLink, LocalNetwork
from transport.local_wire import FaultRates


def frame_from(link: Link, step: int = 0) -> Frame:
    return Frame(Header(Kind.ANSWER, link.rank, step=step), (torch.full((50,), float(step)),))


def steps_of(frames: list[Frame]) -> list[int]:
    """Steps, each frame's content checked."""
    for frame in frames:
        assert frame.tensors[0].tolist() == [frame.header.step] * 50
    return [frame.header.step for frame in frames]


def run(network: LocalNetwork, seconds: float) -> dict[int, list[int]]:
    """Everybody polls, a millisecond a turn; the steps that each received."""
    received: dict[int, list[int]] = {link.rank: [] for link in network.links}
    for _ in range(round(seconds / 0.001)):
        network.advance(0.001)
        for link in network.links:
            if network.may_run(link.rank):
                link.tick(network.now)
                received[link.rank] += steps_of(link.poll())
    return received


def flood(network: LocalNetwork, count: int) -> None:
    for step in range(count):
        for link in network.links:
            link.post(1 - link.rank, frame_from(link, step))


@pytest.mark.parametrize(
    "rates",
    [
        FaultRates(drop=0.3),
        FaultRates(duplicate=0.5),
        FaultRates(corrupt=0.3),
        FaultRates(reorder=0.5),
        FaultRates(delay=0.5, max_delay=0.1),
        FaultRates(drop=0.1, duplicate=0.1, corrupt=0.1, reorder=0.3, delay=0.3, max_delay=0.05),
    ],
    ids=["drop", "duplicate", "corrupt", "reorder", "delay", "all"],
)
@pytest.mark.parametrize("seed", range(5))
def test_frames_come_once_and_whole_or_not_at_all(rates: FaultRates, seed: int) -> None:
    network = LocalNetwork(2, seed=seed, check_payload=True)
    network.disturb(rates)
    flood(network, 200)
    received = run(network, 20.0)
    for link in network.links:
        steps = received[link.rank]
        assert len(set(steps)) == len(steps)
        if rates.drop or rates.corrupt:
            assert 0 < len(steps) < 200
        else:
            assert len(steps) == 200
        if not rates.reorder:
            assert steps == sorted(steps)
        assert link.stats().queued == 0
        assert (link.stats().duplicates > 0) == (rates.duplicate > 0)
        assert (link.stats().protocol_errors > 0) == (rates.corrupt > 0)
    fates = Counter(event.split()[5] for event in network.story)
    for name, fate in (("drop", "dropped"), ("duplicate", "doubled"), ("corrupt", "corrupted"), ("delay", "delayed")):
        assert (fates[fate] > 0) == (getattr(rates, name) > 0)


def test_the_same_seed_tells_the_same_story() -> None:
    def story(seed: int) -> list[str]:
        network = LocalNetwork(2, seed=seed, check_payload=True)
        network.disturb(FaultRates(drop=0.1, duplicate=0.1, corrupt=0.1, reorder=0.1, delay=0.1, max_delay=1.0))
        flood(network, 50)
        run(network, 1.0)
        return list(network.story)

    assert story(1) == story(1)
    assert story(1) != story(2)


def test_faults_befall_only_the_wires_they_are_meant_for() -> None:
    network = LocalNetwork(2, seed=1)
    network.disturb(FaultRates(drop=1.0), [(0, 1)])
    flood(network, 5)
    assert run(network, 1.0) == {0: [0, 1, 2, 3, 4], 1: []}
    network.disturb()
    flood(network, 5)
    assert run(network, 1.0) == {0: [0, 1, 2, 3, 4], 1: [0, 1, 2, 3, 4]}


def test_a_wire_that_is_cut_again_holds_what_it_held() -> None:
    network = LocalNetwork(2)
    for step in range(2):
        network.cut(0, 1, hold=True)
        network.links[0].post(1, frame_from(network.links[0], step))
    network.heal(0, 1)
    assert run(network, 0.01)[1] == [0, 1]


@pytest.mark.parametrize("hold", [False, True])
def test_a_cut_wire_loses_its_frames_or_holds_them(hold: bool) -> None:
    network = LocalNetwork(2)
    network.cut(0, 1, hold=hold)
    flood(network, 20)
    received = run(network, 1.0)
    assert received[1] == []
    # No acknowledgement comes back: the other direction has its window's worth.
    assert received[0] == list(range(16))
    network.heal(0, 1)
    received = run(network, 5.0)
    assert received[0] == [16, 17, 18, 19]
    assert received[1] == (list(range(20)) if hold else [16, 17, 18, 19])


def test_peers_hear_of_a_death_at_different_times_and_of_no_frame_after_it() -> None:
    network = LocalNetwork(4, seed=3)
    healthy = network.links[:3]
    for peer in range(3):
        network.links[3].post(peer, frame_from(network.links[3]))
    network.kill(3)
    assert not network.may_run(3)
    assert all(link.take_lost() == [] for link in healthy)
    heard: dict[int, float] = {}
    while len(heard) < 3:
        network.advance(0.001)
        heard |= {link.rank: network.now for link in healthy if link.take_lost() == [3]}
    assert all(NOTICE_SECONDS[0] <= at <= NOTICE_SECONDS[1] + 0.001 for at in heard.values())
    assert len(set(heard.values())) == 3
    assert all(link.poll() == [] for link in healthy)


def admit_each_other(network: LocalNetwork, link: LocalLink) -> None:
    """Everybody alive admits who joined."""
    for peer, incarnation in link.take_joined():
        link.admit(peer, incarnation)
    for other in network.links:
        for peer, incarnation in other.take_joined():
            other.admit(peer, incarnation)


def test_a_replacement_exchanges_frames_and_the_dead_are_not_heard() -> None:
    network = LocalNetwork(3)
    old = network.links[2]
    for step in range(20):
        network.links[0].post(2, frame_from(network.links[0], step))
        old.post(0, frame_from(old, 1000 + step))
    network.kill(2, noticed_after=0.5)
    new = network.revive(2)
    assert (new.incarnation, new is network.links[2]) == (1, True)
    new.post(0, frame_from(new))
    assert new.stats().dropped == 1, "nobody is admitted from the start"
    admit_each_other(network, new)
    new.post(0, frame_from(new, 5))
    network.links[0].post(2, frame_from(network.links[0], 6))
    old.post(1, frame_from(old, 7))
    assert run(network, 0.1) == {0: [5], 1: [], 2: [6]}
    assert network.links[0].stats().stale == 16
    run(network, 1.0)
    assert network.links[0].take_lost() == [], "the death of the first life is not charged to the second"
    network.links[1].post(2, frame_from(network.links[1], 8))
    assert run(network, 0.1)[2] == [8]


def test_what_a_replacement_sends_before_it_is_admitted_waits() -> None:
    network = LocalNetwork(2)
    network.kill(1)
    new = network.revive(1)
    assert new.take_joined() == [(0, 0)]
    new.admit(0, 0)
    for step in range(100):
        new.post(0, frame_from(new, step))
    assert run(network, 1.0)[0] == []
    assert network.links[0].take_joined() == [(1, 1)]
    network.links[0].admit(1, 1)
    assert run(network, 1.0)[0] == list(range(100))


def test_a_stopped_rank_keeps_what_comes_and_a_slow_one_takes_its_time() -> None:
    network = LocalNetwork(2, seed=1)
    network.stop(1)
    flood(network, 5)
    assert run(network, 1.0) == {0: [0, 1, 2, 3, 4], 1: []}
    network.resume(1)
    network.slow(1, 0.05)
    turns = sum(network.may_run(1) for _ in range(1000))
    assert 20 < turns < 100
    assert run(network, 1.0)[1] == [0, 1, 2, 3, 4]
    network.slow(1, 1.0)
    assert all(network.may_run(1) for _ in range(100))


def test_wrong_orders_are_refused() -> None:
    network = LocalNetwork(2)
    with pytest.raises(ValueError, match="chance needs a seed"):
        network.disturb(FaultRates(drop=0.1))
    with pytest.raises(ValueError, match="check_payload=True"):
        LocalNetwork(2, seed=1).disturb(FaultRates(corrupt=0.1))
    with pytest.raises(ValueError, match="rank 1 lives"):
        network.revive(1)
    with pytest.raises(ValueError, match="got 0"):
        network.slow(1, 0)
    with pytest.raises(ValueError, match=r"drop must be a chance from 0 to 1, or seconds from 0, got 1\.5"):
        FaultRates(drop=1.5)


def test_a_loss_that_was_not_asked_for_is_not_that_of_the_next_life() -> None:
    network = LocalNetwork(2)
    link = network.links[0]
    network.kill(1, noticed_after=0.0)
    network.revive(1)
    link.forget(1)
    link.admit(1, 1)
    assert link.take_lost() == []


def test_a_replacement_is_met_by_one_peer_after_the_other() -> None:
    network = LocalNetwork(3)
    network.kill(2)
    new = network.revive(2, incarnation=5, introduced=False)
    assert [link.take_joined() for link in network.links] == [[], [], []]
    network.introduce(2, 0)
    assert [link.take_joined() for link in network.links] == [[(2, 5)], [], [(0, 0)]]
    assert new.incarnation == 5


def test_it_says_when_a_rank_may_receive_something() -> None:
    network = LocalNetwork(2, seed=1)
    assert network.next_arrival(1) is None
    network.disturb(FaultRates(delay=1.0, max_delay=2.0))
    network.links[0].post(1, frame_from(network.links[0]))
    due = network.next_arrival(1)
    assert due is not None
    network.advance(due - 0.001)
    assert network.links[1].poll() == []
    network.kill(0, noticed_after=0.5)
    assert network.next_arrival(1) == min(due, network.now + 0.5)
    assert network.next_arrival(0) is None
