"""Memory for rows of results, kept from call to call.

Fresh memory for each step would be given back to the system, and its pages asked for again.
"""

from __future__ import annotations

import torch


class Room:
    """Float32 rows of one width, as many as were ever asked for at a time."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._memory = torch.empty((1, width), device=device)
        self._views: dict[int, torch.Tensor] = {}

    def rows(self, num_rows: int) -> torch.Tensor:
        """[num_rows, width], the caller's until it asks again; with what the last one left there."""
        if num_rows > self._memory.shape[0]:
            self._memory = self._memory.new_empty((num_rows, self._memory.shape[1]))
            self._views.clear()
        if num_rows not in self._views:
            self._views[num_rows] = self._memory[:num_rows]
        return self._views[num_rows]
