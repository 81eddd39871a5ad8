"""Load counters count every choice once and start again when they are taken."""

from __future__ import annotations

import torch

from gating import ExpertLoad


def test_counts_are_given_once_and_only_where_there_are_any() -> None:
    load = ExpertLoad((1, 4), 5)
    load.counts(4).add_(torch.tensor([1, 0, 1, 0, 2]))
    load.counts(4).add_(torch.tensor([0, 1, 0, 0, 1]))
    assert load.take_changes() == {4: [1, 1, 1, 0, 3]}
    assert load.take_changes() == {}
    load.counts(1)[3] += 2
    assert load.take_changes() == {1: [0, 0, 0, 2, 0]}
