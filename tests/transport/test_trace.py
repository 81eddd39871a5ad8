"""Spans of a rank: what is written is what was spanned, and no more than is allowed."""

from __future__ import annotations

from pathlib import Path

from transport.trace import ENGINE_ROW, Trace, now, read_spans


def test_spans_and_laps_come_back(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.0")
    before = now()
    trace.start(1)
    lap = trace.laps(1, layer=3)
    lap("gather")
    lap("attend")
    trace.span("experts", before, layer=3, callers=[0, 2])
    trace.close()
    gather, attend, experts = read_spans(tmp_path / "trace.0")
    assert (gather[:2], attend[:2]) == ((2, "gather"), (2, "attend"))
    assert before <= gather[2] <= gather[3] == attend[2] <= attend[3]
    assert gather[4] == attend[4] == {"layer": 3}
    assert experts[:3] == (ENGINE_ROW, "experts", before)
    assert experts[4] == {"layer": 3, "callers": (0, 2)}
    assert trace.dropped == 0


def test_what_is_too_much_is_counted(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.0", max_bytes=10)
    for _ in range(2):
        trace.span("step", now())
        trace.flush()
    trace.close()
    assert read_spans(tmp_path / "trace.0") == []
    assert trace.dropped == 2


def test_a_rank_that_died_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "trace.0"
    trace = Trace(path)
    trace.span("step", now())
    trace.span("step", now())
    trace.close()
    path.write_bytes(path.read_bytes()[:-1])
    assert len(read_spans(path)) == 1
