"""One forward pass: the model's layers strung together out of attention, gate and experts.

A generator: it gives up control wherever a frame of a peer is needed. The residual stream is float32 and only ever
holds the rows this member owns. The only rank of a mesh needs no frame, and computes all layers in one call.

Shape legend: T rows of the micro-batch, O the rows this member owns, H hidden.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

import kernels
from attention.latent_cache import LatentCache
from attention.service import AttentionService
from experts import ExpertClient, ExpertService, WorkId
from gating import ExpertLoad, Router
from moemesh.batch import MicroBatch
from moemesh.model import AttentionLayer, AttentionModel, RankModel
from transport.tasks import Steps


class Forward(Protocol):
    """What leads micro-batches through the layers."""

    def run(self, batch: MicroBatch, *, generation: int, step: int) -> Steps[Tensor]:
        """Hidden states [O, H] of the owned rows after the last layer."""
        ...


class WholeForward:
    """All layers at once: for the only rank of a mesh, which has nobody to wait for."""

    def __init__(self, stack: kernels.LayerStack, experts: ExpertService) -> None:
        self._stack = stack
        self._experts = experts
        self._room = kernels.Room(stack.hidden, stack.embedding.device)

    def reserve(self, num_rows: int) -> None:
        """Take the memory that batches of so many rows need before the first of them comes."""
        self._stack.reserve(num_rows)

    def run(self, batch: MicroBatch, *, generation: int, step: int) -> Steps[Tensor]:
        """Hidden states [T, H] of all rows after the last layer, there until the next run."""
        num_rows = batch.attention.num_rows
        self._experts.count_whole(num_rows)
        return kernels.run_layers(batch.token_ids, self._stack, batch.attention, out=self._room.rows(num_rows))
        yield


def stack_layers(model: RankModel, cache: LatentCache, load: ExpertLoad) -> kernels.LayerStack:
    """The layers of a rank that has all heads and all experts, as `WholeForward` takes them."""
    attention = model.attention
    assert attention is not None, "a rank without attention has no layers of its own"
    layers = [
        kernels.Layer(
            input_norm=layer.input_norm,
            attention=layer.attention.weights,
            output_bias=layer.attention.output_bias,
            cache=cache.layer(index),
            ffn_norm=layer.ffn_norm,
            ffn=layer.local_ffn,
            routed=None if layer.router is None else _routed(model, index, layer.router, load),
        )
        for index, layer in enumerate(attention.layers)
    ]
    return kernels.LayerStack(layers, embedding=attention.embedding_VH, eps=model.config.rms_norm_eps)


def _routed(model: RankModel, index: int, router: Router, load: ExpertLoad) -> kernels.RoutedExperts:
    bank = model.banks[index]
    return kernels.RoutedExperts(
        gate=router.gate, bank=bank.packed, place_of=bank.local_slot_E, counts=load.counts(index)
    )


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
