"""Token ids to text while they come: nothing is released that a later token could change or a stop string take back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moemesh.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# A character has at most four bytes, hence tokens. A run of ids that stays undecodable for longer is not one character.
_MAX_HELD_TOKENS = 16
# So many ids of the prompt give the first generated token its context (a leading space depends on what precedes it).
_CONTEXT_TOKENS = 6


class IncrementalDecoder:
    """The text of ids pushed one by one; the pieces joined are what decoding all ids at once gives.

    Two windows into the ids, as in Hugging Face's text-generation-inference: [start, read) is context that has been
    released, [read, end) waits. New text is decode([start, end)) beyond decode([start, read)), released unless it ends
    in U+FFFD, a character whose bytes are not all there. `tokenizers.DecodeStream` does the same but cannot be flushed,
    and raises on ids whose prefix decodes otherwise than before.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(context[-_CONTEXT_TOKENS:])
        self._read = len(self._window)
        self._released = self._decode(self._window)

    def push(self, token_id: int) -> str:
        """The text that is certain now, often one token's, "" while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        held = len(self._window) - self._read
        if text.endswith(_REPLACEMENT) and held < _MAX_HELD_TOKENS:
            return ""
        return self._release(text)

    def flush(self) -> str:
        """What was held, at the end: an incomplete character becomes U+FFFD."""
        return self._release(self._decode(self._window))

    def _release(self, text: str) -> str:
        new = text[len(self._released) :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._released = self._decode(self._window)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


@dataclass(frozen=True)
class StopString:
    """A stop string with its failure table (Knuth, Morris and Pratt 1977): a step costs the same however long it is."""

    text: str
    failure: tuple[int, ...]

    def advance(self, matched: int, char: str) -> int:
        """How many characters of it a text ends with, one character later; never called with all of them matched."""
        while matched and self.text[matched] != char:
            matched = self.failure[matched - 1]
        return matched + 1 if self.text[matched] == char else 0


def compile_stops(stops: Sequence[str]) -> tuple[StopString, ...]:
    """The tables of non-empty stop strings, once for all choices of a request."""
    return tuple(StopString(stop, _failure_table(stop)) for stop in stops)


def _failure_table(stop: str) -> tuple[int, ...]:
    """For each end, the longest proper beginning of `stop` that the text up to there ends with."""
    table = [0]
    for char in stop[1:]:
        matched = table[-1]
        while matched and stop[matched] != char:
            matched = table[matched - 1]
        table.append(matched + 1 if stop[matched] == char else 0)
    return tuple(table)


class StopMatcher:
    """Finds the stop string that a text reaches first, however the text is cut into pieces.

    The first is the one that ends first (of those that end together, the longest), so the result is a function of the
    text alone. Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[StopString], *, include_in_text: bool = False) -> None:
        self._stops = stops
        self._include_in_text = include_in_text
        self._matched = [0] * len(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """(text to release, the stop string met or None); after one is met nothing more may be pushed."""
        if not self._stops:
            return piece, None
        before = len(self._held)
        text = self._held + piece
        for end, char in enumerate(piece, start=before + 1):
            stop = self._advance(char)
            if stop is not None:
                self._held = ""
                return text[: end if self._include_in_text else end - len(stop)], stop
        keep = max(self._matched)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, at the end of a text in which no stop string came."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        met = ""
        for index, stop in enumerate(self._stops):
            matched = stop.advance(self._matched[index], char)
            self._matched[index] = matched
            if matched == len(stop.text):
                met = max(met, stop.text, key=len)
        return met or None


class OutputText:
    """The visible text of one choice: an IncrementalDecoder and a StopMatcher, one token at a time.

    `length` is the number of characters known so far, held ones included: where the next token's text begins.
    """

    def __init__(self, decoder: IncrementalDecoder, matcher: StopMatcher, *, min_tokens: int = 0) -> None:
        self._decoder = decoder
        self._matcher = matcher
        self._unstoppable_tokens = min_tokens
        self.length = 0

    def push(self, token_id: int) -> tuple[str, str | None]:
        """(text to release, the stop string met or None). The first `min_tokens` tokens cannot meet one."""
        return self._advance(self._decoder.push(token_id), counts=True)

    def finish(self) -> tuple[str, str | None]:
        """The rest of the text, when generation ended by itself; the last characters may still meet a stop string."""
        text, stop = self._advance(self._decoder.flush(), counts=False)
        return (text, stop) if stop is not None else (text + self._matcher.flush(), None)

    def _advance(self, piece: str, *, counts: bool) -> tuple[str, str | None]:
        self.length += len(piece)
        if self._unstoppable_tokens > 0:
            self._unstoppable_tokens -= counts
            return piece, None
        return self._matcher.push(piece)
