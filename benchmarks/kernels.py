"""How near the CPU kernels come to the machine: decoding against plain reads of memory, prefill in GFLOP/s.

    python -m benchmarks.kernels [--threads 2] [--isa avx2] [--parts layer --rows 8 32 --only experts shared]

Ratios taken in one run stand also on a busy machine; absolute numbers do not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import kernels
from kernels.runtime import native

PARTS = ["matrices", "layer", "attention", "overhead"]


def best_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of a few runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = (-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    return weight.clamp(-400, 400).to(torch.float8_e4m3fn), torch.ones(blocks)


def pack(num_out: int, num_in: int, dtype: torch.dtype) -> kernels.PackedLinear:
    weight = torch.randn(num_out, num_in)
    if dtype == torch.float8_e4m3fn:
        eighth, scale = quantize(weight)
        return kernels.pack_linear(eighth, scale_inv=scale)
    return kernels.pack_linear(weight.to(dtype))


def decode(dtype: torch.dtype, megabytes: int) -> None:
    """One row through a weight that no cache holds, in turns with a plain read of the same bytes."""
    num_in = 1024
    packed = pack((megabytes << 20) // (num_in * dtype.itemsize), num_in, dtype)
    data, total = packed.weight, torch.zeros(1, dtype=torch.int64)
    x, out = torch.randn(1, num_in), torch.empty(1, packed.num_out)
    rates: dict[str, float] = {}
    for _ in range(3):
        read = best_seconds(lambda: native.read_all(data.data_ptr(), data.nbytes, total.data_ptr()))
        compute = best_seconds(lambda: kernels.linear(x, packed, out=out))
        for name, seconds in (("read", read), ("linear", compute)):
            rates[name] = max(rates.get(name, 0.0), data.nbytes / seconds / 1e9)
    ratio = rates["linear"] / rates["read"]
    print(f"decode {dtype}: read {rates['read']:.1f} GB/s, 1 row {rates['linear']:.1f} GB/s, ratio {ratio:.2f}")


def prefill(dtype: torch.dtype, num_rows: int) -> None:
    packed = pack(2048, 1024, dtype)
    x = torch.randn(num_rows, packed.num_in)
    out = torch.empty(num_rows, packed.num_out)
    seconds = best_seconds(lambda: kernels.linear(x, packed, out=out))
    operations = 2 * num_rows * packed.num_in * packed.num_out
    dense = torch.randn(packed.num_in, packed.num_out)
    blas = operations / best_seconds(lambda: torch.mm(x, dense, out=out)) / 1e9
    print(f"linear {dtype} {num_rows} rows: {operations / seconds / 1e9:.0f} GFLOP/s (torch float32 {blas:.0f})")


@dataclass(frozen=True)
class Operation:
    """One step of a layer: `calls[i]` does it with the weights of layer i. Bytes and operations are those of a call."""

    name: str
    calls: Sequence[Callable[[], object]]
    num_bytes: int
    num_operations: int


class Layers:
    """Layers of the shape of bench-1b in bfloat16, enough of them that no cache holds the weights of the next one."""

    HIDDEN, WIDTH, EXPERTS, TOP_K, HEADS, COPIES = 1024, 256, 256, 8, 16, 24

    def __init__(self, num_banks: int = 2) -> None:
        self._banks = [self._bank(self.EXPERTS) for _ in range(num_banks)]

    def _bank(self, num_experts: int) -> kernels.PackedExperts:
        bank = kernels.PackedExperts.empty(num_experts, self.HIDDEN, self.WIDTH, dtype=torch.bfloat16)
        up = torch.randn(self.WIDTH, self.HIDDEN).bfloat16()
        for slot in range(num_experts):
            bank.load(slot, up, up, up.T.contiguous())
        return bank

    def operations(self, num_rows: int, context: int) -> list[Operation]:
        """In the order of a layer; without norms, rope, the gate's choice and the sum over a row's experts."""
        linears = {
            "project": (576 + 384, self.HIDDEN, 1),
            "query_up": (self.HEADS * 128, 384, 1),
            "output": (self.HIDDEN, self.HEADS * 64, 16),
            "gate": (self.EXPERTS, self.HIDDEN, 1),
            "head": (32000, self.HIDDEN, 1),
        }
        done = [self._linear(num_rows, name, *shape) for name, shape in linears.items()]
        done[2:2] = [
            self._heads(num_rows, "key_up", 512, 64),
            self._attention(num_rows, context),
            self._heads(num_rows, "value_up", 64, 512),
        ]
        return [*done, self._shared(num_rows), self._experts(num_rows)]

    def _linear(self, num_rows: int, name: str, num_out: int, num_in: int, num_shards: int) -> Operation:
        weight = torch.randn(num_out, num_in).bfloat16()
        copies = self.COPIES if name != "head" else 2
        packed = [kernels.pack_linear(weight, num_shards=num_shards) for _ in range(copies)]
        x, out = torch.randn(num_rows, num_in), torch.empty(num_rows, num_out)
        calls = [partial(kernels.linear, x, layer, out=out) for layer in packed]
        return Operation(name, calls, weight.nbytes, 2 * num_rows * weight.numel())

    def _heads(self, num_rows: int, name: str, num_out: int, num_in: int) -> Operation:
        weight = torch.randn(self.HEADS, num_out, num_in).bfloat16()
        packed = [kernels.pack_heads(weight) for _ in range(self.COPIES)]
        x, out = torch.randn(num_rows, self.HEADS, num_in), torch.empty(num_rows, self.HEADS, num_out)
        shape = (x.data_ptr(), self.HEADS * num_in, num_in, num_rows, out.data_ptr())
        keep = (x, out, packed)  # kernels.head_linear would make new memory each time, a forward pass does not
        calls = [partial(_with, keep, native.heads, h.address, self.HEADS, h.head_bytes, *shape) for h in packed]
        return Operation(name, calls, weight.nbytes, 2 * num_rows * weight.numel())

    def _attention(self, num_rows: int, context: int) -> Operation:
        """Decoding (up to 64 rows): each row the last of its own sequence; otherwise prompts of `context` rows."""
        decoding = num_rows <= 64
        sequences = num_rows if decoding else num_rows // context
        blocks = -(-context // 32)
        caches = [torch.randn(sequences * blocks, 32, 576) for _ in range(2)]
        tables = torch.randperm(sequences * blocks).int().view(sequences, blocks)
        rows = torch.arange(num_rows)
        row_seq = (rows if decoding else rows // context).int()
        positions = (torch.full((num_rows,), context - 1) if decoding else rows % context).int()
        latent, rope = torch.randn(num_rows, self.HEADS, 512), torch.randn(num_rows, self.HEADS, 64)
        out = torch.empty_like(latent)
        keep = (latent, rope, tables, row_seq, positions, out, *caches)
        queries = latent.data_ptr(), rope.data_ptr()
        places = (tensor.data_ptr() for tensor in (tables, row_seq, positions, out))
        strides = (*latent.stride()[:2], *rope.stride()[:2], num_rows, self.HEADS, 512, 64)
        shape = (*places, *strides, caches[0].shape[0], *tables.shape, 0.1)
        calls = [partial(_with, keep, native.attention, *queries, c.data_ptr(), *shape) for c in caches]
        pairs = int((positions + 1).sum())
        return Operation("attention", calls, caches[0].nbytes, 2 * pairs * self.HEADS * (576 + 512))

    def _shared(self, num_rows: int) -> Operation:
        banks = [self._bank(1) for _ in range(self.COPIES)]
        x = torch.randn(num_rows, self.HIDDEN)
        calls = [partial(kernels.ffn, x, bank) for bank in banks]
        weights = 3 * self.HIDDEN * self.WIDTH
        return Operation("shared", calls, 2 * weights, 2 * num_rows * weights)

    def _experts(self, num_rows: int) -> Operation:
        num_touched, copies, num_slots = 0, self.COPIES if num_rows < 256 else 2, num_rows * self.TOP_K
        x, out = torch.randn(num_rows, self.HIDDEN), torch.empty(num_slots, self.HIDDEN)
        rows = torch.arange(num_slots, dtype=torch.int32) // self.TOP_K
        calls: list[Callable[[], object]] = []
        for i in range(copies):
            ids = torch.rand(num_rows, self.EXPERTS).topk(self.TOP_K).indices.int()
            num_touched += len(set(ids.flatten().tolist()))
            at = (x.data_ptr(), num_rows, rows.data_ptr(), ids.data_ptr(), 0, 0, num_slots, out.data_ptr())
            bank = self._banks[i % len(self._banks)]
            calls.append(partial(_with, (x, out, rows, ids), native.grouped_ffn, bank.address, *at))
        weights = 3 * self.HIDDEN * self.WIDTH
        return Operation("experts", calls, 2 * weights * num_touched // copies, 2 * num_slots * weights)


def _with(_keep: object, call: Callable[..., object], *arguments: object) -> None:
    """Calls with addresses that lie in `_keep`."""
    call(*arguments)


def layer(layers: Layers, num_rows: int, only: Collection[str]) -> None:
    """Each step of a layer with cold weights: its share of a plain read, and of torch's float32 products."""
    data, total = torch.ones(1 << 25, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    read = data.nbytes / best_seconds(lambda: native.read_all(data.data_ptr(), data.nbytes, total.data_ptr()))
    a, b, c = torch.randn(512, 1024), torch.randn(1024, 2048), torch.empty(512, 2048)
    gemm = 2 * a.numel() * 2048 / best_seconds(lambda: torch.mm(a, b, out=c))
    print(f"{num_rows} rows: read {read / 1e9:.1f} GB/s, torch float32 {gemm / 1e9:.0f} GFLOP/s")
    for operation in layers.operations(num_rows, 128):
        if only and operation.name not in only:
            continue
        rounds = [best_round(operation.calls) for _ in range(3)]
        seconds = min(rounds)
        print(
            f"  {operation.name:9} {seconds * 1e6:8.0f} us  {operation.num_bytes / seconds / read:5.2f} of read"
            f"  {operation.num_operations / seconds / gemm:5.2f} of GEMM"
        )


def best_round(calls: Sequence[Callable[[], object]]) -> float:
    """Mean seconds of a call, all of them in turn."""
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def attention(num_rows: int, length: int) -> None:
    """16 heads, latent 512 + rotary 64; the last num_rows positions of one sequence."""
    cache = torch.randn(-(-length // 32), 32, 576)
    table = torch.randperm(cache.shape[0]).int()[None]
    latent, rope = torch.randn(num_rows, 16, 512), torch.randn(num_rows, 16, 64)
    positions = torch.arange(length - num_rows, length).int()
    row_seq = torch.zeros(num_rows, dtype=torch.int32)
    seconds = best_seconds(lambda: kernels.mla_attention(latent, rope, cache, table, row_seq, positions, 0.1))
    operations = 2 * num_rows * 16 * (length - num_rows // 2) * (576 + 512)
    print(f"attention {num_rows} rows at {length}: {seconds * 1e6:.0f} us, {operations / seconds / 1e9:.0f} GFLOP/s")


def expanded_attention(num_rows: int, length: int) -> None:
    """The same in the expanded form, keys and values of 64 values but for the rotary part."""
    cache = torch.randn(-(-length // 32), 32, 576)
    table = torch.randperm(cache.shape[0]).int()[None]
    query = torch.randn(num_rows, 16, 128)
    weights = (torch.randn(2, 16, 64, 512) / 512**0.5).bfloat16()
    both = kernels.pack_heads(weights[0]), kernels.pack_heads(weights[1])
    positions = torch.arange(length - num_rows, length).int()
    row_seq = torch.zeros(num_rows, dtype=torch.int32)
    seconds = best_seconds(lambda: kernels.expanded_attention(query, both, cache, table, row_seq, positions, 0.1))
    operations = 2 * 16 * (num_rows * (length - num_rows // 2) * (128 + 64) + length * 512 * 128)
    print(f"expanded {num_rows} rows at {length}: {seconds * 1e6:.0f} us, {operations / seconds / 1e9:.0f} GFLOP/s")


def overhead() -> None:
    packed, x = pack(32, 32, torch.float32), torch.randn(1, 32)
    weight = torch.ones(32)
    for name, call in (
        ("linear", lambda: kernels.linear(x, packed)),
        ("rms_norm", lambda: kernels.rms_norm(x, weight, 1e-6)),
    ):
        seconds = best_seconds(lambda call=call: [call() for _ in range(1000)])  # type: ignore[misc]
        print(f"smallest {name} call: {seconds * 1e3:.2f} us")


def matrices(megabytes: int) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    for dtype in dtypes:
        decode(dtype, megabytes)
    for dtype in dtypes:
        prefill(dtype, 128)
    prefill(torch.bfloat16, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--isa", choices=["avx512", "avx2", "generic"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 2048], help="for the part `layer`")
    parser.add_argument("--only", nargs="+", default=[], help="steps of a layer; all by default")
    args = parser.parse_args()
    if not kernels.native_available():
        raise SystemExit(kernels.native_reason())
    kernels.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    kernels.force_isa(args.isa)
    print(f"instruction set {kernels.isa()}, {kernels.num_threads()} threads")
    if "matrices" in args.parts:
        matrices(args.megabytes)
    if "layer" in args.parts:
        layers = Layers()
        for num_rows in args.rows:
            layer(layers, num_rows, args.only)
    if "attention" in args.parts:
        for num_rows, length in ((1, 1024), (1, 16384), (128, 128), (128, 1024), (512, 4096)):
            attention(num_rows, length)
        for num_rows, length in ((128, 128), (128, 1024), (512, 4096), (2048, 4096)):
            expanded_attention(num_rows, length)
    if "overhead" in args.parts:
        overhead()


if __name__ == "__main__":
    main()
