"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C).

All tokens take the absorbed form, so that what a position's hidden state is does not depend on whether its token was
prompt or generated; where the mesh says so, those of the prompt take the expanded form instead, whenever and wherever
they are computed.

Shape legend: T tokens, O tokens that this rank owns, H hidden, D = query width + latent rank + rope width.
"""

from torch import Tensor

import kernels
from attention.latent_cache import LatentCache


class MultiHeadLatentAttention:
    """One layer of attention over a rank's heads. Pure arithmetic; the exchange between peers is the service's.

    The weights' `output` holds one matrix for each maximal subtree of logical shards that the rank owns.
    """

    def __init__(self, weights: kernels.MlaWeights, output_bias: Tensor | None) -> None:
        self.weights = weights
        self.output_bias = output_bias

    def project(self, x_OH: Tensor, batch: kernels.AttentionBatch, first_row: int) -> Tensor:
        """What peers need to know of each token, [O, D]; x_OH are O rows of the batch, from `first_row` on."""
        return kernels.mla_project(x_OH, self.weights, batch, first_row)

    def attend(
        self, rows_TD: Tensor, batch: kernels.AttentionBatch, cache: LatentCache, layer: int
    ) -> tuple[Tensor, ...]:
        """Write the tokens' latents, attend with the local heads; one partial output [T, H] per owned subtree."""
        return kernels.mla_attend(rows_TD, self.weights, batch, cache.layer(layer))

    def whole(self, x_TH: Tensor, batch: kernels.AttentionBatch, cache: LatentCache, layer: int) -> Tensor:
        """Both at once, [T, H], on a rank that owns all shards."""
        return self.finish(kernels.mla(x_TH, self.weights, batch, cache.layer(layer)))

    def finish(self, y_TH: Tensor) -> Tensor:
        """Add the output projection's bias, once, after the sum over all shards."""
        return y_TH if self.output_bias is None else y_TH + self.output_bias
