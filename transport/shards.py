"""How tensor parallelism splits a sum without changing a bit of it.

A split sum is always computed as partial sums of `num_shards` logical shards (a power of two, a function of the model
alone), added in one balanced binary tree. A member owns a contiguous range of shards and adds up only the maximal
subtrees inside it; the rest of the tree is added where all of them meet. Example with 8 shards and 3 members:

    member 0: shards 0 1      -> subtree (0, 2)
    member 1: shards 2 3 4    -> subtrees (2, 4), (4, 5)
    member 2: shards 5 6 7    -> subtrees (5, 6), (6, 8)
    sum = ((0,2) + (2,4)) + (((4,5) + (5,6)) + (6,8))

Pure.
"""

from collections.abc import Mapping

from torch import Tensor

Range = tuple[int, int]


def row_split(num_rows: int, num_members: int) -> list[Range]:
    """(start, stop) of each member's rows: even, the first ones larger; members beyond the rows own none."""
    return [owned_rows(num_rows, num_members, member) for member in range(num_members)]


def owned_rows(num_rows: int, num_members: int, index: int) -> Range:
    """(start, stop) of one member's rows."""
    share, extra = divmod(num_rows, num_members)
    start = index * share + min(index, extra)
    return start, start + share + (index < extra)


def owned_shards(num_shards: int, num_members: int, index: int) -> Range:
    """The contiguous range of logical shards of one member. Raises ValueError if some member would own none."""
    if not 0 <= index < num_members <= num_shards:
        raise ValueError(
            f"member {index} of {num_members} cannot share {num_shards} logical shards: "
            f"use a tensor-parallel degree of at most {num_shards}"
        )
    return index * num_shards // num_members, (index + 1) * num_shards // num_members


def maximal_subtrees(low: int, high: int, num_shards: int) -> list[Range]:
    """The fewest aligned power-of-two ranges that make up [low, high), ascending: subtrees of the sum's tree."""
    if num_shards < 1 or num_shards & (num_shards - 1) or not 0 <= low <= high <= num_shards:
        raise ValueError(f"shards {low} to {high} are not a range of a tree over {num_shards} (a power of two) shards")
    subtrees = []
    while low < high:
        # The largest power of two that divides low and still fits.
        size = low & -low or num_shards
        while low + size > high:
            size //= 2
        subtrees.append((low, low + size))
        low += size
    return subtrees


def tree_sum(parts: Mapping[Range, Tensor], num_shards: int) -> Tensor:
    """Add the partial sums of subtrees that together cover all shards; the same bits however they are cut.

    Reads its inputs only; the result may be one of them (when one part covers everything).
    Raises ValueError when a shard is missing.
    """

    def add(low: int, high: int) -> Tensor:
        part = parts.get((low, high))
        if part is not None:
            return part
        if high - low <= 1:
            raise ValueError(f"shard {low} of {num_shards} is in none of the subtrees {sorted(parts)}")
        middle = (low + high) // 2
        return add(low, middle) + add(middle, high)

    return add(0, num_shards)
