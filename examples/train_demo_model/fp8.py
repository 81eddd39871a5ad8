"""DeepSeek-V3's checkpoint format: float8 weights with one float32 scale for each block of 128 x 128."""

import torch
from torch import Tensor

BLOCK = 128
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def blocks_of(matrix: Tensor) -> Tensor:
    """[rows, columns] to [row blocks, BLOCK, column blocks, BLOCK], padded with zeros."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The float8 matrix, and the scales that its blocks are to be multiplied by."""
    blocks = blocks_of(matrix.float())
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / FP8_MAX
    scaled = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)
    rows, columns = matrix.shape
    return scaled[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scales


def dequantise(matrix: Tensor, scales: Tensor) -> Tensor:
    """The float32 matrix that a float8 one and its scales stand for."""
    blocks = blocks_of(matrix.float()) * scales[:, None, :, None]
    rows, columns = matrix.shape
    return blocks.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
