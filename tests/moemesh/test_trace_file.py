"""What the ranks wrote becomes one file that Perfetto and Chrome open."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moemesh.options import EngineOptions
from moemesh.run_directory import RunDirectory
from moemesh.trace_file import save_trace
from transport.trace import Trace, now


@pytest.fixture
def run() -> Iterator[RunDirectory]:
    run = RunDirectory.create(num_ranks=2)
    yield run
    run.remove()


def write_spans(run: RunDirectory, rank: int) -> None:
    trace = Trace(run.trace(rank))
    began = now()
    trace.start(0)
    trace.laps(0, layer=1)("attend")
    trace.span("step", began, step=4)
    trace.close()


def test_a_row_for_each_rank(run: RunDirectory, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    run.write_options(EngineOptions(ranks=2, trace=str(file)))
    for rank in (1, 0):
        write_spans(run, rank)
    save_trace(run)
    events = json.loads(file.read_text())["traceEvents"]
    names = [(event["pid"], event["args"]["name"]) for event in events if event["name"] == "process_name"]
    assert names == [(0, "rank 0"), (1, "rank 1")]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(span["pid"], span["tid"], span["name"]) for span in spans] == [
        (rank, row, name) for rank in (0, 1) for row, name in ((1, "attend"), (0, "step"))
    ]
    assert min(span["ts"] for span in spans) == 0
    assert spans[0]["args"] == {"layer": 1}
    assert all(0 <= span["dur"] < 60e6 and span["tdur"] >= 0 for span in spans)


def test_without_the_flag_there_is_none(run: RunDirectory) -> None:
    save_trace(run)


def test_a_place_that_cannot_be_written(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run.write_options(EngineOptions(trace=folder))
        write_spans(run, 0)
        save_trace(run)
    assert "cannot be written" in caplog.text
