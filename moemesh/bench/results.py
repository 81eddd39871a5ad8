"""The file a benchmark leaves: when, on what, with what, and the figures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moemesh.flags import Options

_SECRET = ("api_key",)


def result_document(options: Options, figures: Mapping[str, Any]) -> dict[str, Any]:
    """`figures` with the date, the machine, the versions and the options they were measured with."""
    # Not at the top: it loads torch, and a client of an endpoint needs the processor for other things.
    from moemesh.bench.machine import describe_hardware, describe_versions

    given = dataclasses.asdict(options)
    return {
        "benchmark": options.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "versions": describe_versions(),
        "configuration": {name: value for name, value in given.items() if name not in _SECRET},
        **figures,
    }


def write_result(path: str | Path, document: Mapping[str, Any]) -> None:
    """As JSON, replacing what was there. An infinite number is written as the text "inf", as vLLM does."""
    Path(path).write_text(json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns aligned to the right under their names."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *rows))
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value
