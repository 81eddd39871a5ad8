"""Rotary position embedding: the table of angles.

Shape legend: P positions, R rotary width.
"""

import torch

import kernels
from mesh_config.model_config import ModelConfig
from mesh_config.rope import rope_frequencies


class RotaryTable:
    """Cosines and sines of every position up to `max_positions`, computed once in float32 as the oracle does.

    A table, not a function of the batch: a position's angles are the same bits wherever and whenever it is computed.
    """

    def __init__(self, config: ModelConfig, max_positions: int, device: torch.device) -> None:
        frequencies, scaling = rope_frequencies(config.rope, config.qk_rope_head_dim)
        inverse_R = torch.tensor(frequencies, dtype=torch.float32)
        angles_PR = torch.arange(max_positions, dtype=torch.float32)[:, None] * inverse_R[None, :]
        cos_PR, sin_PR = angles_PR.cos() * scaling, angles_PR.sin() * scaling
        self.angles = kernels.Angles(cos_PR.to(device), sin_PR.to(device))
