"""The frontend's book of requests: which group computes each, and every token that has come back. Pure decisions.

The ledger survives the ranks: prompt plus tokens so far is all it takes to restart a request elsewhere. The draws of a
sampled one depend on its seed and the position alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from attention.block_hash import block_hashes, chain_root
from mesh_config.mesh import MeshConfig
from moemesh.sampling_params import SamplingParams

MAX_AFFINITY = 65536  # blocks remembered per attention group, 10 MB of names
SAME_LOSS_SECONDS = 0.5
MAX_PREFIX_BLOCKS = 1024
"""Blocks at the beginning of a prompt that affinity looks at: enough to tell groups apart, little to hash."""


@dataclass(kw_only=True, eq=False)
class LedgerEntry:
    """One request in flight. `tokens` is what the client has been given, in order; `group` is None while it waits.

    `losses`: how often in a row the group that computed it was lost before a token came, last at `lost_at`.
    `restarting`: it has been computed before, and nothing has come since it was given to its group.
    """

    request_id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int
    cache_salt: str = ""
    group: int | None = None
    tokens: list[int] = field(default_factory=list)
    waiting_since: float = 0.0
    losses: int = 0
    lost_at: float = -math.inf
    restarting: bool = False

    @property
    def num_tokens(self) -> int:
        """What is to be computed before the next token can come."""
        return len(self.prompt) + len(self.tokens)

    @property
    def outstanding_tokens(self) -> int:
        """Tokens still to be computed at most: the measure of a group's load."""
        known = self.num_tokens if self.restarting or not self.tokens else 0
        return known + self.max_new_tokens - len(self.tokens)

    def note_loss(self, now: float) -> None:
        """What computed it was lost, or some of it. Ranks that go almost together are lost once: a request that takes
        down one after the other needs longer for each."""
        if now - self.lost_at >= SAME_LOSS_SECONDS:
            self.losses += 1
            self.lost_at = now


@dataclass(kw_only=True)
class GroupLoad:
    """What a group has to do: requests, tokens still to come at most, tokens of requests that begin again."""

    requests: int = 0
    outstanding: int = 0
    restarting: int = 0

    def add(self, entry: LedgerEntry) -> None:
        """Count an entry in."""
        self.requests += 1
        self.outstanding += entry.outstanding_tokens
        self.restarting += entry.num_tokens if entry.restarting else 0


class PrefixAffinity:
    """Which group is likely to have the beginning of a prompt in its prefix cache.

    A guess from the prompts that each group was given last: as many names of blocks are remembered per group as it
    has blocks. A wrong guess costs a computation, never a result.
    """

    def __init__(self, num_groups: int, *, block_size: int, blocks_per_group: int) -> None:
        self._block_size = block_size
        self._blocks_per_group = blocks_per_group
        # By group the names of blocks, the one used longest ago first.
        self._names: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(num_groups)]

    @classmethod
    def of(cls, mesh: MeshConfig) -> PrefixAffinity | None:
        """None where there is nothing to choose."""
        if len(mesh.groups) == 1 or not mesh.prefix_caching:
            return None
        blocks_per_group = min(mesh.num_cache_blocks or 0, MAX_AFFINITY)
        return cls(len(mesh.groups), block_size=mesh.block_size, blocks_per_group=blocks_per_group)

    def names(self, prompt: tuple[int, ...], cache_salt: str) -> list[bytes]:
        """What to ask and tell the other methods of a prompt."""
        return block_hashes(chain_root(cache_salt), prompt[: MAX_PREFIX_BLOCKS * self._block_size], self._block_size)

    def best(self, groups: Sequence[int], names: Sequence[bytes]) -> int:
        """The one of `groups` with the longest prefix; the first of them wins ties."""
        return max(groups, key=lambda group: self._length(group, names))

    def note(self, group: int, names: Sequence[bytes]) -> None:
        """A prompt goes to a group."""
        remembered = self._names[group]
        for name in reversed(names):  # of a prefix the end is forgotten first, as the pool does
            remembered[name] = None
            remembered.move_to_end(name)
        while len(remembered) > self._blocks_per_group:
            remembered.popitem(last=False)

    def forget(self, group: int) -> None:
        """The group's cache is empty."""
        self._names[group].clear()

    def _length(self, group: int, names: Sequence[bytes]) -> int:
        remembered = self._names[group]
        return next((length for length, name in enumerate(names) if name not in remembered), len(names))


