"""Blocks are written by one owner only, shared only once they are full, and never lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from attention.block_pool import BlockPool


def test_blocks_for_rounds_up() -> None:
    pool = BlockPool(4, 32)
    assert [pool.blocks_for(n) for n in (0, 1, 32, 33, 64, 65)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 32), (-1, 32), (4, 0)])
def test_an_empty_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(num_blocks, block_size)


@pytest.mark.parametrize("count", [5, -1])
def test_more_than_is_free_raises_with_both_numbers(count: int) -> None:
    pool = BlockPool(4, 32)
    with pytest.raises(AssertionError, match=f"{count} blocks asked for, 4 of 4"):
        pool.allocate(count)
    assert pool.num_free == 4


@pytest.mark.parametrize("block", [0, 3, 4, -1])
def test_freeing_a_block_that_is_not_in_use_raises(block: int) -> None:
    pool = BlockPool(4, 32)
    pool.free(pool.allocate(1))
    with pytest.raises(AssertionError, match=f"block {block} was freed"):
        pool.free([block])


def test_freeing_twice_in_one_call_raises() -> None:
    pool = BlockPool(4, 32)
    (block,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="not in use"):
        pool.free([block, block])


def name(number: int) -> bytes:
    return number.to_bytes(4, "little")


def cached(pool: BlockPool, numbers: Sequence[int]) -> list[int]:
    """Blocks that were used by somebody who has gone, published under the names of `numbers`."""
    blocks = pool.allocate(len(numbers))
    for block, number in zip(blocks, numbers, strict=True):
        pool.publish(block, name(number))
    pool.free(blocks)
    return blocks


def test_a_cached_block_counts_as_free_and_is_found_until_it_is_needed() -> None:
    pool = BlockPool(4, 32)
    blocks = cached(pool, [1, 2])
    assert pool.num_free == 4
    assert pool.find([name(1), name(2), name(3)]) == blocks
    assert pool.find([name(2)]) == blocks[1:]
    assert pool.find([name(3), name(1)]) == []
    assert set(pool.allocate(2)).isdisjoint(blocks), "blocks without a name go first"
    assert pool.find([name(1), name(2)]) == blocks
    pool.allocate(1)
    assert pool.find([name(1), name(2)]) == blocks[:1], "of a prefix the end goes first"
    pool.allocate(1)
    assert pool.find([name(1)]) == []


def test_the_least_recently_used_goes_first() -> None:
    pool = BlockPool(3, 32)
    for number in (1, 2, 3):
        cached(pool, [number])
    again = pool.find([name(1)])
    pool.share(again)
    pool.free(again)
    pool.allocate(1)
    assert [bool(pool.find([name(number)])) for number in (1, 2, 3)] == [True, False, True]


def test_a_shared_block_is_free_when_its_last_owner_has_gone() -> None:
    pool = BlockPool(2, 32)
    blocks = cached(pool, [1])
    assert pool.num_idle(blocks) == 1
    pool.share(blocks)
    assert pool.num_idle(blocks) == 0
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_used == 1
    pool.free(blocks)
    assert pool.num_used == 0
    with pytest.raises(AssertionError, match="was freed but is not in use"):
        pool.free(blocks)


def test_a_second_block_of_the_same_contents_is_nobody_elses() -> None:
    pool = BlockPool(4, 32)
    first, second = pool.allocate(2)
    pool.publish(first, name(1))
    pool.publish(second, name(1))
    assert pool.find([name(1)]) == [first]
    pool.free([first, second])
    pool.allocate(3)
    assert pool.find([name(1)]) == [first], "the second one had no name and went first"


def test_a_withdrawn_block_stays_its_owners_and_is_not_found_again() -> None:
    pool = BlockPool(3, 32)
    blocks = cached(pool, [1, 2])
    pool.share(blocks)
    nameless = pool.allocate(1)
    pool.withdraw([*blocks, *nameless])
    assert pool.find([name(1)]) == []
    assert pool.num_used == 3
    pool.free([*blocks, *nameless])
    assert pool.num_used == 0
    assert cached(pool, [1]) == pool.find([name(1)]), "the name may be given again"
    with pytest.raises(AssertionError, match="was withdrawn but is not in use"):
        pool.withdraw(blocks[:1])


def test_publishing_and_sharing_what_one_must_not_raises() -> None:
    pool = BlockPool(2, 32)
    (block,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="was shared but is not published"):
        pool.share([block])
    with pytest.raises(AssertionError, match="was published but is not in use"):
        pool.publish(1 - block, name(1))
    pool.publish(block, name(1))
    with pytest.raises(AssertionError, match="published twice"):
        pool.publish(block, name(2))


class BlockPoolMachine(RuleBasedStateMachine):
    """Against a model that remembers what every block holds: `tables` of owners, `contents` and the `idle` in order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, 32)
        self.tables: list[list[int]] = []
        self.contents: dict[int, int] = {}
        self.idle: list[int] = []

    def owned(self) -> set[int]:
        return {block for table in self.tables for block in table}

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            return
        nameless = self.pool.num_free - len(self.idle)
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert self.owned().isdisjoint(blocks), "an owned block was handed out to write"
        evicted = [block for block in blocks if block in self.contents]
        assert evicted == self.idle[: max(0, count - nameless)]
        for block in evicted:
            del self.contents[block]
            self.idle.remove(block)
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), content=st.integers(0, 5))
    def publish(self, data: st.DataObject, content: int) -> None:
        table = data.draw(st.sampled_from(self.tables))
        private = [block for block in table if block not in self.contents]
        if private:
            self.pool.publish(private[0], name(content))
            if content not in self.contents.values():
                self.contents[private[0]] = content

    @rule(wanted=st.lists(st.integers(0, 5), max_size=4, unique=True))
    def share(self, wanted: list[int]) -> None:
        blocks = self.pool.find([name(content) for content in wanted])
        assert [self.contents[block] for block in blocks] == wanted[: len(blocks)]
        assert len(blocks) == len(wanted) or wanted[len(blocks)] not in self.contents.values()
        before = self.pool.num_free
        expected = self.pool.num_idle(blocks)
        self.pool.share(blocks)
        assert before - self.pool.num_free == expected
        self.idle = [block for block in self.idle if block not in blocks]
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.free(table)
        owned = self.owned()
        self.idle += [block for block in reversed(table) if block in self.contents and block not in owned]

    @invariant()
    def every_block_is_owned_or_free(self) -> None:
        assert self.pool.num_used == len(self.owned())
        assert self.pool.num_free + self.pool.num_used == 8

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.free(table)
        assert sorted(self.pool.allocate(8)) == list(range(8)), "a block was lost"


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_blocks_of_another_life_are_claimed() -> None:
    pool = BlockPool(6, 4)
    pool.claim([4, 1, 4])
    assert pool.num_used == 2
    assert sorted(pool.allocate(4)) == [0, 2, 3, 5]
    pool.publish(4, b"full")
    assert pool.is_published(4)
    assert not pool.is_published(1)
    pool.free([4])
    assert pool.num_used == 6, "it is shared"
    pool.free([4])
    assert pool.find([b"full"]) == [4]
    with pytest.raises(AssertionError, match=r"blocks \[4\] were claimed and are published"):
        pool.claim([4])
