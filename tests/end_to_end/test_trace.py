"""`--trace` on a real mesh: the file shows what the ranks did, on one line of time."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.harness import SMALL_CACHE, run_to_end

Event = dict[str, Any]


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    file = tmp_path_factory.mktemp("trace") / "trace.json"
    shape = ("--ranks", "2", "--attention-tp", "1", *SMALL_CACHE)
    done = run_to_end("generate", "--prompt", "import os", "--max-tokens", "4", "--trace", str(file), *shape)
    assert done.returncode == 0, done.stderr
    events = json.loads(Path(file).read_text())["traceEvents"]
    assert {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"} == {
        (0, "rank 0"),
        (1, "rank 1"),
    }
    return [event for event in events if event["ph"] == "X"]


def end(span: Event) -> float:
    return float(span["ts"] + span["dur"])


def test_spans_of_a_row_nest(spans: list[Event]) -> None:
    rows = {(span["pid"], span["tid"]) for span in spans}
    assert {(0, 0), (0, 1), (1, 0)} <= rows
    for row in rows:
        of_row = [span for span in spans if (span["pid"], span["tid"]) == row]
        open_spans: list[Event] = []
        for span in sorted(of_row, key=lambda span: (span["ts"], -span["dur"])):
            while open_spans and end(open_spans[-1]) <= span["ts"] + 0.001:
                open_spans.pop()
            assert not open_spans or end(span) <= end(open_spans[-1]) + 0.001, (open_spans[-1], span)
            open_spans.append(span)


def test_a_micro_batch_has_no_gaps(spans: list[Event]) -> None:
    laps = sorted((span for span in spans if (span["pid"], span["tid"]) == (0, 1)), key=lambda span: span["ts"])
    for before, after in pairwise(laps):
        assert before["args"]["step"] < after["args"]["step"] or after["ts"] == pytest.approx(end(before), abs=0.01)
    assert {lap["name"] for lap in laps} >= {
        "attention",
        "route",
        "dispatch",
        "shared expert",
        "wait for experts",
        "combine",
        "head and sampling",
    }


def test_experts_answer_between_dispatch_and_combine(spans: list[Event]) -> None:
    """Rank 0 alone has a request: all that rank 1 computes lies within calls of rank 0."""
    batches = [span for span in spans if span["pid"] == 1 and span["name"] == "experts"]
    assert batches
    calls: dict[tuple[int, int], dict[str, Event]] = {}
    for span in spans:
        if (span["pid"], span["tid"]) == (0, 1) and span["name"] in ("dispatch", "wait for experts"):
            calls.setdefault((span["args"]["step"], span["args"]["layer"]), {})[span["name"]] = span
    for batch in batches:
        assert batch["args"]["callers"] == [0]
        assert any(
            layer == batch["args"]["layer"]
            and call["dispatch"]["ts"] <= batch["ts"]
            and end(batch) <= end(call["wait for experts"])
            for (_, layer), call in calls.items()
        )
