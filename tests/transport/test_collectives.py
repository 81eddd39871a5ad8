"""Collectives at their edges; the contract test runs them over every link."""

from collections.abc import Generator
from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.transport.link_contract import Program, Sync, collectives_have_the_trees_bits
from tests.transport.local_runs import run_programs
from transport.collectives import GroupCall, Wait, all_gather_rows, awaited, reduce_scatter_tree
from transport.errors import ProtocolError
from transport.frame import Frame, Header, Kind
from transport.links import Link
from transport.local_link import LocalNetwork
from transport.mailbox import Mailbox
from transport.tasks import AnyOf, Ready


@settings(max_examples=20)
@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 2**31))
def test_bits_do_not_depend_on_degree_or_arrival(tp: int, seed: int) -> None:
    network = LocalNetwork(tp, seed=seed)
    run_programs(network, collectives_have_the_trees_bits)
    assert tp > 1 or network.links[0].stats().bytes_sent == 0


def call_of(link: Link, members: tuple[int, ...], mailbox: Mailbox | None = None) -> GroupCall:
    return GroupCall(
        link=link,
        mailbox=mailbox or Mailbox(),
        members=members,
        generation=0,
        step=0,
        layer=2,
        micro_batch=0,
        phase=5,
    )


def finished(steps: Generator[Wait, None, Tensor]) -> Tensor:
    with pytest.raises(StopIteration) as stop:
        next(steps)
    return cast(Tensor, stop.value.value)


def test_one_member_returns_its_own_rows() -> None:
    call = call_of(LocalNetwork(1).links[0], (0,))
    x = torch.randn(3, 2)
    assert finished(all_gather_rows(call, x, 3)) is x
    assert torch.equal(finished(reduce_scatter_tree(call, [x], 16)), x)


def test_members_without_rows_neither_send_nor_wait() -> None:
    links = LocalNetwork(4).links
    call = call_of(links[1], (3, 1))
    assert finished(reduce_scatter_tree(call, [torch.ones(1, 2)], 2)).shape == (0, 2)
    assert links[1].frames_sent(Kind.COLLECTIVE) == 1
    gather = all_gather_rows(call, torch.ones(0, 2), 1)
    assert not next(gather).ready()
    assert links[1].frames_sent(Kind.COLLECTIVE) == 1


def test_groups_of_any_ranks_talk_among_themselves() -> None:
    network = LocalNetwork(4)

    def program(link: Link, sync: Sync) -> Program:
        members = (2, 0) if link.rank % 2 == 0 else (1, 3)
        mailbox = Mailbox()
        own = torch.full((1, 2), float(link.rank))
        steps = all_gather_rows(call_of(link, members, mailbox), own, 2)
        wait = next(steps)
        while not wait.ready():
            for frame in link.poll():
                mailbox.deliver(frame)
            yield
        assert torch.equal(finished(steps)[:, 0], torch.tensor([float(rank) for rank in members]))
        yield from sync()

    run_programs(network, program)


@pytest.mark.parametrize("wrong", [(), (torch.ones(2, 2),), (torch.ones(1, 2).double(),), (torch.ones(1, 2),) * 2])
def test_frames_that_do_not_fit_are_refused(wrong: tuple[Tensor, ...]) -> None:
    link = LocalNetwork(2).links[0]
    for collective in ("gather", "reduce"):
        call = call_of(link, (0, 1))
        call.mailbox.deliver(Frame(Header(Kind.COLLECTIVE, 1, layer=2, phase=5), wrong))
        if collective == "gather":
            steps = all_gather_rows(call, torch.ones(1, 2), 2)
        else:
            steps = reduce_scatter_tree(call, [torch.ones(2, 2)], 2)
        assert next(steps).ready()
        with pytest.raises(ProtocolError, match=r"rank 1 sent .* to layer 2 phase 5, expected 1 of"):
            next(steps)


def test_own_tensors_that_do_not_fit_are_refused() -> None:
    call = call_of(LocalNetwork(2).links[0], (0, 1))
    with pytest.raises(ValueError, match="member 0 of 2 owns 2 of 3 rows, got"):
        next(all_gather_rows(call, torch.ones(3, 2), 3))
    for parts in ([torch.ones(1, 2)] * 2, [], [torch.ones(2)]):
        with pytest.raises(ValueError, match=r"member 0 of 2 owns subtrees \[\(0, 4\)\]"):
            next(reduce_scatter_tree(call, parts, 8))


def test_who_is_awaited_is_whose_frames_are_missing() -> None:
    link, mailbox = LocalNetwork(4).links[0], Mailbox()
    first, second = (replace(call_of(link, (0, 1, 2, 3), mailbox), step=step) for step in (0, 1))
    wait, other = first.wait_for([1, 2]), second.wait_for([3])
    assert awaited(wait) == {1, 2}
    assert awaited(AnyOf([wait, other])) == {1, 2, 3}
    mailbox.deliver(Frame(Header(Kind.COLLECTIVE, 2, layer=2, phase=5), ()))
    assert awaited(wait) == {1}
    mailbox.deliver(Frame(Header(Kind.COLLECTIVE, 1, layer=2, phase=5), ()))
    assert awaited(wait) == frozenset(), "it can go on"
    assert awaited(AnyOf([wait, other])) == frozenset(), "one of two can go on"


def test_who_waits_for_something_else_as_well_awaits_nobody() -> None:
    class Never:
        def ready(self) -> bool:
            return False

    call = call_of(LocalNetwork(2).links[0], (0, 1))
    never: Ready = Never()
    assert awaited(never) == frozenset()
    assert awaited(AnyOf([call.wait_for([1]), never])) == frozenset()