class Ledger:
    """All requests in flight, by id. With `affinity` the groups' caches break ties between them."""

    def __init__(self, num_groups: int, affinity: PrefixAffinity | None = None) -> None:
        self._num_groups = num_groups
        self._affinity = affinity
        self._entries: dict[int, LedgerEntry] = {}
        self._next_id = 1
        self.replay_mismatches = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, request_id: int) -> LedgerEntry | None:
        return self._entries.get(request_id)

    def admit(
        self, prompt: tuple[int, ...], params: SamplingParams, *, max_new_tokens: int, cache_salt: str = ""
    ) -> LedgerEntry:
        """Open an entry, in no group yet."""
        entry = LedgerEntry(
            request_id=self._next_id,
            prompt=prompt,
            params=params,
            max_new_tokens=max_new_tokens,
            cache_salt=cache_salt,
        )
        self._next_id += 1
        self._entries[entry.request_id] = entry
        return entry

    def loads(self) -> list[GroupLoad]:
        """What each group has to do."""
        loads = [GroupLoad() for _ in range(self._num_groups)]
        for entry in self._entries.values():
            if entry.group is not None:
                loads[entry.group].add(entry)
        return loads

    def assign(self, entry: LedgerEntry, groups: Sequence[int], loads: Sequence[GroupLoad]) -> int:
        """Give an entry to that one of `groups` that has the fewest outstanding tokens, and count it in there.

        Among several the longest cached prefix wins, then the lowest group number.
        """
        fewest = min(loads[group].outstanding for group in groups)
        least = [group for group in groups if loads[group].outstanding == fewest]
        entry.group = least[0]
        if self._affinity is not None:
            names = self._affinity.names(entry.prompt, entry.cache_salt)
            entry.group = self._affinity.best(least, names)
            self._affinity.note(entry.group, names)
        loads[entry.group].add(entry)
        return entry.group

    def lose(self, group: int, now: float) -> list[LedgerEntry]:
        """The group's cache is gone: its entries, oldest first, are in no group any more."""
        lost = self.entries_of(group)
        for entry in lost:
            entry.group = None
            entry.note_loss(now)
            entry.restarting = True
        if self._affinity is not None:
            self._affinity.forget(group)
        return lost

    def keep(self, group: int, now: float) -> list[LedgerEntry]:
        """The group has lost a member, and not its cache: its entries, oldest first, stay."""
        kept = self.entries_of(group)
        for entry in kept:
            entry.note_loss(now)
        return kept

    def entries_of(self, group: int) -> list[LedgerEntry]:
        """Those in a group, oldest first."""
        return [entry for entry in self._entries.values() if entry.group == group]

    def accept(self, request_id: int, position: int, token_ids: list[int]) -> int:
        """Record tokens that came back, the first of them being the `position`-th generated one.

        Returns how many of them, from the front, were known already and must not be sent again. A replayed token that
        differs from the one already sent is counted and dropped.
        """
        entry = self._entries[request_id]
        known = max(0, len(entry.tokens) - position)
        replayed, sent = token_ids[:known], entry.tokens[position : position + known]
        self.replay_mismatches += sum(1 for ours, theirs in zip(replayed, sent, strict=False) if ours != theirs)
        if token_ids[known:]:
            entry.losses, entry.restarting = 0, False
        entry.tokens.extend(token_ids[known:])
        return min(known, len(token_ids))

    def close(self, request_id: int) -> None:
        """Forget a request that has ended; closing it twice is no error, for a cancel may cross its last token."""
        self._entries.pop(request_id, None)
