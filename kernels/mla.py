"""One layer of multi-head latent attention, in two calls: before and after peers exchange rows.

Absorbed: the up-projection of the keys is multiplied into the query and that of the values into the output, so that
attention runs over the cached latents themselves (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C).
Expanded: the cached latents are turned into keys and values of each head, which costs once per position of the context
and saves with every further row that attends to it. Which of the two a row takes is said by its batch.

Legend: T rows, O rows that this rank owns, H hidden, N local heads, C latent width, R rotary width, Q query width,
D = Q + C + R.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import torch

from kernels import reference
from kernels.heads import PackedHeads
from kernels.layout import AttentionBatch
from kernels.linear import PackedLinear
from kernels.runtime import native, require


@dataclass(frozen=True, kw_only=True, eq=False)
class MlaWeights:
    """One layer's attention weights on one tensor-parallel rank; checked once, here. Raises ValueError.

    Down-projections and norms are whole on every rank; `query_up`, `key_up`, `value_up` hold the rank's heads;
    `output` holds one matrix for each part of the values' columns whose product is wanted apart. Without `query_down`
    the query is the hidden state itself (Q = H). `key_up` leads from a query to the latents and `key_expand` from a
    latent to the keys: the same numbers, the second transposed, and only needed for rows of the expanded form.
    """

    query_down: PackedLinear | None
    query_down_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    query_up: PackedLinear
    latent_down: PackedLinear
    latent_down_bias: torch.Tensor | None
    latent_norm: torch.Tensor
    key_up: PackedHeads
    value_up: PackedHeads
    output: tuple[PackedLinear, ...]
    eps: float
    interleave: bool
    scale: float
    key_expand: PackedHeads | None = None
    hidden: int = field(init=False)
    num_heads: int = field(init=False)
    query_width: int = field(init=False)
    latent_width: int = field(init=False)
    rope_width: int = field(init=False)
    half_rope: int = field(init=False)
    row_width: int = field(init=False)  # D
    is_native: bool = field(init=False)
    address: int = field(init=False)
    _structs: tuple[torch.Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        latent_width = int(self.latent_norm.shape[0])
        rope_width = self.latent_down.num_out - latent_width
        self._set(
            hidden=self.latent_down.num_in,
            num_heads=self.key_up.num_heads,
            query_width=self.query_up.num_in,
            latent_width=latent_width,
            rope_width=rope_width,
            half_rope=rope_width // 2,
            row_width=self.query_up.num_in + self.latent_down.num_out,
            is_native=self.latent_down.matrix is not None,
        )
        self._check()
        outputs = torch.tensor([matrix.address for matrix in self.output], dtype=torch.int64)
        expand = self.key_expand
        words = [
            0 if self.query_down is None else self.query_down.address,
            *_addresses(self.query_down_bias, self.query_norm),
            self.latent_down.address,
            *_addresses(self.latent_down_bias, self.latent_norm),
            *(self.query_up.address, self.key_up.address, self.value_up.address),
            0 if expand is None else expand.address,
            *(self.num_heads, self.latent_width, int(self.interleave)),
            *struct.unpack("qq", struct.pack("dd", self.eps, self.scale)),
            *(outputs.data_ptr(), len(self.output)),
        ]
        layer = torch.tensor(words, dtype=torch.int64)  # struct Mla of csrc/kernels.h; it points at outputs
        self._set(_structs=(layer, outputs), address=layer.data_ptr())

    def _set(self, **derived: object) -> None:
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        down, heads = self.query_down, self.num_heads
        wanted = {
            "query_up.num_out": (self.query_up.num_out, heads * (self.key_up.num_in + self.rope_width)),
            "query_up.num_in": (self.query_up.num_in, self.hidden if down is None else down.num_out),
            "query_down.num_in": (self.hidden if down is None else down.num_in, self.hidden),
            "key_up.num_out": (self.key_up.num_out, self.latent_width),
            "value_up.num_heads": (self.value_up.num_heads, heads),
            "value_up.num_in": (self.value_up.num_in, self.latent_width),
            "inputs of output": (sum(part.num_in for part in self.output), heads * self.value_up.num_out),
            "outputs of output": ({part.num_out for part in self.output}, {self.hidden}),
        }
        if self.key_expand is not None:
            expand = self.key_expand
            shape = (expand.num_heads, expand.num_out, expand.num_in)
            wanted["key_expand"] = (shape, (heads, self.key_up.num_in, self.latent_width))
        for name, (have, want) in wanted.items():
            if have != want:
                raise ValueError(f"{name} is {have}, must be {want} to fit the layer's other weights")
        require(self.latent_norm, "latent_norm", (self.latent_width,))
        for name, vector, width in (
            ("query_norm", self.query_norm, self.query_width),
            ("query_down_bias", self.query_down_bias, self.query_width),
            ("latent_down_bias", self.latent_down_bias, self.latent_down.num_out),
        ):
            if vector is not None:
                require(vector, name, (width,))
            elif down is not None and name == "query_norm":
                raise ValueError("query_down comes without query_norm")

    def check_inputs(self, batch: AttentionBatch, cache: torch.Tensor | None = None) -> None:
        """Raise ValueError unless angles and cache have the widths of this layer, and it has what the batch needs."""
        if batch.half_rope != self.half_rope:
            raise ValueError(f"angles are [rows, {batch.half_rope}], must be [rows, {self.half_rope}]")
        if batch.expands and self.key_expand is None:
            raise ValueError("the batch has rows of the expanded form, but the layer has no key_expand")
        if cache is not None:
            require(cache, "cache", (cache.shape[0], 32, self.latent_down.num_out))


def mla_project(x_OH: torch.Tensor, weights: MlaWeights, batch: AttentionBatch, first_row: int) -> torch.Tensor:
    """What peers need to know of each token, [O, D]: compressed query, normalised latent, rotated shared key.

    x_OH are O rows of the batch, from `first_row` on.
    """
    require(x_OH, "x", (None, weights.hidden))
    if not weights.is_native:
        return reference.mla_project(x_OH, weights, batch, first_row)
    num_rows = x_OH.shape[0]
    weights.check_inputs(batch)
    rows_OD = torch.empty((num_rows, weights.row_width))
    native.mla_project(weights.address, batch.address, first_row, num_rows, x_OH.data_ptr(), rows_OD.data_ptr())
    return rows_OD


def mla_attend(
    rows_TD: torch.Tensor, weights: MlaWeights, batch: AttentionBatch, cache: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Write the rows' latents and keys to the cache, attend with the local heads; [T, H] for each matrix of `output`.

    cache [num_blocks, 32, C+R]. For what a row attends to see mla_attention and expanded_attention. Raises ValueError
    on an index out of range (native only).
    """
    require(rows_TD, "rows", (batch.num_rows, weights.row_width))
    if not weights.is_native:
        return reference.mla_attend(rows_TD, weights, batch, cache)
    weights.check_inputs(batch, cache)
    parts = torch.empty((len(weights.output), batch.num_rows, weights.hidden))
    native.mla_attend(
        weights.address, batch.address, rows_TD.data_ptr(), cache.data_ptr(), cache.shape[0], parts.data_ptr()
    )
    return parts.unbind()


def mla(x_TH: torch.Tensor, weights: MlaWeights, batch: AttentionBatch, cache: torch.Tensor) -> torch.Tensor:
    """mla_attend of mla_project of all rows, the same bits: [T, H], where `output` is one matrix."""
    require(x_TH, "x", (batch.num_rows, weights.hidden))
    if not weights.is_native or len(weights.output) != 1:
        (y_TH,) = mla_attend(mla_project(x_TH, weights, batch, 0), weights, batch, cache)
        return y_TH
    weights.check_inputs(batch, cache)
    y_TH = torch.empty((batch.num_rows, weights.hidden))
    native.mla(weights.address, batch.address, x_TH.data_ptr(), cache.data_ptr(), cache.shape[0], y_TH.data_ptr())
    return y_TH


def _addresses(*tensors: torch.Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
