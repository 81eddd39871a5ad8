"""What a rank did when, for `--trace`: spans, kept in memory and written in large pieces.

A rank has rows, each one a line of time in which spans nest:

    row 0        the engine's thread: steps, and in them frames posted and batches of experts computed
    row 1 + i    micro-batch i on its way through the layers, waiting included: laps, one behind the other

Times are CLOCK_MONOTONIC's, which all processes of a host share. Whoever is traced holds a `Trace` or None, so that a
run without `--trace` pays for one comparison a place.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

ENGINE_ROW = 0
FLUSH_SPANS = 4096
MAX_BYTES = 256 << 20

Moment = tuple[int, int]
"""The clock and the processor time of the thread, in nanoseconds: the difference shows who had to wait for a core."""

Span = tuple[int, str, Moment, Moment, dict[str, Any]]
"""Row, name, begin and end, and what else is known."""


def now() -> Moment:
    """To be taken where a span begins."""
    return time.monotonic_ns(), time.thread_time_ns()


class Trace:
    """The spans of one rank, appended to its own file; those beyond `max_bytes` are counted and dropped."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._file = path.open("wb", buffering=0)
        self._left = max_bytes
        self._spans: list[Span] = []
        self._laps: dict[int, Moment] = {}
        self.dropped = 0

    def span(self, name: str, began: Moment | None, **details: Any) -> None:
        """The engine's thread did this from `began` (see `now`) until now."""
        assert began is not None, "a span begins with `now`"
        self._add((ENGINE_ROW, name, began, now(), details))

    def start(self, micro_batch: int, **details: Any) -> Callable[[str], None]:
        """A micro-batch sets out: its first lap begins. Returns what `laps` does."""
        self._laps[micro_batch] = now()
        return self.laps(micro_batch, **details)

    def laps(self, micro_batch: int, **details: Any) -> Callable[[str], None]:
        """To be called with the name of what a micro-batch has spent the time since its last lap with."""

        def lap(name: str) -> None:
            ended = now()
            self._add((1 + micro_batch, name, self._laps[micro_batch], ended, details))
            self._laps[micro_batch] = ended

        return lap

    def flush(self) -> None:
        """Write what is in memory."""
        spans, self._spans = self._spans, []
        packed = b"".join([msgpack.packb(span) for span in spans])
        if len(packed) > self._left:
            self.dropped += len(spans)
            return
        self._left -= len(packed)
        self._file.write(packed)

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._file.close()

    def _add(self, span: Span) -> None:
        self._spans.append(span)
        if len(self._spans) >= FLUSH_SPANS:
            self.flush()


def read_spans(path: Path) -> list[Span]:
    """What a rank wrote, up to its end or to a piece that it could not finish."""
    unpacker = msgpack.Unpacker(use_list=False)
    unpacker.feed(path.read_bytes())
    return list(unpacker)
