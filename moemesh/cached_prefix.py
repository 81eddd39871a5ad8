"""What one sequence takes from the prefix cache, and what it leaves there. Decides only.

A block is published as soon as all its positions are computed, be they prompt or generated, and may then be shared by
any sequence that begins with the same tokens (and, where the form of attention depends on it, with as many of them
prompt). What is taken is never the whole sequence: at least its last token is computed, because its logits are needed.
"""

from __future__ import annotations

from attention.block_hash import block_hashes, chain_root, generated_from
from attention.block_pool import BlockPool
from moemesh.sequence import Sequence


class CachedPrefix:
    """The named blocks of one sequence.

    `key`: what latents depend on beside the tokens and the sequence's salt; None: nothing is published, nor found.
    `by_role`: they also depend on which tokens are prompt and which generated.
    """

    def __init__(self, sequence: Sequence, pool: BlockPool, key: str | None, *, by_role: bool = False) -> None:
        self.enabled = key is not None
        self._sequence = sequence
        self._pool = pool
        self._by_role = by_role
        self._root = chain_root(key or "", sequence.cache_salt)
        self._names: list[bytes] = []
        self._num_settled = 0  # blocks of its table that are published, taken from the cache, or there already

    def find(self) -> list[int]:
        """The cached blocks that the sequence could begin with. Changes nothing."""
        if not self.enabled:
            return []
        most = (self._sequence.num_tokens - 1) // self._pool.block_size
        self._name(most)
        return self._pool.find(self._names[:most])

    def continues_in(self, other: CachedPrefix, num_cached: int) -> bool:
        """Whether `other` is about to compute the block that comes after `num_cached` cached ones of this sequence.

        Equal names stand at equal places, for they cover all that comes before.
        """
        return (
            other._num_settled <= num_cached < min(len(self._names), len(other._names))
            and self._names[num_cached] == other._names[num_cached]
        )

    def take(self, blocks: list[int]) -> None:
        """Begin the sequence, which has no blocks, with some just found, or with none."""
        self._pool.share(blocks)
        self._sequence.block_table += blocks
        self._sequence.num_computed = len(blocks) * self._pool.block_size
        self._num_settled = len(blocks)

    def publish(self) -> None:
        """Publish the blocks that the sequence has filled since the last call."""
        num_full = self._sequence.num_computed // self._pool.block_size
        if not self.enabled or num_full == self._num_settled:
            return
        self._name(num_full)
        for index in range(self._num_settled, num_full):
            self._pool.publish(self._sequence.block_table[index], self._names[index])
        self._num_settled = num_full

    def resume(self) -> None:
        """The sequence has claimed blocks that hold its tokens already: publish the full ones, unless others have."""
        num_full = self._sequence.num_computed // self._pool.block_size
        if not self.enabled:
            return
        self._name(num_full)
        for block, name in zip(self._sequence.block_table[:num_full], self._names, strict=False):
            if not self._pool.is_published(block):
                self._pool.publish(block, name)
        self._num_settled = num_full

    def withdraw(self) -> None:
        """Nobody is to find what this sequence has computed or taken from the cache."""
        self._pool.withdraw(self._sequence.block_table)

    def _name(self, num_blocks: int) -> None:
        """Names for the first `num_blocks` blocks of the sequence."""
        num_prompt = len(self._sequence.prompt_ids)
        whole, offset = divmod(num_prompt, self._pool.block_size)  # blocks of nothing but prompt
        if self._by_role and num_blocks > whole:
            self._chain(whole)
            if len(self._names) == whole:
                self._chain(num_blocks, generated_from(self._last_name, offset))
        self._chain(num_blocks)

    def _chain(self, num_blocks: int, parent: bytes | None = None) -> None:
        size, named = self._pool.block_size, len(self._names)
        if num_blocks > named:
            tokens = self._sequence.token_ids(named * size, num_blocks * size)
            self._names += block_hashes(parent or self._last_name, tokens, size)

    @property
    def _last_name(self) -> bytes:
        return self._names[-1] if self._names else self._root
