"""The ledger gives work to the least loaded group and never counts a token twice."""

from __future__ import annotations

import pytest

from moemesh.ledger import GroupLoad, Ledger, LedgerEntry, PrefixAffinity
from moemesh.sampling_params import SamplingParams

PARAMS = SamplingParams()


def given(ledger: Ledger, prompt: tuple[int, ...], new: int, *, num_groups: int, cache_salt: str = "") -> LedgerEntry:
    """A request that has been given to the best of all groups."""
    entry = ledger.admit(prompt, PARAMS, max_new_tokens=new, cache_salt=cache_salt)
    ledger.assign(entry, range(num_groups), ledger.loads())
    return entry


def test_the_group_with_the_fewest_outstanding_tokens_wins() -> None:
    ledger = Ledger(3)
    sizes = [(100, 50), (10, 10), (5, 5), (1, 1), (1, 30)]
    groups = [given(ledger, (1,) * prompt, new, num_groups=3).group for prompt, new in sizes]
    assert groups == [0, 1, 2, 2, 2]
    assert given(ledger, (1,), 1, num_groups=3).group == 1


def test_who_waits_is_nobodys_load_and_only_groups_that_are_offered_count() -> None:
    ledger = Ledger(3)
    waiting = ledger.admit((1,) * 100, PARAMS, max_new_tokens=1)
    loads = ledger.loads()
    assert [load.requests for load in loads] == [0, 0, 0]
    assert ledger.assign(waiting, (1, 2), loads) == 1
    assert loads[1] == GroupLoad(requests=1, outstanding=101)
    assert ledger.loads() == loads


def test_a_lost_groups_entries_begin_again_with_all_their_tokens() -> None:
    ledger = Ledger(2)
    first, second, other = (given(ledger, (1,) * 10, 5, num_groups=2) for _ in range(3))
    assert [first.group, second.group, other.group] == [0, 1, 0]
    ledger.accept(first.request_id, 0, [7, 8])
    assert ledger.lose(0, 0.0) == [first, other]
    assert (first.group, first.restarting, first.losses, first.outstanding_tokens) == (None, True, 1, 15)
    loads = ledger.loads()
    assert ledger.assign(first, (1,), loads) == 1
    assert loads[1] == GroupLoad(requests=2, outstanding=30, restarting=12)
    ledger.accept(first.request_id, 1, [8])
    assert first.restarting, "it knew that one"
    ledger.accept(first.request_id, 2, [9])
    assert (first.restarting, first.losses, first.outstanding_tokens) == (False, 0, 2)


def test_tokens_lighten_a_group_and_its_prompt_counts_only_until_the_first() -> None:
    ledger = Ledger(2)
    first = given(ledger, (1,) * 100, 10, num_groups=2)
    assert first.outstanding_tokens == 110
    ledger.accept(first.request_id, 0, [7])
    assert first.outstanding_tokens == 9


def test_replayed_tokens_are_known_and_different_ones_are_counted() -> None:
    ledger = Ledger(1)
    entry = ledger.admit((1, 2), PARAMS, max_new_tokens=10)
    assert ledger.accept(entry.request_id, 0, [5, 6]) == 0
    assert ledger.accept(entry.request_id, 0, [5]) == 1
    assert ledger.accept(entry.request_id, 1, [6, 7]) == 1
    assert entry.tokens == [5, 6, 7]
    assert ledger.replay_mismatches == 0
    assert ledger.accept(entry.request_id, 2, [8, 9]) == 1
    assert entry.tokens == [5, 6, 7, 9]
    assert ledger.replay_mismatches == 1


@pytest.mark.parametrize("times", [1, 2])
def test_a_closed_entry_is_gone(times: int) -> None:
    ledger = Ledger(1)
    entry = ledger.admit((1,), PARAMS, max_new_tokens=1)
    for _ in range(times):
        ledger.close(entry.request_id)
    assert len(ledger) == 0
    assert ledger.get(entry.request_id) is None


def affinity(num_groups: int, blocks: int = 100) -> PrefixAffinity:
    return PrefixAffinity(num_groups, block_size=2, blocks_per_group=blocks)


def admitted(ledger: Ledger, prompt: tuple[int, ...], salt: str = "", *, num_groups: int = 2) -> int | None:
    """The group of a request that ends at once."""
    entry = given(ledger, prompt, 1, num_groups=num_groups, cache_salt=salt)
    ledger.close(entry.request_id)
    return entry.group


def test_among_equally_loaded_groups_the_longest_prefix_wins() -> None:
    ledger = Ledger(3, affinity(3))
    first = given(ledger, (1, 2, 3, 4), 1, num_groups=3)
    second = given(ledger, (1, 2, 9, 9), 1, num_groups=3)
    third = given(ledger, (5, 6), 1, num_groups=3)
    for entry in (first, second, third):
        ledger.close(entry.request_id)
    assert [first.group, second.group, third.group] == [0, 1, 2]
    assert admitted(ledger, (5, 6, 7), num_groups=3) == 2
    assert admitted(ledger, (1, 2, 9, 9, 7), num_groups=3) == 1
    assert admitted(ledger, (1, 2, 7), num_groups=3) == 0, "the lowest number among equals"
    assert admitted(ledger, (8, 8), num_groups=3) == 0
    assert admitted(ledger, (5, 6), "salted", num_groups=3) == 0


def test_load_comes_before_affinity() -> None:
    ledger = Ledger(2, affinity(2))
    assert given(ledger, (1, 2, 3, 4), 1, num_groups=2).group == 0
    assert given(ledger, (1, 2, 3, 4), 1, num_groups=2).group == 1


def test_affinity_remembers_as_many_blocks_as_a_group_has() -> None:
    ledger = Ledger(2, affinity(2, blocks=3))
    busy = given(ledger, (7,), 50, num_groups=2)
    assert busy.group == 0
    for prompt in ((1, 2, 3, 4), (1, 2), (5, 5, 6, 6)):
        assert admitted(ledger, prompt) == 1
    ledger.close(busy.request_id)
    assert admitted(ledger, (5, 5)) == 1
    assert admitted(ledger, (1, 2)) == 1
    assert admitted(ledger, (1, 2, 3, 4, 5, 5)) == 1, "the beginning is remembered longer than the end"
    assert admitted(ledger, (9, 9)) == 0


def test_the_cache_of_a_lost_group_is_forgotten() -> None:
    ledger = Ledger(2, affinity(2))
    busy = given(ledger, (7, 7), 50, num_groups=2)
    assert admitted(ledger, (1, 2)) == 1
    ledger.close(busy.request_id)
    assert admitted(ledger, (1, 2, 3)) == 1
    ledger.lose(1, 0.0)
    assert admitted(ledger, (1, 2, 3)) == 0
