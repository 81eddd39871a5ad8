"""The arithmetic that all parts share, batch-invariant on the CPU: a row's bits depend on that row alone."""

from kernels.attention import KEY_BLOCK, expanded_attention, mla_attention
from kernels.draw import BEST, NO_TOKEN, NOT_FINITE, Draw, TokenScore
from kernels.experts import PackedExperts, ffn, grouped_ffn
from kernels.files import checksum, read_into
from kernels.heads import PackedHeads, head_linear, pack_heads
from kernels.layers import Layer, LayerStack, RoutedExperts, run_layers
from kernels.layout import Angles, AttentionBatch, BatchRows, Span, lay_out
from kernels.linear import PackedLinear, embed, linear, normed_linear, pack_linear
from kernels.mla import MlaWeights, mla, mla_attend, mla_project
from kernels.panels import BlockScale, FileWeight, UnreadableWeight, dequantize
from kernels.quantization import INT8_BLOCK, quantize
from kernels.room import Room
from kernels.routing import Gate, route
from kernels.rows import add_rms_norm_, combine, rms_norm, rope_, tree_add
from kernels.runtime import (
    Arithmetic,
    aside,
    force_isa,
    isa,
    native_available,
    native_reason,
    native_seconds,
    num_threads,
    set_num_threads,
)
from kernels.sampling import RowSampler, sample, score
from kernels.slots import SlotPlan, plan_slots

__all__ = [
    "BEST",
    "INT8_BLOCK",
    "KEY_BLOCK",
    "NOT_FINITE",
    "NO_TOKEN",
    "Angles",
    "Arithmetic",
    "AttentionBatch",
    "BatchRows",
    "BlockScale",
    "Draw",
    "FileWeight",
    "Gate",
    "Layer",
    "LayerStack",
    "MlaWeights",
    "PackedExperts",
    "PackedHeads",
    "PackedLinear",
    "Room",
    "RoutedExperts",
    "RowSampler",
    "SlotPlan",
    "Span",
    "TokenScore",
    "UnreadableWeight",
    "add_rms_norm_",
    "aside",
    "checksum",
    "combine",
    "dequantize",
    "embed",
    "expanded_attention",
    "ffn",
    "force_isa",
    "grouped_ffn",
    "head_linear",
    "isa",
    "lay_out",
    "linear",
    "mla",
    "mla_attend",
    "mla_attention",
    "mla_project",
    "native_available",
    "native_reason",
    "native_seconds",
    "normed_linear",
    "num_threads",
    "pack_heads",
    "pack_linear",
    "plan_slots",
    "quantize",
    "read_into",
    "rms_norm",
    "rope_",
    "route",
    "run_layers",
    "sample",
    "score",
    "set_num_threads",
    "tree_add",
]
