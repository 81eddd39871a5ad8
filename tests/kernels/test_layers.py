"""A stack of layers in one call: the same bits as its single operations, and what torch computes."""

from __future__ import annotations

import resource
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.test_mla import FIELDS, HEADS, HIDDEN, LATENT, ROPE, VALUE, batch, layer
from tests.kernels.weights import experts, needs_native, normal, packed, relative_error

NUM_EXPERTS, NUM_ROWS, NUM_IDS, EPS = 6, 70, 19, 1e-6


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


def ids(num_rows: int = NUM_ROWS) -> array[int]:
    return array("i", [i * 7 % NUM_IDS for i in range(num_rows)])


def stack_of(layers: Sequence[kernels.Layer], **changed: Any) -> kernels.LayerStack:
    return kernels.LayerStack(layers, **{"embedding": normal(NUM_IDS, HIDDEN).bfloat16(), "eps": EPS} | changed)


def composed(x: torch.Tensor, layers: Sequence[kernels.Layer], rows: kernels.AttentionBatch) -> torch.Tensor:
    for one in layers:
        y = kernels.mla(kernels.rms_norm(x, one.input_norm, EPS), one.attention, rows, one.cache.clone())
        x = x + (y if one.output_bias is None else y + one.output_bias)
        normed = kernels.rms_norm(x, one.ffn_norm, EPS)
        base = None if one.ffn is None else kernels.ffn(normed, one.ffn)
        if one.routed is not None:
            experts_TK, weights = one.routed.gate.choose(normed)
            slots = torch.arange(experts_TK.numel(), dtype=torch.int32).view(experts_TK.shape)
            y = kernels.grouped_ffn(
                normed, one.routed.bank, (slots // 2).flatten(), experts_TK.flatten(), place_of=one.routed.place_of
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
    stack, rows = stack_of(layers), batch(NUM_ROWS)
    want = composed(kernels.embed(stack.embedding, ids()), layers, rows)
    out = torch.full((NUM_ROWS, HIDDEN), torch.nan)
    got = kernels.run_layers(ids(), stack, rows, out=out)
    assert got is out
    if kernels.native_available():
        assert torch.equal(got, want)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert without_shared.routed is not None
    assert int(without_shared.routed.counts.sum()) == 2 * NUM_ROWS


def test_a_stack_agrees_with_torch() -> None:
    stack, rows = stack_of([whole_layer(dense=True), whole_layer(dense=False)]), batch(NUM_ROWS)
    got = kernels.run_layers(ids(), stack, rows)
    assert relative_error(got, reference.run_layers(ids(), stack, rows)) < 1e-5


def test_layers_that_do_not_fit_are_refused() -> None:
    def refused(**changed: Any) -> Any:
        layers = [whole_layer(dense=True), whole_layer(dense=True, **changed)]
        return lambda: stack_of(layers)

    for reason, build in (
        (r"input_norm has shape \(95,\)", refused(input_norm=normal(HIDDEN - 1))),
        (r"cache has shape \(9, ", refused(cache=normal(9, 32, LATENT + ROPE))),
        ("3 output matrices", refused(attention=layer())),
        ("neither", refused(ffn=None)),
        ("this one has 2", refused(ffn=experts(2, HIDDEN, 40, torch.float32))),
    ):
        with pytest.raises(ValueError, match=reason):
            build()
    with pytest.raises(ValueError, match=r"embedding has shape \(19, 95\)"):
        stack_of([whole_layer(dense=True)], embedding=normal(NUM_IDS, HIDDEN - 1))
    with pytest.raises(ValueError, match="69 ids are given for a batch of 70 rows"):
        kernels.run_layers(ids(NUM_ROWS - 1), stack_of([whole_layer(dense=True)]), batch(NUM_ROWS))


def test_the_head_is_its_operations_to_the_bit() -> None:
    head, weight, x = packed(61, HIDDEN, torch.bfloat16), normal(HIDDEN, seed=1), normal(9, HIDDEN)
    rows = [8, 0, 3, 3]
    want = kernels.linear(kernels.rms_norm(x[rows], weight, EPS), head)
    got = kernels.normed_linear(x, rows, weight, head, eps=EPS)
    assert torch.equal(got, want) or not kernels.native_available()
    torch.testing.assert_close(got, want)
    assert kernels.normed_linear(x, [], weight, head, eps=EPS).shape == (0, 61)


@pytest.mark.parametrize("num_drawn", [0, 1, 4])
def test_head_and_sampling_in_one_call_are_both_to_the_bit(num_drawn: int) -> None:
    head, weight, x = packed(61, HIDDEN, torch.bfloat16), normal(HIDDEN, seed=1), normal(9, HIDDEN)
    rows, out = [8, 0, 3, 5], normal(4, 61)
    draws = [
        kernels.BEST,
        kernels.Draw(temperature=1.0, random=0.4),
        kernels.Draw(temperature=2.0, random=0.9, top_k=5),
    ]
    drawn = [*draws, kernels.BEST][:num_drawn]
    want = kernels.normed_linear(x, rows, weight, head, eps=EPS)
    tokens = kernels.RowSampler(rows, weight, head, drawn, num_rows=9, eps=EPS, out=out).run(x)
    assert torch.equal(out, want)
    assert tokens == kernels.sample(want[:num_drawn], drawn)


@needs_native
def test_a_row_without_hidden_state_is_refused() -> None:
    head, x = packed(5, 8, torch.float32), normal(2, 8)
    with pytest.raises(ValueError, match="outside the rows"):
        kernels.normed_linear(x, [2], normal(8), head, eps=EPS)
    with pytest.raises(ValueError, match="outside the rows"):
        kernels.RowSampler([2], normal(8), head, [kernels.BEST], num_rows=2, eps=EPS, out=normal(1, 5)).run(x)
    with pytest.raises(ValueError, match="2 tokens are to be drawn from 1 rows"):
        kernels.RowSampler([1], normal(8), head, [kernels.BEST] * 2, num_rows=2, eps=EPS, out=normal(1, 5))


def test_room_keeps_its_memory() -> None:
    room = kernels.Room(8, torch.device("cpu"))
    large = room.rows(5)
    assert large.shape == (5, 8)
    assert room.rows(2).data_ptr() == large.data_ptr() == room.rows(5).data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_embedding_is_its_twin_to_the_bit(dtype: torch.dtype) -> None:
    table, some = normal(9, 61).to(dtype), array("i", [8, 0, 3, 3])
    assert torch.equal(kernels.embed(table, some), reference.embed(table, some))
    with pytest.raises((ValueError, IndexError), match=r"outside|out of range"):
        kernels.embed(table, array("i", [9]))


@needs_native
def test_reserved_memory_is_there_at_once_and_taken_once() -> None:
    stack = stack_of([whole_layer(dense=True), whole_layer(dense=False)])

    def pages_taken() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF)
        stack.reserve(20_000)
        after = resource.getrusage(resource.RUSAGE_SELF)
        return after.ru_maxrss - before.ru_maxrss + after.ru_minflt - before.ru_minflt

    expected = kernels.run_layers(ids(), stack, batch(NUM_ROWS))
    first = pages_taken()
    assert pages_taken() < first
    assert torch.equal(kernels.run_layers(ids(), stack, batch(NUM_ROWS)), expected)
