"""Gather and reduce-scatter among the members of a tensor-parallel group, over frames.

Written as generators: they yield a Wait where a peer's frame is needed and are resumed once it is ready, so that the
rank does other work meanwhile. All members call them in the same order with the same generation, step, layer,
micro-batch and phase; each call needs a phase of its own. Members need not be there at the same time.

Shape legend: T rows of the micro-batch, H width.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transport.errors import ProtocolError
from transport.frame import Frame, Header, Kind
from transport.links import Link
from transport.mailbox import Mailbox, MailKey
from transport.shards import Range, maximal_subtrees, owned_shards, row_split, tree_sum
from transport.tasks import AnyOf, Ready


@dataclass(frozen=True, slots=True)
class Wait:
    """What a computation waits for: all frames of `keys`. Resume it when `ready()`."""

    mailbox: Mailbox
    keys: tuple[MailKey, ...]

    def ready(self) -> bool:
        """All of them have arrived; nothing was taken."""
        return self.mailbox.has(self.keys)

    def missing(self) -> frozenset[int]:
        """Ranks whose frames have not arrived."""
        return frozenset(key.sender for key in self.mailbox.missing(self.keys))


def awaited(wait: Ready) -> frozenset[int]:
    """Ranks without whose frames nothing goes on; none where something else may come as well, or something is there."""
    if isinstance(wait, AnyOf):
        each = [awaited(part) for part in wait.waits]
        return frozenset().union(*each) if all(each) else frozenset()
    return wait.missing() if isinstance(wait, Wait) else frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCall:
    """One collective of a group: who takes part (ranks in member order, this one included) and for which work."""

    link: Link
    mailbox: Mailbox
    members: tuple[int, ...]
    generation: int
    step: int
    layer: int
    micro_batch: int
    phase: int
    incarnation: int = 0

    @property
    def index(self) -> int:
        """This rank's place among the members."""
        return self.members.index(self.link.rank)

    @property
    def tp(self) -> int:
        """Number of members."""
        return len(self.members)

    def send(self, member: int, tensors: tuple[Tensor, ...]) -> None:
        """Post this call's frame to a member (its place, not its rank)."""
        header = Header(
            Kind.COLLECTIVE,
            self.link.rank,
            incarnation=self.incarnation,
            generation=self.generation,
            step=self.step,
            layer=self.layer,
            micro_batch=self.micro_batch,
            phase=self.phase,
        )
        self.link.post(self.members[member], Frame(header, tensors))

    def wait_for(self, members: Sequence[int]) -> Wait:
        """Wait for this call's frames from these members."""
        return Wait(self.mailbox, tuple(self._key(member) for member in members))

    def receive(self, member: int) -> tuple[Tensor, ...]:
        """The tensors that a member sent; its frame must have arrived."""
        frame = self.mailbox.take(self._key(member))
        assert frame is not None, f"resumed before the frame of rank {self.members[member]} arrived"
        return frame.tensors

    def _key(self, member: int) -> MailKey:
        sender = self.members[member]
        return MailKey(Kind.COLLECTIVE, self.generation, self.step, self.layer, self.micro_batch, self.phase, sender)

    def check(
        self, member: int, tensors: Sequence[Tensor], *, count: int, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        """Raise ProtocolError unless the member sent `count` tensors of that shape and dtype."""
        if len(tensors) == count and all(t.shape == shape and t.dtype is dtype for t in tensors):
            return
        got = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
        raise ProtocolError(
            f"rank {self.members[member]} sent {got} to layer {self.layer} phase {self.phase}, "
            f"expected {count} of {tuple(shape)} {dtype}"
        )


def all_gather_rows(call: GroupCall, x_own: Tensor, num_rows: int) -> Generator[Wait, None, Tensor]:
    """All members' rows in order, [T, H], from each member's own block (its part of `row_split(T, tp)`).

    `num_rows` is T. Members without rows send nothing. One member: returns `x_own` itself.
    Raises ValueError for a wrong block of one's own, ProtocolError for one of a peer's.
    """
    split = row_split(num_rows, call.tp)
    index = call.index
    start, stop = split[index]
    if x_own.dim() != 2 or x_own.shape[0] != stop - start:
        raise ValueError(
            f"member {index} of {call.tp} owns {stop - start} of {num_rows} rows, got {tuple(x_own.shape)}"
        )
    if call.tp == 1:
        return x_own
    others = [member for member in range(call.tp) if member != index]
    if stop > start:
        for member in others:
            call.send(member, (x_own,))
    senders = [member for member in others if split[member][1] > split[member][0]]
    if senders:
        yield call.wait_for(senders)
    x_all = x_own.new_empty((num_rows, x_own.shape[1]))
    x_all[start:stop] = x_own
    for member in senders:
        tensors = call.receive(member)
        low, high = split[member]
        call.check(member, tensors, count=1, shape=x_all[low:high].shape, dtype=x_all.dtype)
        x_all[low:high] = tensors[0]
    return x_all


def reduce_scatter_tree(call: GroupCall, parts: Sequence[Tensor], num_shards: int) -> Generator[Wait, None, Tensor]:
    """This member's rows (`row_split(T, tp)`) of the sum over all logical shards, [T_own, H].

    `parts`: for all T rows the partial sums [T, H] of the maximal subtrees this member owns, in their order.
    The sum's tree is fixed (see shards), so the result has the same bits for every number of members.
    Raises ValueError for wrong parts of one's own, ProtocolError for those of a peer.
    """
    subtrees = [_subtrees(num_shards, call.tp, member) for member in range(call.tp)]
    index = call.index
    own = subtrees[index]
    if len(parts) != len(own) or any(part.dim() != 2 or part.shape != parts[0].shape for part in parts):
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"member {index} of {call.tp} owns subtrees {own}: needs one [T, H] each, got {shapes}")
    split = row_split(parts[0].shape[0], call.tp)
    others = [member for member in range(call.tp) if member != index]
    for member in others:
        start, stop = split[member]
        if stop > start:
            call.send(member, tuple(part[start:stop] for part in parts))
    start, stop = split[index]
    mine = [part[start:stop] for part in parts]
    if stop == start:
        return mine[0]
    by_subtree: dict[Range, Tensor] = dict(zip(own, mine, strict=True))
    if others:
        yield call.wait_for(others)
    for member in others:
        tensors = call.receive(member)
        call.check(member, tensors, count=len(subtrees[member]), shape=mine[0].shape, dtype=mine[0].dtype)
        by_subtree.update(zip(subtrees[member], tensors, strict=True))
    return tree_sum(by_subtree, num_shards)


def _subtrees(num_shards: int, num_members: int, member: int) -> list[Range]:
    return maximal_subtrees(*owned_shards(num_shards, num_members, member), num_shards)
