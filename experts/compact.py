"""`--combine compact`: one weighted row per (token, rank) instead of one row per (token, expert).

Fewer bytes travel back; the sum over a rank's experts is then taken there, so results depend on the placement.

Shape legend: n rows of one call, S its slots, H hidden, k slots of one row at most.
"""

import numpy as np
import torch
from torch import Tensor

import kernels
from transport.dispatch import Dispatch, ExpertCall


def weighted_rows(answer_SH: Tensor, call: ExpertCall, weights_S: Tensor) -> Tensor:
    """Sum of each row's slots, weighted, in slot order: float32 [n, H]."""
    slot_row = call.slot_row.numpy()
    num_rows = call.rows_nH.shape[0]
    order = np.argsort(slot_row, kind="stable")
    counts = np.bincount(slot_row, minlength=num_rows)
    first = np.cumsum(counts) - counts
    column = np.arange(order.size) - np.repeat(first, counts)
    width = int(counts.max(initial=1))
    # A row with fewer slots is padded with a slot of its own at weight 0: another row's may not be finite.
    own = np.zeros(num_rows, dtype=np.int32)
    own[slot_row] = np.arange(slot_row.size)
    index = np.repeat(own[:, None], width, axis=1)
    weights = np.zeros((num_rows, width), dtype=np.float32)
    index[slot_row[order], column] = order
    weights[slot_row[order], column] = weights_S.cpu().numpy()[order]
    device = answer_SH.device
    return kernels.combine(answer_SH, torch.from_numpy(index).to(device), torch.from_numpy(weights).to(device), None)


def compact_index(dispatch: Dispatch) -> tuple[Tensor, Tensor]:
    """Row of each (token, destination) in the answers concatenated by ascending rank, int32 [T, D], and its weight:
    1 where the token went there, 0 (and a row of its own, for another's may not be finite) where it did not."""
    destinations = dispatch.destinations
    index = np.full((dispatch.num_tokens, len(destinations)), -1, dtype=np.int32)
    weights = np.zeros((dispatch.num_tokens, len(destinations)), dtype=np.float32)
    start = 0
    for column, rank in enumerate(destinations):
        tokens = dispatch.part(rank).token_index.numpy()
        index[tokens, column] = np.arange(start, start + tokens.size)
        weights[tokens, column] = 1.0
        start += tokens.size
    index = np.where(index < 0, index.max(axis=1, initial=0)[:, None], index)
    return torch.from_numpy(index), torch.from_numpy(weights)
