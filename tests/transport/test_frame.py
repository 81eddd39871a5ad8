"""The codec: what is written is read to the bit, and nothing else is."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.transport.link_contract import DTYPES, random_tensor, same_bytes
from transport.buffers import WireBuffer
from transport.errors import ProtocolError
from transport.frame import ALIGNMENT, Frame, Header, Kind, Label, decode, encode, seal

UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
UINT16 = st.integers(0, 2**16 - 1)
LABELS = st.builds(Label, UINT32, UINT32, UINT64, UINT64)
HEADERS = st.builds(
    Header, st.sampled_from(Kind), UINT32, UINT32, UINT32, UINT32, UINT64, UINT16, UINT16, UINT16, UINT16
)
SHAPES = st.lists(st.integers(0, 9), max_size=4)
TENSORS = st.builds(
    lambda dtype, shape, seed: random_tensor(torch.Generator().manual_seed(seed), dtype, shape),
    st.sampled_from(DTYPES),
    SHAPES,
    st.integers(0, 2**31),
)
FRAMES = st.builds(Frame, HEADERS, st.lists(TENSORS, max_size=5).map(tuple))


def sealed(frame: Frame, label: Label | None = None, *, whole: bool = False) -> WireBuffer:
    buffer = encode(frame)
    seal(buffer, label or Label(frame.header.incarnation, 0, 0, 0), whole=whole)
    return buffer


def read(data: memoryview, *, whole: bool = False) -> Frame:
    return decode(data, whole=whole)[0]


def assert_same(left: Frame, right: Frame) -> None:
    assert left.header == right.header
    assert len(left.tensors) == len(right.tensors)
    assert all(same_bytes(a, b) for a, b in zip(left.tensors, right.tensors, strict=True))


@given(FRAMES, st.booleans())
def test_round_trip(frame: Frame, whole: bool) -> None:
    buffer = sealed(frame, whole=whole)
    decoded = read(buffer.data, whole=whole)
    assert_same(decoded, frame)
    for tensor in decoded.tensors:
        if tensor.numel():
            assert (tensor.data_ptr() - buffer.address) % ALIGNMENT == 0
    assert_same(read(memoryview(bytearray(buffer.data)), whole=whole), frame)


@given(FRAMES, LABELS)
def test_the_label_is_the_links(frame: Frame, label: Label) -> None:
    decoded, found = decode(sealed(frame, label).data)
    assert found == label
    assert_same(decoded, replace(frame, header=replace(frame.header, incarnation=label.incarnation)))


@given(FRAMES, st.integers(0, 4))
def test_strided_tensors_arrive_as_they_look(frame: Frame, axis: int) -> None:
    turned = Frame(frame.header, tuple(t.transpose(0, -1) if t.dim() else t for t in frame.tensors))
    assert_same(read(sealed(turned).data), turned)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(memoryview(bytearray(data)))


@given(FRAMES, st.data(), st.booleans())
def test_damage_is_found(frame: Frame, data: st.DataObject, whole: bool) -> None:
    """Anywhere in header and descriptors; anywhere at all where the whole frame is checked."""
    damaged = bytearray(sealed(frame, whole=whole).data)
    limit = len(damaged) if whole else 64 + 20 * len(frame.tensors)
    damaged[data.draw(st.integers(0, limit - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        read(memoryview(damaged), whole=whole)


@given(FRAMES, st.data())
def test_forged_frames_are_refused_or_read_but_never_crash(frame: Frame, data: st.DataObject) -> None:
    """Descriptors of any content under a checksum that is right."""
    forged = encode(frame)
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(40, 63 + 20 * len(frame.tensors)))
        forged.memory[place] = data.draw(st.integers(0, 255))
    seal(forged, Label(0, 0, 0, 0))
    with suppress(ProtocolError):
        read(forged.data)


@given(FRAMES, st.integers(-200, 200).filter(bool))
def test_wrong_lengths_are_refused(frame: Frame, change: int) -> None:
    data = bytes(sealed(frame).data)
    wrong = data[:change] if change < 0 else data + bytes(change)
    with pytest.raises(ProtocolError):
        read(memoryview(bytearray(wrong)))


def test_huge_empty_shape_is_refused() -> None:
    buffer = encode(Frame(Header(Kind.PLAN, 0), (torch.empty(0, 1, 1, 1),)))
    buffer.memory[64 + 4 : 64 + 20] = np.array([0, 2**32 - 1, 2**32 - 1, 2**32 - 1], dtype="<u4").tobytes()
    seal(buffer, Label(0, 0, 0, 0))
    with pytest.raises(ProtocolError, match="larger than"):
        decode(buffer.data)


def test_decoding_copies_nothing() -> None:
    buffer = sealed(Frame(Header(Kind.ANSWER, 0), (torch.zeros(4),)))
    (tensor,) = read(buffer.data).tensors
    torch.frombuffer(buffer.memory, dtype=torch.uint8)[-16:] = 0xFF
    assert tensor.isnan().all()


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (Frame(Header(Kind.PLAN, -1)), "header does not fit.*'sender': -1"),
        (Frame(Header(Kind.PLAN, 0, layer=2**16)), "header does not fit"),
        (Frame(Header(Kind.PLAN, 0), (torch.ones(2, dtype=torch.complex64),)), r"cannot hold torch\.complex64"),
        (Frame(Header(Kind.PLAN, 0), (torch.ones(1, 1, 1, 1, 1),)), "at most 4 dimensions, got 5"),
        (Frame(Header(Kind.PLAN, 0), (torch.ones(1),) * 33), "at most 32 tensors, got 33"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(frame: Frame, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(frame)
