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

    `tokens`: each rank's distinct tokens, ascending, rank after rank. Over the sorted slots, [S]: `rows`, which of its
    rank's tokens; `experts`; `positions`, flat t * K + k. `places` [S] is where each position went. By rank:
    `slot_counts` and `row_counts`.
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    experts: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    slot_counts: list[int]
    row_counts: list[int]


def plan_slots(ids_TK: torch.Tensor, rank_of_E: torch.Tensor, num_ranks: int) -> SlotPlan:
    """Sort the slots of ids int32 [T, K] by the rank that rank_of int32 [E] gives their expert, all on the CPU.

    Raises ValueError for an expert outside E or a rank outside `num_ranks`.
    """
    require(ids_TK, "ids", (None, None), torch.int32)
    require(rank_of_E, "rank_of", (None,), torch.int32)
    if not native_available():
        return SlotPlan(*reference.plan_slots(ids_TK, rank_of_E, num_ranks))
    num_tokens, top_k = ids_TK.shape
    plan = torch.empty((5, num_tokens * top_k), dtype=torch.int32)
    counts = torch.empty((2, num_ranks), dtype=torch.int32)
    at = plan.data_ptr(), counts.data_ptr()
    native.plan_slots(ids_TK.data_ptr(), num_tokens, top_k, rank_of_E.data_ptr(), rank_of_E.shape[0], num_ranks, *at)
    slot_counts, row_counts = counts.tolist()
    tokens, rows, experts, positions, places = plan.unbind()
    return SlotPlan(tokens[: sum(row_counts)], rows, experts, positions, places, slot_counts, row_counts)
