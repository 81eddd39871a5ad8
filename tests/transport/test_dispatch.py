"""Dispatch and combine move rows: nothing is lost, doubled or changed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transport.dispatch import (
    Dispatch,
    ExpertCall,
    dispatch_tensors,
    expert_call,
    merge_calls,
    plan_dispatch,
)
from transport.errors import ProtocolError

HIDDEN = 3


@st.composite
def routings(draw: st.DrawFn, *, max_tokens: int = 12) -> tuple[Tensor, Tensor, int]:
    """ids_TK with distinct experts a token, rank of each expert, number of ranks."""
    num_experts = draw(st.integers(1, 16))
    num_ranks = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, min(4, num_experts)))
    experts = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    ids = draw(st.lists(experts, max_size=max_tokens))
    ranks = draw(st.lists(st.integers(0, num_ranks - 1), min_size=num_experts, max_size=num_experts))
    return (
        torch.tensor(ids, dtype=torch.int32).view(-1, top_k),
        torch.tensor(ranks, dtype=torch.int32),
        num_ranks,
    )


def reference_part(ids_TK: Tensor, rank_of: Tensor, rank: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """The slow twin: token_index, slot_row, slot_expert, slot_pos."""
    top_k = ids_TK.shape[1]
    slots = [(p, e) for p, e in enumerate(ids_TK.flatten().tolist()) if rank_of[e] == rank]
    tokens = sorted({p // top_k for p, _ in slots})
    return tokens, [tokens.index(p // top_k) for p, _ in slots], [e for _, e in slots], [p for p, _ in slots]


@given(routings())
def test_plan_equals_its_slow_twin(routing: tuple[Tensor, Tensor, int]) -> None:
    ids_TK, rank_of, num_ranks = routing
    dispatch = plan_dispatch(ids_TK, rank_of, num_ranks)
    destinations = []
    for rank in range(num_ranks):
        part = dispatch.part(rank)
        arrays = (part.token_index, part.slot_row, part.slot_expert, part.slot_pos)
        assert all(array.dtype is torch.int32 for array in arrays)
        assert tuple(array.tolist() for array in arrays) == reference_part(ids_TK, rank_of, rank)
        assert dispatch.num_slots(rank) == part.slot_pos.shape[0]
        destinations += [rank] * bool(part.slot_pos.numel())
    assert dispatch.destinations == tuple(destinations)


@given(routings())
def test_each_token_goes_once_to_each_rank_and_each_slot_once_at_all(routing: tuple[Tensor, Tensor, int]) -> None:
    ids_TK, rank_of, num_ranks = routing
    dispatch = plan_dispatch(ids_TK, rank_of, num_ranks)
    parts = [dispatch.part(rank) for rank in range(num_ranks)]
    for part in parts:
        assert len(set(part.token_index.tolist())) == part.token_index.numel()
    slots = torch.cat([part.slot_pos for part in parts])
    assert sorted(slots.tolist()) == list(range(ids_TK.numel()))


def serve(calls: list[ExpertCall], local_slot_E: Tensor, num_local: int) -> list[Tensor]:
    """An expert service whose experts give back their row with the expert's local number behind it."""
    merged = merge_calls(calls)
    rows = merged.rows_nH.index_select(0, merged.slot_row)
    local = local_slot_E[merged.slot_expert.long()]
    assert local.numel() == 0 or 0 <= int(local.min()) <= int(local.max()) < num_local
    answer = torch.cat([rows, local[:, None].float()], dim=1)
    return list(answer.split([call.slot_row.numel() for call in calls]))


def numbers_of(rank_of: Tensor, rank: int) -> tuple[Tensor, int]:
    """Local slots in descending expert order, so that merging must reorder."""
    experts = (rank_of == rank).nonzero().flatten().flip(0)
    local_slot = torch.full_like(rank_of, -1)
    local_slot[experts] = torch.arange(len(experts), dtype=torch.int32)
    return local_slot, max(1, len(experts))


def received(x_TH: Tensor, dispatch: Dispatch, rank: int, num_experts: int) -> ExpertCall:
    return expert_call(dispatch_tensors(x_TH, dispatch.part(rank)), hidden=HIDDEN, num_experts=num_experts)


