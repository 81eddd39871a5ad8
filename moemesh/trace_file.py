"""`--trace FILE`: the spans of all ranks in one file, in the trace-event format that Perfetto and Chrome open.

Each rank appends to a file of its own in the run directory; when the mesh has ended the frontend makes one of them. A
rank is a process of the trace, its rows are threads. Times are microseconds since the first span of all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from moemesh.run_directory import RunDirectory
from transport.trace import ENGINE_ROW, Span, read_spans

logger = logging.getLogger(__name__)


def save_trace(run: RunDirectory) -> None:
    """Once its ranks have ended: merge what they wrote, if they did, into the file that the options of the run name."""
    ranks = {rank: read_spans(path) for rank, path in run.traces().items()}
    file = run.read_options().trace if ranks else None
    if file is None:
        return
    try:
        with Path(file).open("w") as output:
            write_events(ranks, output)
    except OSError as error:
        logger.error("the trace is lost: %s cannot be written: %s", file, error)
        return
    logger.info("wrote %s: open it in https://ui.perfetto.dev or chrome://tracing", file)


def write_events(ranks: dict[int, list[Span]], output: TextIO) -> None:
    """One JSON object, an event a line."""
    first = min((span[2][0] for spans in ranks.values() for span in spans), default=0)
    output.write('{"displayTimeUnit": "ms", "traceEvents": [')
    separator = "\n"
    for rank, spans in ranks.items():
        for event in (*_names(rank, spans), *_events(rank, spans, first)):
            output.write(separator + json.dumps(event))
            separator = ",\n"
    output.write("\n]}\n")


def _names(rank: int, spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    for row in sorted({span[0] for span in spans}):
        name = "engine" if row == ENGINE_ROW else f"micro-batch {row - 1}"
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": {"name": name}}


def _events(rank: int, spans: Sequence[Span], first: int) -> Iterator[dict[str, Any]]:
    for row, name, began, ended, details in spans:
        took, computed = ((ended[clock] - began[clock]) / 1000 for clock in range(2))
        times = {"ts": (began[0] - first) / 1000, "dur": took, "tdur": computed}
        yield {"ph": "X", "name": name, "pid": rank, "tid": row, **times, "args": details}
