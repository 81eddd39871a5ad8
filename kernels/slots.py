"""The order in which the slots of a micro-batch travel to the ranks.

Legend: T tokens, K experts per token, E experts, S slots = (token, expert) pairs, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import reference
from kernels.runtime import native, native_available, require


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """The slots sorted by rank, then position; int32, on the CPU.

    For each rank: `tokens`, its distinct tokens, ascending; and of its slots `rows`, which of its tokens, `experts` and
    `positions`, flat t * K + k. `places` [S] is where each position went among the slots of all ranks.
    """

    tokens: tuple[torch.Tensor, ...]
    rows: tuple[torch.Tensor, ...]
    experts: tuple[torch.Tensor, ...]
    positions: tuple[torch.Tensor, ...]
    places: torch.Tensor
    slot_counts: list[int]


def plan_slots(ids_TK: torch.Tensor, rank_of_E: torch.Tensor, num_ranks: int) -> SlotPlan:
    """Sort the slots of ids int32 [T, K] by the rank that rank_of int32 [E] gives their expert, all on the CPU.

    Raises ValueError for an expert outside E or a rank outside `num_ranks`.
    """
    require(ids_TK, "ids", (None, None), torch.int32)
    require(rank_of_E, "rank_of", (None,), torch.int32)
    if not native_available():
        return SlotPlan(*reference.plan_slots(ids_TK, rank_of_E, num_ranks))
    num_tokens, top_k = ids_TK.shape
    num_slots = num_tokens * top_k
    plan = torch.empty(5 * num_slots, dtype=torch.int32)
    counts = torch.empty((2, num_ranks), dtype=torch.int32)
    at = plan.data_ptr(), counts.data_ptr()
    native.plan_slots(ids_TK.data_ptr(), num_tokens, top_k, rank_of_E.data_ptr(), rank_of_E.shape[0], num_ranks, *at)
    slot_counts, row_counts = counts.tolist()
    sizes = [*row_counts, num_slots - sum(row_counts), *slot_counts, *slot_counts, *slot_counts, num_slots]
    pieces = torch.split_with_sizes(plan, sizes)  # one call: each view apart would cost as much as all of them
    starts = [num_ranks + 1 + i * num_ranks for i in range(3)]
    rows, experts, positions = (tuple(pieces[start : start + num_ranks]) for start in starts)
    return SlotPlan(tuple(pieces[:num_ranks]), rows, experts, positions, pieces[-1], slot_counts)
