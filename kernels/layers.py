"""Embedding and layers in one call, for a rank that has all of each: no peer's rows, no peer's experts.

Legend: T rows, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels import reference
from kernels.experts import PackedExperts
from kernels.layout import AttentionBatch
from kernels.linear import EMBEDDINGS
from kernels.mla import MlaWeights
from kernels.panels import KINDS
from kernels.routing import Gate
from kernels.runtime import native, require


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedExperts:
    """The routed part of a MoE layer: `place_of` int32 [E] (on the CPU) is the place of each expert in `bank`, and
    `counts` int64 [E] (on the CPU) gets 1 for each choice of an expert."""

    gate: Gate
    bank: PackedExperts
    place_of: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One layer: norm, attention over `cache`, norm, feed-forward; each of the two is added to the hidden states.

    `ffn` is the dense network where there are no `routed` experts; else the shared expert, or None. The `output` of
    the attention must be one matrix.
    """

    input_norm: torch.Tensor
    attention: MlaWeights
    output_bias: torch.Tensor | None
    cache: torch.Tensor
    ffn_norm: torch.Tensor
    ffn: PackedExperts | None
    routed: RoutedExperts | None

    def check(self, hidden: int, num_blocks: int) -> None:
        """Raise ValueError unless everything has the sizes of the stack."""
        require(self.input_norm, "input_norm", (hidden,))
        require(self.ffn_norm, "ffn_norm", (hidden,))
        require(self.cache, "cache", (num_blocks, 32, self.attention.latent_down.num_out))
        if self.output_bias is not None:
            require(self.output_bias, "output_bias", (hidden,))
        if len(self.attention.output) != 1:
            raise ValueError(f"the attention has {len(self.attention.output)} output matrices; a stack needs it whole")
        if self.ffn is None and self.routed is None:
            raise ValueError("a layer has neither a feed-forward network nor routed experts")
        if self.ffn is not None and self.ffn.num_experts != 1:
            raise ValueError(f"a plain feed-forward network is a bank of 1 expert, this one has {self.ffn.num_experts}")
        if self.routed is not None:
            num_experts = self.routed.gate.weight.num_out
            require(self.routed.place_of, "place_of", (num_experts,), torch.int32)
            require(self.routed.counts, "counts", (num_experts,), torch.int64)

    def words(self) -> list[int]:
        """struct Layer of csrc/kernels.h."""
        return [
            self.input_norm.data_ptr(),
            self.attention.address,
            0 if self.output_bias is None else self.output_bias.data_ptr(),
            self.cache.data_ptr(),
            self.ffn_norm.data_ptr(),
            0 if self.ffn is None else self.ffn.address,
            *([0] * 13 if self.routed is None else _routed_words(self.routed)),
        ]


def _routed_words(routed: RoutedExperts) -> list[int]:
    gate = routed.gate
    *rule, scale = gate.rule
    bias = gate.bias_E if gate.method == "noaux_tc" else None
    return [
        routed.bank.address,
        routed.place_of.data_ptr(),
        routed.counts.data_ptr(),
        gate.weight.address,
        0 if bias is None else bias.data_ptr(),
        *map(int, rule),
        _bits(scale),
    ]


class LayerStack:
    """The embedding and all layers, checked once, here. It keeps what it was given and owns nothing of it."""

    def __init__(self, layers: Sequence[Layer], *, embedding: torch.Tensor, eps: float) -> None:
        first = layers[0].attention
        self.layers, self.embedding, self.eps = tuple(layers), embedding, eps
        self.hidden = first.hidden
        require(embedding, "embedding", (None, self.hidden), embedding.dtype)
        num_blocks = layers[0].cache.shape[0]
        for layer in layers:
            layer.check(self.hidden, num_blocks)
        self.is_native = first.is_native and embedding.dtype in EMBEDDINGS
        if self.is_native:
            self._layers = torch.tensor([layer.words() for layer in layers], dtype=torch.int64)
            words = [self._layers.data_ptr(), len(layers), self.hidden, num_blocks, _bits(eps)]
            words += [embedding.data_ptr(), KINDS[embedding.dtype], embedding.shape[0]]
            self._struct = torch.tensor(words, dtype=torch.int64)  # struct Stack of csrc/kernels.h
            self.address = self._struct.data_ptr()

    def reserve(self, num_rows: int) -> None:
        """Take the scratch memory that so many rows need now, rather than in the first step that has them.

        Raises MemoryError where there is too little.
        """
        if self.is_native:
            native.reserve_layers(self.address, num_rows)


def run_layers(
    ids: array[int], stack: LayerStack, batch: AttentionBatch, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Embed the int32 ids ("i") of a batch's rows and lead them through all layers; the same bits as the single
    operations, [T, H]. `out` receives the result if given. Raises ValueError on an index out of range (native only).
    """
    ids_at, num_rows = ids.buffer_info()
    if num_rows != batch.num_rows:
        raise ValueError(f"{num_rows} ids are given for a batch of {batch.num_rows} rows")
    stack.layers[0].attention.check_inputs(batch)
    if not stack.is_native:
        x_TH = reference.run_layers(ids, stack, batch)
        return x_TH if out is None else out.copy_(x_TH)
    if out is None:
        out = torch.empty((num_rows, stack.hidden))
    else:
        require(out, "out", (num_rows, stack.hidden))
    native.layers(stack.address, batch.address, ids_at, out.data_ptr())
    return out


def _bits(value: float) -> int:
    """A double as the integer that has its bits."""
    return int(struct.unpack("q", struct.pack("d", value))[0])
