"""The pool of send buffers."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from transport.buffers import BufferPool


@given(st.lists(st.integers(1, 100_000), max_size=30))
def test_buffers_in_use_never_overlap_and_have_the_size_asked_for(sizes: list[int]) -> None:
    pool = BufferPool()
    for _ in range(2):
        taken = [pool.take(size) for size in sizes]
        assert [buffer.data.nbytes for buffer in taken] == sizes
        assert all(buffer.address % 64 == 0 for buffer in taken)
        spans = sorted((buffer.address, buffer.address + buffer.memory.nbytes) for buffer in taken)
        assert all(left[1] <= right[0] for left, right in pairwise(spans))
        for buffer in taken:
            pool.give_back(buffer)


def test_a_buffer_that_came_back_is_used_again_up_to_the_limit() -> None:
    pool = BufferPool(max_bytes=8192)
    first, second, third = pool.take(5000), pool.take(5000), pool.take(4096)
    pool.give_back(first)
    pool.give_back(second)
    pool.give_back(third)
    assert pool.take(8000) is first
    assert pool.take(8000) is not second
    assert pool.take(1) is not third
