"""The frame: the one thing that travels between ranks. A fixed header, then raw tensor bytes.

    0        64              64 + 20 n     64-aligned            64-aligned
    +--------+---------------+-------------+---------+-----------+---------+
    | header | n descriptors |  (padding)  | tensor 0| (padding) | tensor 1| ...      the last tensor ends the frame
    +--------+---------------+-------------+---------+-----------+---------+

Little-endian. Offsets are not on the wire: they follow from the descriptors, so there is only one valid layout and
every length is checked against it. What lies in the padding is undefined. Frames are never pickled.

Who posts a frame writes what it is for; the link that sends it seals it: the label and a checksum (CRC-32) of header
and descriptors, or of the whole frame where the carrier cannot be trusted with the payload.
"""

import ctypes
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from transport.buffers import WireBuffer, new_buffer
from transport.errors import ProtocolError

MAGIC = b"moeM"
VERSION = 2
ALIGNMENT = 64
MAX_TENSORS = 32
MAX_DIMS = 4
MAX_TENSOR_BYTES = 1 << 40

_DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
)
"""The place of a dtype is its code on the wire: append only."""
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_ITEM_BYTES = tuple(dtype.itemsize for dtype in _DTYPES)

# magic, checksum, version, kind, number of tensors, sender, the label, the other fields of the header in order
_HEADER = struct.Struct("<4sIHBBIIIQQIIQHHHH")
_DESCRIPTOR = struct.Struct("<BBH4I")
_LABEL = struct.Struct("<IIQQ")
_LABEL_OFFSET = 16
_CHECKSUM = struct.Struct("<I")
_CHECKSUM_OFFSET = 4
_CHECKED_FROM = 8
_NUM_TENSORS_OFFSET = 11
assert _HEADER.size == 64


class Kind(IntEnum):
    """What a frame is for. Everything but CREDIT and PROBE costs a credit of the window."""

    DISPATCH = 1
    """Tokens' rows on their way to experts."""
    ANSWER = 2
    """Experts' results on their way back."""
    COLLECTIVE = 3
    """A part of a tensor-parallel sum or gather."""
    PLAN = 4
    """A step's plan from a group's leader to its peers."""
    SAMPLES = 5
    """Sampled tokens of a step."""
    CREDIT = 6
    """Nothing but an acknowledgement."""
    NOT_HERE = 7
    """The rank does not host an expert it was asked for; `placement_version` says what it knows."""
    PROBE = 8
    """Asks for an acknowledgement of the number it bears, which is that of the last frame before it."""
    KEPT = 9
    """What a member of a group knows of its cache, when the group goes on with other members."""
    CACHE = 10
    """Blocks of the cache, for a member that has none."""


_KINDS = {int(kind): kind for kind in Kind}


class Label(NamedTuple):
    """What the link writes on a frame, and the link at the other end reads before anything else.

    `incarnation` and `receiver_incarnation` name the lives it goes between, `sequence` is its number between those
    two (0: takes no credit), `acknowledged` the highest number seen of the other direction.
    """

    incarnation: int
    receiver_incarnation: int
    sequence: int
    acknowledged: int


@dataclass(frozen=True, slots=True)
class Header:
    """Who sent a frame and for which piece of work.

    `incarnation` belongs to the link, which overwrites it. The other fields are the sender's and arrive unchanged.
    """

    kind: Kind
    sender: int
    incarnation: int = 0
    generation: int = 0
    placement_version: int = 0
    step: int = 0
    layer: int = 0
    micro_batch: int = 0
    attempt: int = 0
    phase: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """A header and its tensors. Decoded tensors lie on the CPU, share the receive buffer and belong to the receiver."""

    header: Header
    tensors: tuple[Tensor, ...] = ()


def _align(offset: int) -> int:
    return (offset + ALIGNMENT - 1) & -ALIGNMENT


def encode(frame: Frame, allocate: Callable[[int], WireBuffer] = new_buffer) -> WireBuffer:
    """Write the frame into one buffer from `allocate`; the tensors are copied once and may be reused at once.

    Tensors may lie on any device and have any strides; at most 4 dimensions and 32 tensors. Raises ValueError for a
    header or tensor that the format cannot hold.
    """
    tensors = [tensor.contiguous() if tensor.is_cpu else tensor.cpu().contiguous() for tensor in frame.tensors]
    _check_encodable(tensors)
    sizes = [tensor.nbytes for tensor in tensors]
    offsets, total = _layout(sizes)
    buffer = allocate(total)
    _write_header(buffer, frame.header, len(tensors))
    for index, tensor in enumerate(tensors):
        shape = tensor.shape
        padded = (*shape, 0, 0, 0, 0)[:MAX_DIMS]
        place = _HEADER.size + index * _DESCRIPTOR.size
        _DESCRIPTOR.pack_into(buffer.memory, place, _CODES[tensor.dtype], len(shape), 0, *padded)
        if sizes[index]:
            ctypes.memmove(buffer.address + offsets[index], tensor.data_ptr(), sizes[index])
    return buffer


