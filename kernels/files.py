"""Reading of weights from files: by all threads of the kernels, straight to where they are wanted."""

from __future__ import annotations

import ctypes
import os

import torch

from kernels import reference
from kernels.runtime import native, native_available


def read_into(file: int, offset: int, target: torch.Tensor) -> None:
    """Fill a contiguous tensor on the CPU with bytes of an open file, from `offset` on.

    Raises OSError, and EOFError where the file ends before.
    """
    assert target.is_cpu
    assert target.is_contiguous()
    if native_available():
        native.read_file(file, offset, target.nbytes, target.data_ptr())
        return
    left = memoryview((ctypes.c_char * target.nbytes).from_address(target.data_ptr()))
    while left:
        done = os.preadv(file, [left], offset)
        if done == 0:
            raise EOFError(f"{target.nbytes - len(left)} of {target.nbytes} bytes are there")
        left, offset = left[done:], offset + done


def checksum(data: torch.Tensor) -> int:
    """A number of 64 bits that no change of any 8 bytes leaves the same: of the bytes of a contiguous CPU tensor."""
    assert data.is_cpu
    assert data.is_contiguous()
    if not native_available():
        return reference.checksum(data)
    result = ctypes.c_uint64()
    native.checksum(data.data_ptr(), data.nbytes, ctypes.addressof(result))
    return result.value
