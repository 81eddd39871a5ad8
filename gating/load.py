"""Counters of what the gate chose: the raw material of balancing and of the expert-load metrics."""

import torch
from torch import Tensor


class ExpertLoad:
    """Tokens that this rank's attention has routed to each logical expert of each MoE layer."""

    def __init__(self, moe_layers: tuple[int, ...], num_experts: int) -> None:
        self._counts = {layer: torch.zeros(num_experts, dtype=torch.int64) for layer in moe_layers}

    def counts(self, layer: int) -> Tensor:
        """The counters of one layer's experts, int64 [E] on the CPU: to be added to by who routes."""
        return self._counts[layer]

    def take_changes(self) -> dict[int, list[int]]:
        """By layer, the counts of its experts since the last call; layers without any are left out."""
        changes = {layer: counts.tolist() for layer, counts in self._counts.items() if counts.any()}
        for layer in changes:
            self._counts[layer].zero_()
        return changes
