"""One forward pass: the model's layers strung together out of attention, gate and experts.

A generator: it gives up control wherever a frame of a peer is needed. The residual stream is float32 and only ever
holds the rows this member owns.

Shape legend: T rows of the micro-batch, O the rows this member owns, H hidden.
"""

from collections.abc import Callable

from torch import Tensor

import kernels
from attention.service import AttentionService
from experts import ExpertClient, WorkId
from gating import ExpertLoad
from moemesh.batch import MicroBatch
from moemesh.model import AttentionLayer, AttentionModel
from transport.tasks import Steps


class ForwardPass:
    """Runs micro-batches through the layers that this rank shares in."""

    def __init__(
        self, model: AttentionModel, attention: AttentionService, experts: ExpertClient, load: ExpertLoad
    ) -> None:
        self._model = model
        self._attention = attention
        self._experts = experts
        self._load = load

    def run(self, batch: MicroBatch, *, generation: int, step: int) -> Steps[Tensor]:
        """Hidden states [O, H] of the owned rows after the last layer."""
        work = WorkId(generation=generation, step=step, micro_batch=batch.index)
        eps = self._model.config.rms_norm_eps
        start, stop = self._attention.owned_rows(batch.attention.num_rows)
        x_OH = self._model.embed(batch.token_ids[start:stop])
        added: Tensor | None = None  # to x_OH, by the next norm
        for index, layer in enumerate(self._model.layers):
            normed = _add_and_norm(x_OH, added, layer.input_norm, eps)
            added = yield from self._attention.attend(
                index, normed, batch.attention, generation=generation, step=step, micro_batch=batch.index
            )
            if stop > start:
                normed = kernels.add_rms_norm_(x_OH, added, layer.ffn_norm, eps)
                added = yield from self._feed_forward(work, index, layer, normed)
        return x_OH if added is None else x_OH + added

    def _feed_forward(self, work: WorkId, index: int, layer: AttentionLayer, x_OH: Tensor) -> Steps[Tensor]:
        if layer.router is None:
            assert layer.local_ffn is not None, f"dense layer {index} has no FFN"
            return kernels.ffn(x_OH, layer.local_ffn)
        routed = layer.router.route(x_OH, self._load.counts(index))
        return (yield from self._experts.call(work, index, x_OH, routed, _shared(layer, x_OH)))


def _add_and_norm(x_OH: Tensor, added: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
    if added is None:
        return kernels.rms_norm(x_OH, weight_H, eps)
    return kernels.add_rms_norm_(x_OH, added, weight_H, eps)


def _shared(layer: AttentionLayer, x_OH: Tensor) -> Callable[[], Tensor | None]:
    ffn = layer.local_ffn
    return lambda: None if ffn is None else kernels.ffn(x_OH, ffn)
