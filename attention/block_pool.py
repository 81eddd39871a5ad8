"""The block pool: who holds which blocks of the paged latent cache, and what the others still contain.

Pure bookkeeping, no tensors, no time. The life of a block:

            allocate             publish                free by the last owner
    free ------------> owned ---------------> owned, --------------------------> cached
      ^                  |                    cached <--------------------------   |
      |                  |                                   share                 |
      +--free by owner---+                                                         |
      +----------------------- evicted by allocate, the least recently used -------+

`withdraw` leads from "owned, cached" back to "owned".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Hands out the `num_blocks` cache blocks of one attention group, each holding `block_size` token positions.

    A block has one owner from `allocate` on, who alone writes it, and more only after `publish`, which promises that
    it is full and will not be written again. Owners keep its id until `free`. A published block without an owner is
    free capacity like any other, but can be found by its name until `allocate` needs it. Handing out more than is
    free, or taking back a block that is not in use, is a fault of the caller and raises AssertionError with the
    state.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"the cache needs at least 1 block, got num_blocks={num_blocks}: give it more memory")
        if block_size < 1:
            raise ValueError(f"a cache block needs at least 1 position, got block_size={block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is handed out next, while its memory is still warm. Low ids come first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_owners = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        # Published blocks without an owner, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that somebody owns."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_positions: int) -> int:
        """How many blocks hold `num_positions` positions."""
        return -(-num_positions // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` distinct free blocks, now the caller's; ask `num_free` first. Those without a name go first."""
        if not 0 <= count <= self.num_free:
            raise AssertionError(f"{count} blocks asked for, {self.num_free} of {self.num_blocks} are free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._num_owners[block] = 1
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give up ownership of the blocks of one sequence, in the order of their positions."""
        # Last block first: of a cached prefix the end is evicted first, for without its beginning it is never found.
        for block in reversed(blocks):
            self._check_in_use(block, "freed", blocks)
            self._num_owners[block] -= 1
            if self._num_owners[block] == 0:
                if block in self._name_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int, name: bytes) -> None:
        """Let others find a full block of the caller's by the name of its contents. It must not be written any more.

        Where another block has that name already, this one stays the caller's alone.
        """
        self._check_in_use(block, "published", [block])
        if block in self._name_of:
            raise AssertionError(f"block {block} was published twice")
        if name not in self._block_of:
            self._block_of[name] = block
            self._name_of[block] = name

    def withdraw(self, blocks: Sequence[int]) -> None:
        """What these blocks of the caller's hold is not to be found any more, whoever has published it."""
        for block in blocks:
            self._check_in_use(block, "withdrawn", blocks)
            name = self._name_of.pop(block, None)
            if name is not None:
                del self._block_of[name]

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of `names`, from the first on, that are cached. Changes nothing."""
        found: list[int] = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` nobody owns: by so many `share` lowers `num_free`."""
        return sum(self._num_owners[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Become a further owner, or the only one, of blocks just found."""
        for block in blocks:
            if block not in self._name_of:
                raise AssertionError(f"block {block} was shared but is not published: sharing {list(blocks)}")
            self._idle.pop(block, None)
            self._num_owners[block] += 1

    def claim(self, blocks: Sequence[int]) -> None:
        """Become an owner, for each time it is named, of blocks that nobody was given here: who had them is gone.

        Those that are named more than once are shared, and must be full.
        """
        fresh = {block for block in blocks if not self._num_owners[block]}
        if not fresh <= set(self._free):
            raise AssertionError(f"blocks {sorted(fresh - set(self._free))} were claimed and are published")
        self._free = [block for block in self._free if block not in fresh]
        for block in blocks:
            self._num_owners[block] += 1

    def is_published(self, block: int) -> bool:
        """Whether others can find the block."""
        return block in self._name_of

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._name_of.pop(block)]
        return block

    def _check_in_use(self, block: int, verb: str, blocks: Sequence[int]) -> None:
        if not 0 <= block < self.num_blocks or not self._num_owners[block]:
            raise AssertionError(
                f"block {block} was {verb} but is not in use, as {self.num_used} of {self.num_blocks} are: "
                f"{list(blocks)}"
            )
