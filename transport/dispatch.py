"""Which rows go to which rank, how the expert service batches what came, and where the answers belong.

Everything here moves rows and never adds them, so it cannot change a bit.

Shape legend: T tokens, K experts per token, E logical experts, H hidden, S slots = (token, expert) pairs, n distinct
tokens for one rank, N rows over several calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kernels
from transport.errors import ProtocolError

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DispatchPart:
    """What one rank is asked for. The slots' order is the order of the rows in its answer.

    token_index int32 [n]: distinct tokens, ascending. slot_row int32 [S_r]: index into token_index.
    slot_expert int32 [S_r]: logical expert. slot_pos int32 [S_r]: flat position t * K + k, ascending.
    """

    token_index: Tensor
    slot_row: Tensor
    slot_expert: Tensor
    slot_pos: Tensor


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A micro-batch's slots sorted by rank, then position; each token once in each rank's rows.

    `destinations` are the ranks that host at least one slot, ascending; `parts` are theirs, in that order (views).
    `places` int32 [T, K] is the place of each slot among those of all parts in turn.
    """

    num_tokens: int
    top_k: int
    destinations: tuple[int, ...]
    parts: tuple[DispatchPart, ...]
    places: Tensor

    def part(self, rank: int) -> DispatchPart:
        """The share of one rank; empty tensors where it hosts nothing of the batch."""
        if rank in self.destinations:
            return self.parts[self.destinations.index(rank)]
        nothing = torch.empty(0, dtype=torch.int32)
        return DispatchPart(nothing, nothing, nothing, nothing)

    def num_slots(self, rank: int) -> int:
        """Rows that the rank's answer has."""
        return self.part(rank).slot_pos.shape[0]


def plan_dispatch(ids_TK: Tensor, rank_of_expert_E: Tensor, num_ranks: int) -> Dispatch:
    """Sort the slots of a micro-batch by the rank that hosts their expert.

    ids_TK int32 [T, K]: logical experts of each token. rank_of_expert_E int32 [E]. Both on the CPU.
    Raises ValueError for an expert outside E or a rank outside `num_ranks`.
    """
    plan = kernels.plan_slots(ids_TK, rank_of_expert_E, num_ranks)
    destinations = tuple([rank for rank, count in enumerate(plan.slot_counts) if count])
    parts = [
        DispatchPart(plan.tokens[rank], plan.rows[rank], plan.experts[rank], plan.positions[rank])
        for rank in destinations
    ]
    num_tokens, top_k = ids_TK.shape
    return Dispatch(num_tokens, top_k, destinations, tuple(parts), plan.places.view(num_tokens, top_k))


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """One request to an expert service: rows_nH and, for each slot, its row and its logical expert (int32 [S])."""

    rows_nH: Tensor
    slot_row: Tensor
    slot_expert: Tensor

    def missing(self, local_slot_E: Tensor) -> list[int]:
        """The experts it asks for that have no local slot (negative in local_slot_E int32 [E]), ascending."""
        experts: Int32 = self.slot_expert.numpy()
        absent = local_slot_E.numpy()[experts] < 0
        return np.unique(experts[absent]).tolist() if absent.any() else []


def dispatch_tensors(x_TH: Tensor, part: DispatchPart) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a DISPATCH frame: the part's rows of x_TH (itself where it is all of them), slot rows, experts."""
    everything = part.token_index.shape[0] == x_TH.shape[0]
    rows = x_TH if everything else x_TH.index_select(0, part.token_index)
    return rows, part.slot_row, part.slot_expert


def expert_call(tensors: Sequence[Tensor], *, hidden: int, num_experts: int) -> ExpertCall:
    """The call in a DISPATCH frame's tensors. Raises ProtocolError where they do not fit each other or the model."""
    if len(tensors) != 3:
        raise ProtocolError(f"a dispatch frame has 3 tensors, got {len(tensors)}")
    rows, slot_row, slot_expert = tensors
    if rows.dim() != 2 or rows.shape[1] != hidden or rows.dtype is not torch.float32:
        raise ProtocolError(f"dispatched rows are {rows.dtype} {tuple(rows.shape)}, not float32 [n, {hidden}]")
    for name, index, limit in (("row", slot_row, rows.shape[0]), ("expert", slot_expert, num_experts)):
        if index.dim() != 1 or index.dtype is not torch.int32 or index.shape != slot_row.shape:
            raise ProtocolError(f"slot {name}s are {index.dtype} {tuple(index.shape)}, not int32 {slot_row.shape}")
        values: Int32 = index.numpy()
        if values.size and values.view(np.uint32).max() >= limit:
            raise ProtocolError(f"slot {name}s reach outside 0 to {limit - 1}")
    return ExpertCall(rows, slot_row, slot_expert)


def merge_calls(calls: Sequence[ExpertCall]) -> ExpertCall:
    """Calls of one layer as one, so that each touched expert's weights are read once; rows and slots in their order."""
    if len(calls) == 1:
        return calls[0]
    slot_rows: list[Int32] = []
    start = 0
    for call in calls:
        slot_rows.append(call.slot_row.numpy() + np.int32(start))
        start += call.rows_nH.shape[0]
    return ExpertCall(
        torch.cat([call.rows_nH for call in calls]),
        torch.from_numpy(np.concatenate(slot_rows)),
        torch.from_numpy(np.concatenate([call.slot_expert.numpy() for call in calls])),
    )
