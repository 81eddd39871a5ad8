"""The gate: scores, groups, top-k.

Shape legend: T tokens, H hidden, E experts, K experts per token.
"""

from torch import Tensor

import kernels
from mesh_config.model_config import ModelConfig


class Router:
    """One layer's gate. Scores are float32 whatever the checkpoint's format, as in DeepSeek's own code."""

    def __init__(self, config: ModelConfig, weight: kernels.PackedLinear, correction_bias_E: Tensor | None) -> None:
        self.gate = kernels.Gate(
            weight=weight,
            bias_E=correction_bias_E,
            num_groups=config.num_expert_groups,
            topk_groups=config.topk_groups,
            top_k=config.experts_per_token,
            scoring=config.scoring,
            method=config.topk_method,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )

    def route(self, x_TH: Tensor, counts_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chosen experts int32 [T, K], best first, and their weights float32 [T, K]; `counts_E` counts the choices.

        The correction bias takes part in the choice, not in the weights (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        """
        return self.gate.choose(x_TH, counts_E)
