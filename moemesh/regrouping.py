"""How a group goes on with other members: what is exchanged before the first step of such a generation.

    frontend --Regroup: the sequences that go on--> leader
    members  --KEPT: what each knows of the cache--> leader       nothing, from one that has just come
    leader   --KEPT: what the sequences go on from, CACHE: a layer's blocks--> those who have just come
             <--CACHE: done-- each of them, layer by layer

The leader is a member that has the cache, unless nobody has it. What happens to a member meanwhile is the next
generation's business: until a member has begun a step of its own, it passes on what it knew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
import torch

from attention.latent_cache import LatentCache
from moemesh.kept_cache import KeptCache, KeptSequence, latest
from moemesh.scheduler import Scheduler
from transport.collectives import Wait
from transport.errors import ProtocolError
from transport.frame import Frame, Header, Kind
from transport.links import Link
from transport.mailbox import Mailbox, MailKey
from transport.tasks import Ready, Steps


class Regrouping:
    """One member's part in the exchange. `kept`: what it knows of the cache, None if it has nothing."""

    def __init__(
        self,
        *,
        members: tuple[int, ...],
        generation: int,
        link: Link,
        mailbox: Mailbox,
        cache: LatentCache,
        kept: KeptCache | None,
    ) -> None:
        self._members = members
        self._generation = generation
        self._link = link
        self._mailbox = mailbox
        self._cache = cache
        self.kept = kept

    def lead(self, scheduler: Scheduler, submitted: Ready) -> Steps[None]:
        """Let the scheduler's sequences, all of them once they are `submitted`, go on from what the members have."""
        others = self._members[1:]
        if others:
            yield self._wait(Kind.KEPT, 0, others)
        told = {member: self._told_by(member) for member in others}
        yield submitted
        if self.kept is None:
            self.kept = KeptCache(self._generation)  # nobody has anything: those who had came before us
        else:
            known = latest([self.kept, *(kept for kept in told.values() if kept is not None)])
            resumed = scheduler.resume(known.blocks(scheduler.lengths()))
            self.kept = KeptCache(self._generation, sequences=tuple(map(KeptSequence.whole, resumed)))
        newcomers = [member for member in others if told[member] is None]
        for member in newcomers:
            self._tell(member, self.kept)
        yield from self._send_cache(newcomers, self.kept)

    def follow(self) -> Steps[None]:
        """Tell the leader what is known here; who knows nothing takes the cache from it."""
        leader = self._members[0]
        self._tell(leader, self.kept)
        if self.kept is None:
            yield self._wait(Kind.KEPT, 0, [leader])
            told = self._told_by(leader)
            if told is None:
                raise ProtocolError(f"rank {leader} leads a group and says that it knows nothing")
            yield from self._take_cache(leader, _block_ids(told))
            self.kept = told

    def _send_cache(self, newcomers: Sequence[int], kept: KeptCache) -> Steps[None]:
        """Layer by layer, and not all at once: a layer's blocks may be much."""
        block_ids = _block_ids(kept)
        for layer in range(self._cache.num_layers if block_ids and newcomers else 0):
            blocks = self._cache.read(layer, block_ids)
            for member in newcomers:
                self._post(member, Kind.CACHE, layer, blocks)
            yield self._wait(Kind.CACHE, layer, newcomers)
            for member in newcomers:
                self._take(Kind.CACHE, layer, member)

    def _take_cache(self, leader: int, block_ids: Sequence[int]) -> Steps[None]:
        for layer in range(self._cache.num_layers if block_ids else 0):
            yield self._wait(Kind.CACHE, layer, [leader])
            self._cache.write(layer, block_ids, self._take(Kind.CACHE, layer, leader))
            self._post(leader, Kind.CACHE, layer, torch.zeros(1, dtype=torch.uint8))

    def _tell(self, member: int, kept: KeptCache | None) -> None:
        data = msgpack.packb(None if kept is None else kept.to_wire())
        self._post(member, Kind.KEPT, 0, torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _told_by(self, member: int) -> KeptCache | None:
        wire: Any = msgpack.unpackb(self._take(Kind.KEPT, 0, member).numpy().tobytes())
        return None if wire is None else KeptCache.from_wire(wire)

    def _post(self, member: int, kind: Kind, layer: int, tensor: torch.Tensor) -> None:
        header = Header(kind, self._link.rank, generation=self._generation, layer=layer)
        self._link.post(member, Frame(header, (tensor,)))

    def _wait(self, kind: Kind, layer: int, members: Sequence[int]) -> Wait:
        return Wait(self._mailbox, tuple(self._key(kind, layer, member) for member in members))

    def _take(self, kind: Kind, layer: int, member: int) -> torch.Tensor:
        frame = self._mailbox.take(self._key(kind, layer, member))
        assert frame is not None, f"resumed before the {kind.name} of rank {member} had arrived"
        return frame.tensors[0]

    def _key(self, kind: Kind, layer: int, sender: int) -> MailKey:
        return MailKey(kind, self._generation, 0, layer, 0, 0, sender)


def _block_ids(kept: KeptCache) -> list[int]:
    """Every block of its sequences, once."""
    return list(dict.fromkeys(block for sequence in kept.sequences for block in sequence.block_ids))
