from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from moemesh.detokenizer import IncrementalDecoder, OutputText, StopMatcher, compile_stops
from moemesh.tokenizer import Tokenizer
from tests.moemesh.tiny_tokenizer import tokenizer_json

TINY = Tokenizer(Backend.from_str(tokenizer_json()), decoder={"type": "ByteLevel"})


def byte_fallback_tokenizer() -> Tokenizer:
    """Like Llama 2's: a mark for a space, a token for each byte, the first space of a text dropped."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581a": 256, "b": 257, "\u2581": 258}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}]})


def decode_stepwise(tokenizer: Tokenizer, ids: Sequence[int], context: Sequence[int] = ()) -> str:
    decoder = IncrementalDecoder(tokenizer, context=context)
    return "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush()


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_the_pieces_joined_are_the_text(text: str) -> None:
    ids = TINY.encode(text, add_special_tokens=False)
    assert decode_stepwise(TINY, ids) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(4, 299), max_size=14))
def test_ids_that_are_no_text_decode_as_they_do_at_once(ids: list[int]) -> None:
    assert decode_stepwise(TINY, ids) == TINY.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab \u00e9\u4f60\U0001f600", max_size=20))
def test_byte_fallback(text: str) -> None:
    ids = [256 if char == "a" else 257 if char == "b" else None for char in text]
    flat: list[int] = []
    for char, token_id in zip(text, ids, strict=True):
        flat.extend(list(char.encode()) if token_id is None else [token_id])
    tokenizer = byte_fallback_tokenizer()
    assert decode_stepwise(tokenizer, flat) == tokenizer.decode(flat)


def test_a_character_is_released_when_it_is_whole() -> None:
    ids = TINY.encode("\U0001f600", add_special_tokens=False)
    assert len(ids) == 4
    decoder = IncrementalDecoder(TINY)
    assert [decoder.push(token_id) for token_id in ids] == ["", "", "", "\U0001f600"]


def test_an_incomplete_character_at_the_end_is_shown_as_such() -> None:
    decoder = IncrementalDecoder(TINY)
    first = TINY.encode("\U0001f600", add_special_tokens=False)[0]
    assert decoder.push(first) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_a_run_of_garbage_is_not_held_for_ever() -> None:
    decoder = IncrementalDecoder(TINY)
    first = TINY.encode("\U0001f600", add_special_tokens=False)[0]
    pieces = [decoder.push(first) for _ in range(1000)]
    assert max(len(piece) for piece in pieces) <= 16
    assert len("".join(pieces) + decoder.flush()) == 1000


def test_the_prompt_gives_the_first_token_its_context() -> None:
    tokenizer = byte_fallback_tokenizer()
    assert decode_stepwise(tokenizer, [256]) == "a"
    assert decode_stepwise(tokenizer, [256], context=[257] * 20) == " a"


def test_special_tokens_are_skipped_or_not() -> None:
    shown = IncrementalDecoder(TINY, skip_special_tokens=False)
    hidden = IncrementalDecoder(TINY)
    assert shown.push(1) == "<eos>"
    assert hidden.push(1) == ""


def reference_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """By definition: the shortest beginning of the text that ends in a stop string, without it."""
    for end in range(len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            stop = max(met, key=len)
            return text[: end - len(stop)], stop
    return text, None


def run_matcher(pieces: Sequence[str], stops: Sequence[str], *, include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(compile_stops(stops), include_in_text=include)
    released = ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        released += text
        if stop is not None:
            return released, stop
    return released + matcher.flush(), None


PIECES = st.lists(st.text(alphabet="ab", max_size=4), max_size=10)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


@settings(max_examples=500, deadline=None)
@given(PIECES, STOPS)
def test_stops_do_not_depend_on_the_cutting(pieces: list[str], stops: list[str]) -> None:
    expected = reference_stop("".join(pieces), stops)
    assert run_matcher(pieces, stops) == expected


@settings(max_examples=300, deadline=None)
@given(PIECES, STOPS)
def test_the_stop_string_can_be_kept(pieces: list[str], stops: list[str]) -> None:
    text, stop = reference_stop("".join(pieces), stops)
    assert run_matcher(pieces, stops, include=True) == (text + (stop or ""), stop)


@settings(max_examples=300, deadline=None)
@given(PIECES, STOPS)
def test_nothing_is_held_back_longer_than_needed(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(compile_stops(stops))
    text = released = ""
    for piece in pieces:
        text += piece
        new, stop = matcher.push(piece)
        released += new
        if stop is not None:
            return
        held = text[len(released) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, ""), (1, "a"), (2, "aa"), (3, "aaa")])
def test_no_stop_string_before_min_tokens(min_tokens: int, expected: str) -> None:
    token = TINY.encode("a", add_special_tokens=False)[0]
    text = OutputText(IncrementalDecoder(TINY), StopMatcher(compile_stops(["a"])), min_tokens=min_tokens)
    released = ""
    for _ in range(3):
        piece, stop = text.push(token)
        released += piece
        if stop is not None:
            break
    assert released == expected


def test_a_stop_string_met_by_the_last_held_character() -> None:
    first = TINY.encode("\U0001f600", add_special_tokens=False)[0]
    text = OutputText(IncrementalDecoder(TINY), StopMatcher(compile_stops(["\ufffd"])))
    assert text.push(first) == ("", None)
    assert text.finish() == ("", "\ufffd")


def test_the_length_counts_what_is_held_back() -> None:
    text = OutputText(IncrementalDecoder(TINY), StopMatcher(compile_stops(["helloX"])))
    for token_id in TINY.encode("hello", add_special_tokens=False):
        assert text.push(token_id) == ("", None)
    assert text.length == 5
    assert text.finish() == ("hello", None)
