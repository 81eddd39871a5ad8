"""A stack of layers in one call: the same bits as its single operations, and what torch computes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.test_mla import FIELDS, HEADS, HIDDEN, LATENT, ROPE, VALUE, batch, layer
from tests.kernels.weights import experts, needs_native, normal, packed, relative_error

NUM_EXPERTS, NUM_ROWS, EPS = 6, 70, 1e-6


def attention(dtype: torch.dtype, *, compressed: bool, biased: bool) -> kernels.MlaWeights:
    parts = layer(dtype, compressed=compressed, biased=biased)
    fields = {name: getattr(parts, name) for name in FIELDS}
    return kernels.MlaWeights(**fields | {"output": (packed(HIDDEN, HEADS * VALUE, dtype, num_shards=4),)})


def routed(dtype: torch.dtype) -> kernels.RoutedExperts:
    gate = kernels.Gate(
        weight=packed(NUM_EXPERTS, HIDDEN, torch.float32),
        bias_E=normal(NUM_EXPERTS, seed=9) * 0.1,
        num_groups=2,
        topk_groups=1,
        top_k=2,
        scoring="sigmoid",
        method="noaux_tc",
        normalize=True,
        scale=2.5,
    )
    return kernels.RoutedExperts(
        gate=gate,
        bank=experts(NUM_EXPERTS, HIDDEN, 40, dtype),
        place_of=torch.tensor([3, 0, 4, 2, 1, 5], dtype=torch.int32),
        counts=torch.zeros(NUM_EXPERTS, dtype=torch.int64),
    )


def whole_layer(dtype: torch.dtype = torch.bfloat16, *, dense: bool, **changed: Any) -> kernels.Layer:
    """Dense ones compress their queries and have biases; of the others some have no shared expert."""
    fields: dict[str, Any] = {
        "input_norm": normal(HIDDEN, seed=11),
        "attention": attention(dtype, compressed=dense, biased=dense),
        "output_bias": normal(HIDDEN, seed=12) if dense else None,
        "cache": normal(10, 32, LATENT + ROPE, seed=8),
        "ffn_norm": normal(HIDDEN, seed=13),
        "ffn": experts(1, HIDDEN, 50, dtype),
        "routed": None if dense else routed(dtype),
    }
    return kernels.Layer(**fields | changed)


def composed(x: torch.Tensor, layers: Sequence[kernels.Layer], rows: kernels.AttentionBatch) -> torch.Tensor:
    for one in layers:
        y = kernels.mla(kernels.rms_norm(x, one.input_norm, EPS), one.attention, rows, one.cache.clone())
        x = x + (y if one.output_bias is None else y + one.output_bias)
        normed = kernels.rms_norm(x, one.ffn_norm, EPS)
        base = None if one.ffn is None else kernels.ffn(normed, one.ffn)
        if one.routed is not None:
            ids, weights = one.routed.gate.choose(normed)
            slots = torch.arange(ids.numel(), dtype=torch.int32).view(ids.shape)
            y = kernels.grouped_ffn(
                normed, one.routed.bank, (slots // 2).flatten(), ids.flatten(), place_of=one.routed.place_of
            )
            base = kernels.combine(y, slots, weights, base)
        assert base is not None
        x = x + base
    return x


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_stack_is_its_operations_to_the_bit(dtype: torch.dtype, threads: int) -> None:
    kernels.set_num_threads(threads)
    without_shared = whole_layer(dtype, dense=False, ffn=None)
    layers = [whole_layer(dtype, dense=True), without_shared, whole_layer(dtype, dense=False)]
    x, rows = normal(NUM_ROWS, HIDDEN), batch(NUM_ROWS)
    want = composed(x, layers, rows)
    got = kernels.run_layers_(x.clone(), kernels.LayerStack(layers, eps=EPS), rows)
    if kernels.native_available():
        assert torch.equal(got, want)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert without_shared.routed is not None
    assert int(without_shared.routed.counts.sum()) == 2 * NUM_ROWS


def test_a_stack_agrees_with_torch() -> None:
    stack = kernels.LayerStack([whole_layer(dense=True), whole_layer(dense=False)], eps=EPS)
    x, rows = normal(NUM_ROWS, HIDDEN), batch(NUM_ROWS)
    got = kernels.run_layers_(x.clone(), stack, rows)
    assert relative_error(got, reference.run_layers_(x, stack, rows)) < 1e-5


def test_layers_that_do_not_fit_are_refused() -> None:
    def refused(**changed: Any) -> Any:
        layers = [whole_layer(dense=True), whole_layer(dense=True, **changed)]
        return lambda: kernels.LayerStack(layers, eps=EPS)

    for reason, build in (
        (r"input_norm has shape \(95,\)", refused(input_norm=normal(HIDDEN - 1))),
        (r"cache has shape \(9, ", refused(cache=normal(9, 32, LATENT + ROPE))),
        ("3 output matrices", refused(attention=layer())),
        ("neither", refused(ffn=None)),
        ("this one has 2", refused(ffn=experts(2, HIDDEN, 40, torch.float32))),
    ):
        with pytest.raises(ValueError, match=reason):
            build()
    stack = kernels.LayerStack([whole_layer(dense=True)], eps=EPS)
    with pytest.raises(ValueError, match=r"x has shape \(69, "):
        kernels.run_layers_(normal(NUM_ROWS - 1, HIDDEN), stack, batch(NUM_ROWS))


def test_the_head_is_its_operations_to_the_bit() -> None:
    head, weight, x = packed(61, HIDDEN, torch.bfloat16), normal(HIDDEN, seed=1), normal(9, HIDDEN)
    rows = [8, 0, 3, 3]
    want = kernels.linear(kernels.rms_norm(x[rows], weight, EPS), head)
    got = kernels.normed_linear(x, rows, weight, head, eps=EPS)
    assert torch.equal(got, want) or not kernels.native_available()
    torch.testing.assert_close(got, want)
    assert kernels.normed_linear(x, [], weight, head, eps=EPS).shape == (0, 61)


@needs_native
def test_a_row_without_hidden_state_is_refused() -> None:
    with pytest.raises(ValueError, match="outside the rows"):
        kernels.normed_linear(normal(2, 8), [2], normal(8), packed(5, 8, torch.float32), eps=EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_embedding_is_its_twin_to_the_bit(dtype: torch.dtype) -> None:
    table, ids = normal(9, 61).to(dtype), array("i", [8, 0, 3, 3])
    assert torch.equal(kernels.embed(table, ids), reference.embed(table, ids))
    with pytest.raises((ValueError, IndexError), match=r"outside|out of range"):
        kernels.embed(table, array("i", [9]))
