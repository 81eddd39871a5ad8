"""Which arithmetic this process uses: the C kernels and their instruction set, or the torch reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Arithmetic = Literal["float32", "bf16x3"]
"""How products with bfloat16 weights are computed, of equal accuracy: float32 is a chain of fused multiply-adds; bf16x3
cuts an activation into three bfloat16 numbers, whose sum it is, for the tiles of AMX. Everybody who is to have the same
bits must compute in the same; weights are packed for one."""

try:
    import kernels._native as _native

    native = _native
    _IMPORT_ERROR = ""
except ImportError as error:
    native = None  # type: ignore[assignment]
    _IMPORT_ERROR = str(error)

_NATIVE = native is not None and native.isa() != ""


def native_available() -> bool:
    """True when tensors on the CPU go through the C kernels: fast, and bit-identical whatever the batch."""
    return _NATIVE


def native_reason() -> str:
    """Why the C kernels are not in use; empty when they are."""
    if _NATIVE:
        return ""
    if native is None:
        return f"the C kernels were not built ({_IMPORT_ERROR}); install a C compiler and reinstall"
    return "the C kernels need a processor with fused multiply-add (AVX2 and FMA, AVX-512, or ARM64)"


def isa() -> str:
    """The instruction set in use: amx, avx512, avx2 or generic; torch when the C kernels are not in use."""
    return native.isa() if _NATIVE else "torch"


def force_isa(name: str | None) -> None:
    """Use the named instruction set (None: the best this processor has). Raises ValueError if it cannot run here."""
    if not _NATIVE:
        raise ValueError(f"cannot use instruction set {name}: {native_reason()}")
    native.select(name)


def set_num_threads(num_threads: int) -> None:
    """Threads that one kernel call may use, in this process. The results do not depend on it."""
    if _NATIVE:
        native.set_num_threads(num_threads)
    else:
        torch.set_num_threads(num_threads)


@contextmanager
def aside() -> Iterator[None]:
    """Within it operations of this thread run on it alone, beside those of other threads, whom they do not delay."""
    if _NATIVE:
        native.work_aside(True)
    try:
        yield
    finally:
        if _NATIVE:
            native.work_aside(False)


def num_threads() -> int:
    """Threads that one kernel call may use."""
    return native.num_threads() if _NATIVE else torch.get_num_threads()


def native_seconds() -> float:
    """Time that operations of the C kernels have taken in this process, on the calling threads; 0 without them."""
    return native.nanoseconds() / 1e9 if _NATIVE else 0.0


def runs_native(tensor: torch.Tensor) -> bool:
    """True when an operation on this tensor goes through the C kernels."""
    return _NATIVE and tensor.is_cpu


def require(tensor: torch.Tensor, name: str, shape: tuple[int | None, ...], dtype: torch.dtype = torch.float32) -> None:
    """Raise ValueError unless the tensor has this dtype and shape (None: any size) and is contiguous."""
    have = tensor.shape  # this runs before every kernel call: mostly one comparison is enough
    if tensor.dtype is dtype and tensor.is_contiguous() and (have == shape or _fits(have, shape)):
        return
    if tensor.dtype is not dtype:
        raise ValueError(f"{name} is {tensor.dtype}, must be {dtype}; convert it first")
    if _fits(have, shape):
        raise ValueError(f"{name} with strides {tensor.stride()} is not contiguous; call .contiguous() first")
    wanted = tuple("any" if size is None else size for size in shape)
    raise ValueError(f"{name} has shape {tuple(have)}, must be {wanted}")


def _fits(have: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    if len(have) != len(shape):
        return False
    for want, got in zip(shape, have, strict=True):  # noqa: SIM110 - a generator costs twice as much
        if want is not None and want != got:
            return False
    return True
