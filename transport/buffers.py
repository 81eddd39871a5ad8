"""Memory that frames are written to and sent from."""

from dataclasses import dataclass

import torch

SMALLEST = 4096


@dataclass(slots=True)
class WireBuffer:
    """A frame's bytes: `memory[:size]`, at `address`, 64-byte aligned. `memory` may be larger than the frame."""

    memory: memoryview
    address: int
    size: int

    @property
    def data(self) -> memoryview:
        """The frame's bytes, exactly."""
        return self.memory[: self.size]


def new_buffer(size: int) -> WireBuffer:
    """Fresh memory of `size` bytes, contents undefined. Torch's allocator aligns to 64 bytes, numpy's to 16."""
    tensor = torch.empty(size, dtype=torch.uint8)
    return WireBuffer(tensor.numpy().data, tensor.data_ptr(), size)


class BufferPool:
    """Send buffers kept for reuse, in powers of two, at most `max_bytes` of them.

    A buffer is given back only after its send is complete; one whose send never completed is dropped by its owner.
    """

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._free: dict[int, list[WireBuffer]] = {}

    def take(self, size: int) -> WireBuffer:
        """A buffer of at least `size` bytes whose `size` is exact."""
        capacity = max(SMALLEST, 1 << (size - 1).bit_length())
        free = self._free.get(capacity)
        if not free:
            buffer = new_buffer(capacity)
        else:
            buffer = free.pop()
            self._held_bytes -= capacity
        buffer.size = size
        return buffer

    def give_back(self, buffer: WireBuffer) -> None:
        """Keep the buffer for a later `take`. The caller must not touch it again."""
        capacity = buffer.memory.nbytes
        if self._held_bytes + capacity <= self._max_bytes:
            self._held_bytes += capacity
            self._free.setdefault(capacity, []).append(buffer)
