"""Memory that costs nothing until it is written: room for experts that a rank may have to take over."""

from __future__ import annotations

import mmap

import torch

from kernels.panels import HUGE_PAGE
from kernels.runtime import native

_MAP_NORESERVE = 0x4000  # Linux; mmap has no name for it before Python 3.13
_PAGE = mmap.PAGESIZE


class ReservedMemory:
    """`num_bytes` zero bytes of address space, on huge pages where that is worth it. What is not written has no memory.

    `data` is uint8 [num_bytes]; this object must live as long as it. Raises MemoryError where even addresses are short.
    """

    def __init__(self, num_bytes: int) -> None:
        huge = num_bytes >= 2 * HUGE_PAGE and native is not None
        try:
            self._map = mmap.mmap(
                -1,
                max(1, num_bytes) + (HUGE_PAGE if huge else 0),
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
            )
        except OSError as error:
            raise MemoryError(f"{num_bytes} bytes of address space are not to be had: {error.strerror}") from error
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._start = -whole.data_ptr() % HUGE_PAGE if huge else 0
        self.data = whole[self._start : self._start + num_bytes]
        if huge:
            native.advise_huge_pages(self.data.data_ptr(), num_bytes)

    def give_back(self, start: int, stop: int) -> None:
        """Bytes [start, stop) are needed no longer: the pages that lie in them wholly have no memory again."""
        first = -(-(self._start + start) // _PAGE) * _PAGE
        last = (self._start + stop) // _PAGE * _PAGE
        if first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
