"""How near the CPU kernels come to the machine: decoding against plain reads of memory, prefill in GFLOP/s.

    python -m benchmarks.kernels [--threads 2] [--megabytes 256] [--isa avx2]

Ratios taken in one run stand also on a busy machine; absolute numbers do not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import kernels
from kernels.runtime import native


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


def experts(num_rows: int) -> None:
    """A layer of bench-1b: 256 experts of 1024 x 256, 8 per token."""
    generator = torch.Generator().manual_seed(0)
    packed = kernels.PackedExperts.empty(256, 1024, 256, dtype=torch.bfloat16)
    down = torch.randn(1024, 256).bfloat16()
    for slot in range(256):
        packed.load(slot, down.T.contiguous(), down.T.contiguous(), down)
    ids = torch.stack([torch.randperm(256, generator=generator)[:8] for _ in range(num_rows)]).int()
    rows = torch.arange(8 * num_rows, dtype=torch.int32) // 8
    x = torch.randn(num_rows, 1024)
    seconds = best_seconds(lambda: kernels.grouped_ffn(x, packed, rows, ids.flatten()))
    touched = len(set(ids.flatten().tolist())) * 3 * 1024 * 256 * 2
    operations = 6 * num_rows * 8 * 1024 * 256
    print(
        f"experts {num_rows} rows: {seconds * 1e6:.0f} us, {touched / seconds / 1e9:.1f} GB/s, "
        f"{operations / seconds / 1e9:.0f} GFLOP/s"
    )


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--isa", choices=["avx512", "avx2", "generic"])
    args = parser.parse_args()
    if not kernels.native_available():
        raise SystemExit(kernels.native_reason())
    kernels.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    kernels.force_isa(args.isa)
    print(f"instruction set {kernels.isa()}, {kernels.num_threads()} threads")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    for dtype in dtypes:
        decode(dtype, args.megabytes)
    for dtype in dtypes:
        prefill(dtype, 128)
    prefill(torch.bfloat16, 512)
    for num_rows in (1, 4, 16, 128):
        experts(num_rows)
    for num_rows, length in ((1, 1024), (1, 16384), (128, 128), (128, 1024), (512, 4096)):
        attention(num_rows, length)
    for num_rows, length in ((128, 128), (128, 1024), (512, 4096), (2048, 4096)):
        expanded_attention(num_rows, length)
    overhead()


if __name__ == "__main__":
    main()
