"""Control messages: strict in what they accept, and never a crash."""

from contextlib import suppress

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from transport import messages
from transport.errors import ProtocolError
from transport.messages import (
    Cancel,
    Drain,
    Failed,
    GroupMembers,
    Heard,
    Heartbeat,
    Hello,
    Hosting,
    Message,
    NotSpawned,
    OutputItem,
    Outputs,
    PeerReport,
    Place,
    Progress,
    Readmit,
    Ready,
    Respawn,
    Start,
    Started,
    Stats,
    Stop,
    Submit,
    View,
    decode_message,
    encode_message,
)

INTS = st.integers(0, 2**63 - 1)
IDS = st.lists(st.integers(0, 2**31), max_size=20)
TEXT = st.text(max_size=10)
JSON = st.dictionaries(TEXT, st.none() | st.booleans() | INTS | st.floats(allow_nan=False) | TEXT | IDS, max_size=4)
ENTRY = st.none() | st.tuples(INTS, st.floats(-9, 0), INTS, IDS, st.lists(st.floats(-9, 0))).map(list)
ENTRIES = st.none() | st.lists(ENTRY, max_size=3)
ITEMS = st.builds(
    OutputItem, INTS, INTS, IDS, ENTRIES, ENTRIES, st.none() | TEXT, st.none() | TEXT, st.booleans(), INTS
)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Start, JSON),
    st.builds(Submit, INTS, IDS, JSON, IDS, TEXT),
    st.builds(Cancel, INTS),
    st.just(Drain()),
    st.just(Stop()),
    st.builds(Hello, INTS, INTS, INTS, TEXT, INTS, TEXT),
    st.builds(Progress, INTS, TEXT, INTS, INTS),
    st.builds(Ready, INTS, INTS),
    st.builds(Outputs, INTS, INTS, st.lists(ITEMS, max_size=3)),
    st.builds(Stats, INTS, st.dictionaries(TEXT, st.floats(allow_nan=False)), st.dictionaries(st.integers(0, 60), IDS)),
    st.builds(Failed, INTS, TEXT),
    st.builds(View, INTS, IDS, st.lists(TEXT), IDS, st.lists(st.builds(GroupMembers, INTS, IDS, INTS), max_size=3)),
    st.builds(Readmit, INTS),
    st.builds(Respawn, INTS, INTS, INTS, INTS),
    st.builds(Started, INTS, TEXT),
    st.builds(NotSpawned, INTS, INTS, TEXT),
    st.just(Heard()),
    st.builds(Heartbeat, INTS, st.booleans()),
    st.builds(PeerReport, INTS, INTS, TEXT),
    st.builds(Place, INTS, st.dictionaries(st.integers(0, 60), st.lists(IDS, max_size=3), max_size=3)),
    st.builds(Hosting, st.dictionaries(st.integers(0, 60), IDS, max_size=3)),
)


@given(MESSAGES)
def test_round_trip(message: Message) -> None:
    assert decode_message(encode_message(message)) == message


@given(st.binary(max_size=200))
@example(b"\x83\x00\x00\x00\x00\x90\x00")  # a map with a list for a key
def test_random_bytes_never_crash(data: bytes) -> None:
    with suppress(ProtocolError):
        decode_message(data)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | st.integers(0, 9), inner, max_size=3),
    max_leaves=12,
)


@given(st.tuples(st.integers(-1, 12), st.lists(PLAIN, max_size=8)) | PLAIN)
def test_any_msgpack_never_crashes(value: object) -> None:
    data = msgpack.packb([value[0], *value[1]] if isinstance(value, tuple) else value)
    with suppress(ProtocolError):
        decode_message(data)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1}, "not a list"),
        ([], "not a list"),
        ([True], "not a list that begins with a tag"),
        ([99], "unknown tag 99"),
        ([-1], "unknown tag -1"),
        ([2], "Cancel has 1 fields, got 0"),
        ([2, "7"], "Cancel.request_id must be int, got str"),
        ([2, True], "Cancel.request_id must be int, got bool"),
        ([1, 0, [1, 2.5], {}, [], ""], "Submit.prompt must hold integers only"),
        ([1, 0, [1, False], {}, [], ""], "Submit.prompt must hold integers only"),
        ([8, 0, 0, [[1, 2]]], r"OutputItem has \d+ fields, got 2"),
        ([8, 0, 0, [{}]], "Outputs.items must be list, got dict"),
        ([9, 0, {1: 1.0}, {}], "Stats.counters must be str, got int"),
        ([9, 0, {"a": "1"}, {}], "Stats.counters must be float, got str"),
    ],
)
def test_wrong_values_are_named(value: object, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode_message(msgpack.packb(value))


def test_integer_counts_as_float() -> None:
    decoded = decode_message(encode_message(Stats(0, {"steps": 3})))
    assert isinstance(decoded, Stats)
    assert isinstance(decoded.counters["steps"], float)


def test_size_limit_holds_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_message(Failed(0, "x" * 100))
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 50)
    with pytest.raises(ValueError, match=r"Failed takes 1\d\d bytes, at most 50"):
        encode_message(Failed(0, "x" * 100))
    with pytest.raises(ProtocolError, match="at most 50"):
        decode_message(data)


def test_only_plain_values_are_sent() -> None:
    with pytest.raises(TypeError, match="set cannot be sent"):
        encode_message(Start({"a": {1, 2}}))
