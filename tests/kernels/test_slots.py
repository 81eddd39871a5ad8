"""The plan of slots: the C twin equals the torch one. That it loses and doubles nothing: tests/transport."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.weights import needs_native, seeded


def _listed(value: object) -> object:
    """Tensors as lists, each with its dtype."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    return [_listed(part) for part in value] if isinstance(value, (list, tuple)) else value


@needs_native
@pytest.mark.parametrize("num_ranks", [1, 2, 5, 40])
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_plan_equals_its_twin(num_ranks: int, num_tokens: int) -> None:
    ids = torch.randint(0, 30, (num_tokens, 4), generator=seeded(), dtype=torch.int32)
    rank_of = torch.randint(0, num_ranks, (30,), generator=seeded(1), dtype=torch.int32)
    want = reference.plan_slots(ids, rank_of, num_ranks)
    plan = kernels.plan_slots(ids, rank_of, num_ranks)
    for field, expected in zip(dataclasses.fields(plan), want, strict=True):
        got = getattr(plan, field.name)
        assert _listed(got) == _listed(expected), field.name


@pytest.mark.parametrize(("expert", "message"), [(3, "expert 3 is outside 0 to 2"), (2, "rank -1 is outside 0 to 1")])
def test_both_twins_refuse_what_is_out_of_range(expert: int, message: str) -> None:
    ids, rank_of = torch.tensor([[0, expert]], dtype=torch.int32), torch.tensor([0, 1, -1], dtype=torch.int32)
    for plan in (kernels.plan_slots, reference.plan_slots):
        with pytest.raises(ValueError, match=message):
            plan(ids, rank_of, 2)