@given(routings(), routings(max_tokens=5), st.randoms(use_true_random=False))
def test_dispatch_then_combine_with_identity_experts_is_identity(
    routing: tuple[Tensor, Tensor, int], second: tuple[Tensor, Tensor, int], random: object
) -> None:
    """Two senders' calls merged at every rank: each slot gets its own token's row, from its own expert."""
    ids_TK, rank_of, num_ranks = routing
    num_experts = len(rank_of)
    batches = [ids_TK, second[0] % num_experts]
    xs = [torch.randn(len(ids), HIDDEN) for ids in batches]
    dispatches = [plan_dispatch(ids, rank_of, num_ranks) for ids in batches]
    answers: list[dict[int, Tensor]] = [{}, {}]
    for rank in range(num_ranks):
        asking = [i for i, dispatch in enumerate(dispatches) if rank in dispatch.destinations]
        if not asking:
            continue
        local_slot, num_local = numbers_of(rank_of, rank)
        calls = [received(xs[i], dispatches[i], rank, num_experts) for i in asking]
        assert all(call.missing(local_slot) == [] for call in calls)
        for i, answer in zip(asking, serve(calls, local_slot, num_local), strict=True):
            answers[i][rank] = answer
    for ids, x_TH, dispatch, by_rank in zip(batches, xs, dispatches, answers, strict=True):
        assert dispatch.places.dtype is torch.int32
        assert dispatch.places.shape == ids.shape
        if not by_rank:
            continue
        rows = torch.cat([by_rank[rank] for rank in dispatch.destinations])
        y_TKH = rows[dispatch.places.long()]
        assert torch.equal(y_TKH[..., :HIDDEN], x_TH[:, None, :].expand(-1, ids.shape[1], -1))
        expected = torch.stack([numbers_of(rank_of, int(rank_of[e]))[0][e] for e in ids.flatten()])
        assert torch.equal(y_TKH[..., HIDDEN].flatten(), expected.float())


def test_worked_example() -> None:
    """Experts 0, 1 on rank 0 and 2, 3 on rank 1; tokens choose (3, 0) and (2, 3)."""
    ids_TK = torch.tensor([[3, 0], [2, 3]], dtype=torch.int32)
    dispatch = plan_dispatch(ids_TK, torch.tensor([0, 0, 1, 1], dtype=torch.int32), 2)
    part = dispatch.part(1)
    assert part.token_index.tolist() == [0, 1]
    assert part.slot_expert.tolist() == [3, 2, 3]
    assert part.slot_pos.tolist() == [0, 2, 3]
    assert part.slot_row.tolist() == [0, 1, 1]
    assert dispatch.places.tolist() == [[1, 0], [2, 3]]


def test_ids_and_ranks_out_of_range_are_refused() -> None:
    rank_of = torch.tensor([0, 1, -1], dtype=torch.int32)
    for wrong, message in ((3, "expert 3 is outside 0 to 2"), (-1, "expert -1"), (2, "rank -1 is outside 0 to 1")):
        with pytest.raises(ValueError, match=message):
            plan_dispatch(torch.tensor([[wrong]], dtype=torch.int32), rank_of, 2)


def test_missing_experts_are_named() -> None:
    slots = torch.tensor([0, 0, 0], dtype=torch.int32)
    call = ExpertCall(torch.ones(1, HIDDEN), slots, torch.tensor([0, 2, 3], dtype=torch.int32))
    local_slot = torch.tensor([0, -1, -1, -1], dtype=torch.int32)
    assert call.missing(local_slot) == [2, 3]


def test_one_call_is_not_copied() -> None:
    slots = torch.tensor([0, 1], dtype=torch.int32)
    call = ExpertCall(torch.randn(2, HIDDEN), slots, slots)
    assert merge_calls([call]) is call


@pytest.mark.parametrize(
    ("rows", "slot_row", "slot_expert", "message"),
    [
        (torch.ones(1, 2), [0], [0], r"not float32 \[n, 3\]"),
        (torch.ones(1, 3, dtype=torch.float64), [0], [0], "torch.float64"),
        (torch.ones(3), [0], [0], r"not float32 \[n, 3\]"),
        (torch.ones(1, 3), [1], [0], "slot rows reach outside 0 to 0"),
        (torch.ones(1, 3), [-1], [0], "slot rows reach outside"),
        (torch.ones(1, 3), [0], [4], "slot experts reach outside 0 to 3"),
        (torch.ones(1, 3), [0, 0], [0], "slot experts are"),
        (torch.ones(1, 3), [[0]], [[0]], "slot rows are"),
    ],
)
def test_calls_that_do_not_fit_are_refused(
    rows: Tensor, slot_row: list[int], slot_expert: list[int], message: str
) -> None:
    tensors = (rows, torch.tensor(slot_row, dtype=torch.int32), torch.tensor(slot_expert, dtype=torch.int32))
    with pytest.raises(ProtocolError, match=message):
        expert_call(tensors, hidden=HIDDEN, num_experts=4)


def test_call_without_its_three_tensors_is_refused() -> None:
    with pytest.raises(ProtocolError, match="3 tensors, got 1"):
        expert_call((torch.ones(1, 3),), hidden=HIDDEN, num_experts=4)
