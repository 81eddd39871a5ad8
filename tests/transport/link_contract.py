"""What every link must do, as one program per rank. Runs over the local network and, unchanged, under mpirun.

A program is a generator: it yields where it lets others run, and never sleeps. Each rank computes for itself what it
must receive: the payload is a function of (sender, receiver, number).
"""

from collections.abc import Callable, Generator, Sequence

import pytest
import torch
from torch import Tensor

from transport.collectives import GroupCall, Wait, all_gather_rows, reduce_scatter_tree
from transport.errors import Overloaded
from transport.flow_control import DEFAULT_MAX_QUEUED, DEFAULT_WINDOW
from transport.frame import Frame, Header, Kind
from transport.links import Link
from transport.mailbox import Mailbox
from transport.shards import maximal_subtrees, owned_shards, row_split, tree_sum

Program = Generator[None, None, None]
Sync = Callable[[], Program]
"""Waits until all ranks have got there, without polling the link."""

SHAPES = ((), (1,), (0, 7), (3, 0), (5, 3), (2, 3, 4), (2, 1, 3, 2), (33,))
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
)


def random_tensor(generator: torch.Generator, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Random bytes as a tensor: NaNs, infinities and all."""
    num_bytes = int(torch.Size(shape).numel()) * dtype.itemsize
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(tuple(shape))


def payload(sender: int, receiver: int, number: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed((sender * 64 + receiver) * 10_000 + number)
    dtype = DTYPES[number % len(DTYPES)]
    return tuple(random_tensor(generator, dtype, shape) for shape in SHAPES[: number % len(SHAPES) + 1])


def same_bytes(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))


def numbered(link: Link, number: int, tensors: tuple[Tensor, ...] = ()) -> Frame:
    return Frame(Header(Kind.DISPATCH, link.rank, step=number), tensors)


def others(link: Link) -> list[int]:
    return [rank for rank in range(link.num_ranks) if rank != link.rank]


def collect(link: Link, count: int) -> Generator[None, None, list[Frame]]:
    frames: list[Frame] = []
    while len(frames) < count:
        frames += link.poll()
        yield
    assert len(frames) == count
    return frames


def settle(link: Link, sync: Sync) -> Program:
    """Everybody has what was sent, and nothing more comes."""
    while not link.idle():
        assert link.poll() == []
        yield
    yield from sync()
    for _ in range(3):
        assert link.poll() == []
    assert link.take_lost() == []
    assert link.stats().protocol_errors == 0


def check_numbered(frames: Sequence[Frame], receiver: int, count: int) -> None:
    """Each sender's frames are there once, in order, to the bit."""
    expected: dict[int, int] = {}
    for frame in frames:
        sender, number = frame.header.sender, frame.header.step
        assert number == expected.get(sender, 0)
        expected[sender] = number + 1
        truth = payload(sender, receiver, number)
        assert len(truth) == len(frame.tensors)
        assert all(same_bytes(got, want) for got, want in zip(frame.tensors, truth, strict=True))
    assert set(expected.values()) == {count}


def order_and_bytes(link: Link, sync: Sync) -> Program:
    """All pairs at once, more frames than the window holds, every dtype; the sender overwrites its tensors at once."""
    count = 3 * DEFAULT_WINDOW
    for number in range(count):
        for peer in others(link):
            tensors = payload(link.rank, peer, number)
            link.post(peer, numbered(link, number, tensors))
            for tensor in tensors:
                tensor.contiguous().view(-1).view(torch.uint8).fill_(0xFF)
    frames = yield from collect(link, count * len(others(link)))
    check_numbered(frames, link.rank, count)
    yield from settle(link, sync)
    assert link.frames_sent(Kind.DISPATCH) == count * len(others(link))
    assert link.stats().frames_received >= count * len(others(link))


def header_arrives_unchanged(link: Link, sync: Sync) -> Program:
    header = Header(Kind.PLAN, link.rank, 0, 2**32 - 1, 3, 2**63, 5, 6, 7, 8)
    for peer in others(link):
        link.post(peer, Frame(header))
    for frame in (yield from collect(link, len(others(link)))):
        assert frame == Frame(Header(Kind.PLAN, frame.header.sender, 0, 2**32 - 1, 3, 2**63, 5, 6, 7, 8))
    yield from settle(link, sync)


def big_frames_keep_their_place(link: Link, sync: Sync) -> Program:
    """8 MB then a few bytes, three times: the small ones do not overtake."""
    right, left = (link.rank + 1) % link.num_ranks, (link.rank - 1) % link.num_ranks
    for number in range(6):
        size = 1 if number % 2 else 2 << 20
        link.post(right, numbered(link, number, (torch.arange(size, dtype=torch.int32) + link.rank * number,)))
    for number, frame in enumerate((yield from collect(link, 6))):
        size = 1 if number % 2 else 2 << 20
        assert frame.header.step == number
        assert torch.equal(frame.tensors[0], torch.arange(size, dtype=torch.int32) + left * number)
        assert frame.tensors[0].data_ptr() % 64 == 0
    yield from settle(link, sync)


def deaf_peer(link: Link, sync: Sync) -> Program:
    """The last rank does not poll: at most a window is under way to it, the rest waits, others' traffic goes on."""
    deaf, count = link.num_ranks - 1, 100
    talkers = [rank for rank in range(deaf) if rank != link.rank]
    if link.rank != deaf:
        for number in range(count):
            link.post(deaf, numbered(link, number, payload(link.rank, deaf, number)))
            for peer in talkers:
                link.post(peer, numbered(link, number, payload(link.rank, peer, number)))
        frames = yield from collect(link, count * len(talkers))
        if talkers:
            check_numbered(frames, link.rank, count)
        while link.stats().queued > count - DEFAULT_WINDOW:
            assert link.poll() == []
            yield
        assert link.stats().queued == count - DEFAULT_WINDOW
        assert not link.idle()
    yield from sync()
    if link.rank == deaf:
        frames = yield from collect(link, count * deaf)
        check_numbered(frames, deaf, count)
    yield from settle(link, sync)


def full_queue_refuses(link: Link, sync: Sync) -> Program:
    """What does not fit in the bounded queue is refused by name, and what was accepted still arrives."""
    if link.rank == 0:
        for number in range(DEFAULT_WINDOW + DEFAULT_MAX_QUEUED):
            link.post(1, numbered(link, number))
        with pytest.raises(Overloaded, match=f"{DEFAULT_MAX_QUEUED} frames"):
            link.post(1, numbered(link, 0))
        assert (link.stats().queued, link.stats().in_flight) == (DEFAULT_MAX_QUEUED, DEFAULT_WINDOW)
    yield from sync()
    if link.rank == 0:
        while link.stats().queued:
            link.poll()
            yield
    elif link.rank == 1:
        frames = yield from collect(link, DEFAULT_WINDOW + DEFAULT_MAX_QUEUED)
        assert [frame.header.step for frame in frames] == list(range(DEFAULT_WINDOW + DEFAULT_MAX_QUEUED))
    yield from settle(link, sync)


def both_sides_flood(link: Link, sync: Sync) -> Program:
    """Everybody posts more than the windows hold before anybody looks: no deadlock."""
    count = 200
    for number in range(count):
        for peer in others(link):
            link.post(peer, numbered(link, number, (torch.full((100,), number, dtype=torch.int32),)))
    frames = yield from collect(link, count * len(others(link)))
    for sender in others(link):
        assert [f.header.step for f in frames if f.header.sender == sender] == list(range(count))
    yield from settle(link, sync)


def credits_cost_little(link: Link, sync: Sync) -> Program:
    """One way: a CREDIT frame for half a window. Back and forth: none, credits ride along."""
    count = 10 * DEFAULT_WINDOW
    if link.rank == 0:
        for number in range(count):
            link.post(1, numbered(link, number))
        # Less than half a window may stay unreturned until something rides along.
        while link.stats().queued or link.stats().in_flight >= DEFAULT_WINDOW // 2:
            assert link.poll() == []
            yield
    elif link.rank == 1:
        yield from collect(link, count)
        assert 1 <= link.frames_sent(Kind.CREDIT) <= 2 * count // DEFAULT_WINDOW
    yield from sync()
    before = link.frames_sent(Kind.CREDIT)
    for number in range(count if link.rank < 2 else 0):
        if link.rank == 0:
            link.post(1, numbered(link, number))
        yield from collect(link, 1)
        if link.rank == 1:
            link.post(0, numbered(link, number))
    # One may still leave: it is due when what the first half left unreturned meets the first frame of the second.
    assert link.frames_sent(Kind.CREDIT) <= before + 1
    yield from settle(link, sync)


def idle_sends_nothing(link: Link, sync: Sync) -> Program:
    """Polling without traffic sends no frame."""
    for _ in range(50):
        assert link.poll() == []
        yield
    yield from sync()
    assert sum(link.stats().frames_sent.values()) == 0
    assert link.stats().bytes_sent == 0
    yield from settle(link, sync)


def run_waits(link: Link, mailbox: Mailbox, steps: Generator[Wait, None, Tensor]) -> Generator[None, None, Tensor]:
    """Drive one collective by polling."""
    while True:
        try:
            wait = next(steps)
        except StopIteration as stop:
            result: Tensor = stop.value
            return result
        while not wait.ready():
            for frame in link.poll():
                mailbox.deliver(frame)
            yield


def collectives_have_the_trees_bits(link: Link, sync: Sync) -> Program:
    """Reduce-scatter, then all-gather, for row counts around the group's size; bits as if one rank held everything."""
    num_shards, width, tp = 16, 5, link.num_ranks
    mailbox = Mailbox()
    own = maximal_subtrees(*owned_shards(num_shards, tp, link.rank), num_shards)
    for step, num_rows in enumerate((1, tp - 1, tp, tp + 1, 3 * tp + 1)):
        generator = torch.Generator().manual_seed(step)
        leaves = {(i, i + 1): torch.randn(num_rows, width, generator=generator) for i in range(num_shards)}
        truth = tree_sum(leaves, num_shards)
        parts = [
            tree_sum({(a - low, b - low): x for (a, b), x in leaves.items() if low <= a < high}, high - low)
            for low, high in own
        ]
        calls = [
            GroupCall(
                link=link,
                mailbox=mailbox,
                members=tuple(range(tp)),
                generation=0,
                step=step,
                layer=3,
                micro_batch=1,
                phase=phase,
            )
            for phase in range(2)
        ]
        mine = yield from run_waits(link, mailbox, reduce_scatter_tree(calls[0], parts, num_shards))
        start, stop = row_split(num_rows, tp)[link.rank]
        assert torch.equal(mine, truth[start:stop])
        everything = yield from run_waits(link, mailbox, all_gather_rows(calls[1], mine, num_rows))
        assert torch.equal(everything, truth)
        mailbox.discard(0, step)
    yield from sync()
    while link.poll():
        pass
    yield from sync()


def a_life_ends_and_another_begins(link: Link, sync: Sync) -> Program:
    """Rank 1 begins a second life where it stands: what travelled for the first is dropped, in either direction."""
    count = DEFAULT_WINDOW // 2 - 1
    for number in range(count):
        for peer in others(link):
            if 1 in (peer, link.rank):
                link.post(peer, numbered(link, number))
    yield from sync()
    if link.rank == 1:
        link.renew(1)
        for peer in others(link):
            link.post(peer, numbered(link, 100))
    else:
        link.forget(1)
        link.post(1, numbered(link, 50))
        assert link.stats().dropped == 1
    yield from sync()
    received: list[Frame] = []
    if link.rank == 1:
        # Who was quick has admitted the second life by now, and sends to it.
        while link.stats().stale < count * len(others(link)):
            received += link.poll()
            yield
    else:
        # What the second life sent early is not heard before it is admitted.
        while link.stats().stale < count:
            assert link.poll() == []
            yield
        with pytest.raises(ValueError, match="life 0 cannot be admitted"):
            link.admit(1, 0)
        link.admit(1, 1)
        link.post(1, numbered(link, 200))
    received += yield from collect(link, (len(others(link)) if link.rank == 1 else 1) - len(received))
    assert {frame.header.step for frame in received} == {200 if link.rank == 1 else 100}
    assert {frame.header.incarnation for frame in received} == {0 if link.rank == 1 else 1}
    yield from settle(link, sync)


def frames_of_both_lives_apart(link: Link, sync: Sync) -> Program:
    """A window's worth lies unsent when a life ends: the next one begins with an open window and number one."""
    if link.rank == 0:
        for number in range(3 * DEFAULT_WINDOW):
            link.post(1, numbered(link, number))
        link.forget(1)
        assert (link.stats().queued, link.stats().in_flight) == (0, 0)
        assert link.stats().dropped == 2 * DEFAULT_WINDOW
    yield from sync()
    if link.rank == 1:
        link.renew(5)
        with pytest.raises(ValueError, match="cannot begin life 5"):
            link.renew(5)
    yield from sync()
    if link.rank == 0:
        link.admit(1, 5)
        for number in range(DEFAULT_WINDOW):
            link.post(1, numbered(link, number))
        assert link.stats().queued == 0
    elif link.rank == 1:
        frames = yield from collect(link, DEFAULT_WINDOW)
        assert [frame.header.step for frame in frames] == list(range(DEFAULT_WINDOW))
        assert link.stats().stale == DEFAULT_WINDOW
    yield from settle(link, sync)


CONTRACT: tuple[Callable[[Link, Sync], Program], ...] = (
    order_and_bytes,
    header_arrives_unchanged,
    big_frames_keep_their_place,
    deaf_peer,
    full_queue_refuses,
    both_sides_flood,
    credits_cost_little,
    idle_sends_nothing,
    a_life_ends_and_another_begins,
    frames_of_both_lives_apart,
    collectives_have_the_trees_bits,
)
