"""Names of blocks: equal exactly where everything that a block's latents depend on is equal."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from attention.block_hash import block_hashes, chain_root, generated_from

IDS = st.lists(st.integers(0, 3), max_size=40)
KEYS = st.lists(st.text(st.characters(codec="utf-8"), max_size=4), max_size=3)


def test_a_name_is_the_hash_of_the_one_before_and_the_ids() -> None:
    root = chain_root("absorbed", "tenant")
    ids = [7, 129_279]
    expected = hashlib.sha256(root + b"".join(i.to_bytes(8, "little") for i in ids)).digest()
    assert block_hashes(root, [*ids, 5], 2) == [expected]


@given(IDS, IDS, st.integers(1, 5))
def test_as_many_names_agree_as_full_blocks_from_the_start(ours: list[int], theirs: list[int], size: int) -> None:
    root = chain_root()
    names, others = block_hashes(root, ours, size), block_hashes(root, theirs, size)
    assert len(names) == len(ours) // size
    for index, (name, other) in enumerate(zip(names, others, strict=False), start=1):
        assert (name == other) == (ours[: index * size] == theirs[: index * size])


@given(IDS, st.integers(0, 40), st.integers(1, 5))
def test_a_chain_can_be_taken_up_anywhere(ids: list[int], blocks: int, size: int) -> None:
    names = block_hashes(chain_root(), ids, size)
    first = min(blocks, len(names))
    parent = names[first - 1] if first else chain_root()
    assert block_hashes(parent, ids[first * size :], size) == names[first:]


@given(IDS, st.integers(0, 4), st.integers(0, 4))
def test_what_was_generated_has_other_names_than_the_same_in_a_prompt(ids: list[int], ours: int, theirs: int) -> None:
    root = chain_root()
    names = [block_hashes(generated_from(root, offset), ids, 5) for offset in (ours, theirs)]
    assert (names[0] == names[1]) == (ours == theirs or len(ids) < 5)
    assert not {*names[0]} & {*block_hashes(root, ids, 5)}


@given(KEYS, KEYS)
def test_other_keys_are_another_chain(ours: list[str], theirs: list[str]) -> None:
    """Also where one text is cut into keys in two ways."""
    assert (chain_root(*ours) == chain_root(*theirs)) == (ours == theirs)
