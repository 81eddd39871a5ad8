"""The experts resident on one rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

import kernels
from transport.dispatch import ExpertCall

NOT_HERE = -1


class ExpertBank:
    """One layer's resident experts, packed for the grouped kernel.

    The bank owns the packed memory. `local_slot_E` int32 [E] (on the CPU) is the place of each logical expert in it,
    NOT_HERE for one that is not resident.
    """

    def __init__(self, logical_experts: Sequence[int], num_experts: int, packed: kernels.PackedExperts) -> None:
        self.logical_experts = tuple(logical_experts)
        self.packed = packed
        self.local_slot_E = torch.full((num_experts,), NOT_HERE, dtype=torch.int32)
        self.local_slot_E[list(self.logical_experts)] = torch.arange(len(self.logical_experts), dtype=torch.int32)

    @property
    def num_resident(self) -> int:
        return len(self.logical_experts)

    def compute(self, call: ExpertCall) -> Tensor:
        """Expert outputs float32 [S, H], in the call's slot order. Raises ValueError for one that is not resident."""
        device = call.rows_nH.device
        return kernels.grouped_ffn(
            call.rows_nH,
            self.packed,
            call.slot_row.to(device),
            call.slot_expert.to(device),
            place_of=self.local_slot_E,
        )