def _check_encodable(tensors: Sequence[Tensor]) -> None:
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"a frame holds at most {MAX_TENSORS} tensors, got {len(tensors)}: send several frames")
    for tensor in tensors:
        if tensor.dtype not in _CODES:
            raise ValueError(f"frames cannot hold {tensor.dtype}: convert it to one of {[str(d) for d in _DTYPES]}")
        if tensor.dim() > MAX_DIMS:
            raise ValueError(f"frames hold tensors of at most {MAX_DIMS} dimensions, got {tensor.dim()}: flatten it")


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Offset of each tensor and the bytes of the whole frame."""
    end = _HEADER.size + len(sizes) * _DESCRIPTOR.size
    offsets = []
    for size in sizes:
        start = _align(end)
        offsets.append(start)
        end = start + size
    return offsets, end


def _write_header(buffer: WireBuffer, header: Header, num_tensors: int) -> None:
    try:
        _HEADER.pack_into(
            buffer.memory,
            0,
            MAGIC,
            0,
            VERSION,
            header.kind,
            num_tensors,
            header.sender,
            header.incarnation,
            0,
            0,
            0,
            header.generation,
            header.placement_version,
            header.step,
            header.layer,
            header.micro_batch,
            header.attempt,
            header.phase,
        )
    except struct.error as error:
        values = {field.name: getattr(header, field.name) for field in fields(header)}
        raise ValueError(f"header does not fit its fields: {values}: {error}") from None


def seal(buffer: WireBuffer, label: Label, *, whole: bool = False) -> None:
    """Write label and checksum of an encoded frame: known only when it leaves. `whole`: the payload is checked too."""
    memory = buffer.memory
    _LABEL.pack_into(memory, _LABEL_OFFSET, *label)
    end = buffer.size if whole else _HEADER.size + memory[_NUM_TENSORS_OFFSET] * _DESCRIPTOR.size
    _CHECKSUM.pack_into(memory, _CHECKSUM_OFFSET, zlib.crc32(memory[_CHECKED_FROM:end]))


def decode(memory: memoryview, *, whole: bool = False) -> tuple[Frame, Label]:
    """A sealed frame, checked to the last byte, and its label. Zero-copy (the tensors keep the memory alive).

    Raises ProtocolError for anything that `encode` and `seal` do not write, and for damage (to the payload only with
    `whole`, as it was sealed); never anything else, whatever the bytes.
    """
    size = memory.nbytes
    if size < _HEADER.size:
        raise ProtocolError(f"frame of {size} bytes is shorter than its header of {_HEADER.size}")
    values = _HEADER.unpack_from(memory)
    magic, checksum, version, kind, num_tensors, sender, incarnation = values[:7]
    if magic != MAGIC or version != VERSION:
        raise ProtocolError(f"not a frame of version {VERSION}: magic {magic!r}, version {version}")
    end = _HEADER.size + num_tensors * _DESCRIPTOR.size
    if kind not in _KINDS or num_tensors > MAX_TENSORS or size < end:
        raise ProtocolError(
            f"frame of unknown kind {kind} or with {num_tensors} tensors (at most {MAX_TENSORS}) in {size} bytes"
        )
    found = zlib.crc32(memory[_CHECKED_FROM : size if whole else end])
    if found != checksum:
        raise ProtocolError(f"frame from rank {sender} says its checksum is {checksum:08x} and it is {found:08x}")
    header = Header(_KINDS[kind], sender, incarnation, *values[10:])
    return Frame(header, _read_tensors(memory, num_tensors)), Label._make(values[6:10])


def _read_tensors(memory: memoryview, num_tensors: int) -> tuple[Tensor, ...]:
    if num_tensors == 0:
        if memory.nbytes != _HEADER.size:
            raise ProtocolError(f"frame without tensors has {memory.nbytes} bytes, not {_HEADER.size}")
        return ()
    described = [_read_descriptor(memory, index) for index in range(num_tensors)]
    offsets, total = _layout([size for _, _, size in described])
    if total != memory.nbytes:
        raise ProtocolError(f"frame has {memory.nbytes} bytes, its descriptors say {total}")
    return tuple([_tensor_at(memory, offset, *tensor) for offset, tensor in zip(offsets, described, strict=True)])


def _tensor_at(memory: memoryview, offset: int, code: int, shape: tuple[int, ...], size: int) -> Tensor:
    if size == 0:
        return torch.empty(shape, dtype=_DTYPES[code])
    flat = torch.frombuffer(memory, dtype=_DTYPES[code], count=size // _ITEM_BYTES[code], offset=offset)
    return flat if len(shape) == 1 else flat.view(shape)


def _read_descriptor(memory: memoryview, index: int) -> tuple[int, tuple[int, ...], int]:
    """Dtype code, shape and bytes, known to be safe to build a tensor from."""
    code, num_dims, reserved, *dims = _DESCRIPTOR.unpack_from(memory, _HEADER.size + index * _DESCRIPTOR.size)
    if code >= len(_DTYPES) or num_dims > MAX_DIMS or reserved or any(dims[num_dims:]):
        raise ProtocolError(f"tensor {index}: dtype code {code}, {num_dims} dimensions {dims} are not a tensor")
    shape = tuple(dims[:num_dims])
    # Zeros count as ones: an empty tensor's strides overflow as a full one's would.
    extent = _ITEM_BYTES[code]
    for dim in shape:
        extent *= dim or 1
    if extent > MAX_TENSOR_BYTES:
        raise ProtocolError(f"tensor {index} of shape {shape} is larger than {MAX_TENSOR_BYTES} bytes")
    return code, shape, 0 if 0 in shape else extent
