"""The paged latent cache of multi-head latent attention.

One row of C + R values per token and layer: the normalised key-value latent, then the rotated key, which all heads
share (DeepSeek-V2, arXiv 2405.04434, section 2.1). Every tensor-parallel peer of a group holds the same cache.
"""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_SIZE = 32
"""Positions in one block."""


class LatentCache:
    """Storage for `num_blocks` blocks on every layer: float32 [layers, num_blocks, BLOCK_SIZE, width].

    The cache owns the memory; who may write which block is the block pool's business.
    """

    def __init__(self, *, num_layers: int, num_blocks: int, width: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.num_layers = num_layers
        shape = (num_layers, num_blocks, BLOCK_SIZE, width)
        blocks = _untouched_zeros(shape) if device.type == "cpu" else torch.zeros(shape, device=device)
        self._layers = blocks.unbind()

    def layer(self, layer: int) -> Tensor:
        """The blocks of one layer, [num_blocks, BLOCK_SIZE, width]."""
        return self._layers[layer]

    def read(self, layer: int, block_ids: Sequence[int]) -> Tensor:
        """A copy of some blocks of a layer, [len(block_ids), BLOCK_SIZE, width], on the CPU."""
        return self._layers[layer][torch.tensor(block_ids)].cpu()

    def write(self, layer: int, block_ids: Sequence[int], blocks: Tensor) -> None:
        """Put what another member has `read` to the same places."""
        self._layers[layer][torch.tensor(block_ids)] = blocks.to(self._layers[layer].device)


def _untouched_zeros(shape: tuple[int, ...]) -> Tensor:
    """float32 zeros that take memory, page by page, only as they are written: at start none, and no time."""
    memory = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float32, count=math.prod(shape)).view(shape)
