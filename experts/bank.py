"""The experts resident on one rank."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import kernels
from transport.dispatch import ExpertCall

NOT_HERE = -1


class ExpertBank:
    """One layer's resident experts, packed for the grouped kernel, and room for others.

    The bank owns the packed memory. `local_slot_E` int32 [E] (on the CPU) is the place of each logical expert in it,
    NOT_HERE for one that is not resident. More become resident while it serves: a slot is `reserve`d, filled by whoever
    loads (another thread may), and `admit`ted. All methods belong to one thread.
    """

    def __init__(self, logical_experts: Sequence[int], num_experts: int, packed: kernels.PackedExperts) -> None:
        """`packed` holds `logical_experts` in its first slots; what lies behind them is free."""
        self.packed = packed
        self.local_slot_E = torch.full((num_experts,), NOT_HERE, dtype=torch.int32)
        self.local_slot_E[list(logical_experts)] = torch.arange(len(logical_experts), dtype=torch.int32)
        self._slots = self.local_slot_E.numpy()  # the same memory
        self._free = list(range(packed.num_experts - 1, len(logical_experts) - 1, -1))

    @property
    def logical_experts(self) -> tuple[int, ...]:
        """The experts that are resident, ascending."""
        return tuple(np.flatnonzero(self._slots != NOT_HERE).tolist())

    @property
    def num_resident(self) -> int:
        return len(self.logical_experts)

    def reserve(self) -> int | None:
        """A free slot, to be filled; None where there is none."""
        return self._free.pop() if self._free else None

    def admit(self, expert: int, slot: int) -> None:
        """The expert lies in a slot that was reserved: from now on it is resident."""
        assert self._slots[expert] == NOT_HERE, f"expert {expert} is resident already"
        self._slots[expert] = slot

    def drop(self, expert: int) -> int:
        """The expert is resident no longer: its slot, to be unloaded and freed."""
        slot = int(self._slots[expert])
        assert slot != NOT_HERE, f"expert {expert} is not resident"
        self._slots[expert] = NOT_HERE
        return slot

    def free(self, slot: int) -> None:
        """A slot that was reserved, or whose expert was dropped, is unloaded and may be reserved again."""
        self._free.append(slot)

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
