"""Pictures from result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plot import lines_of, main, points_of


def engine_result(ranks: int, contexts: tuple[int, ...] = (128,)) -> dict[str, Any]:
    cases = [
        {
            "batch_size": size,
            "prompt_tokens": context,
            "prefill_tokens_per_s": 100.0 * ranks,
            "decode_tokens_per_s": 10.0 * size,
        }
        for size in (8, 1)
        for context in contexts
    ]
    configuration = {"model": "/models/m"}
    return {"benchmark": "bench engine", "configuration": configuration, "mesh": {"ranks": ranks}, "cases": cases}


def test_lines_along_an_axis_hold_everything_else_still() -> None:
    points = points_of(engine_result(1, (128, 512))) + points_of(engine_result(2))
    assert lines_of(points, "batch_size", "decode_tokens_per_s") == {
        "moemesh m, 128 tokens, 1 rank": [(1, 10), (8, 80)],
        "moemesh m, 512 tokens, 1 rank": [(1, 10), (8, 80)],
        "moemesh m, 128 tokens, 2 ranks": [(1, 10), (8, 80)],
    }
    assert lines_of(points, "ranks", "prefill_tokens_per_s") == {
        "moemesh m, batch 1, 128 tokens": [(1, 100), (2, 200)],
        "moemesh m, batch 8, 128 tokens": [(1, 100), (2, 200)],
    }


def test_a_comparison_has_a_line_for_each_engine_with_figures() -> None:
    summary = [
        {"name": name, "batch_size": size, "prefill_tokens_per_s": None, "decode_tokens_per_s": decode}
        for name, decode in (("a", 1.0), ("b", None))
        for size in (1, 8)
    ]
    points = points_of({"benchmark": "compare", "configuration": {"prompt_tokens": 128}, "summary": summary})
    assert lines_of(points, "batch_size", "decode_tokens_per_s") == {"a, 128 tokens": [(1, 1.0), (8, 1.0)]}


def test_another_file_is_refused() -> None:
    with pytest.raises(ValueError, match="'bench serve'"):
        points_of({"benchmark": "bench serve"})


def test_files_are_drawn_for_every_axis_that_varies(tmp_path: Path) -> None:
    files = []
    for ranks in (1, 2):
        files.append(tmp_path / f"{ranks}.json")
        files[-1].write_text(json.dumps(engine_result(ranks)))
    main([*map(str, files), "--output", str(tmp_path / "figure")])
    drawn = sorted(path.name for path in tmp_path.glob("figure*"))
    assert drawn == ["figure-batch.png", "figure-batch.svg", "figure-ranks.png", "figure-ranks.svg"]
    assert (tmp_path / "figure-batch.png").read_bytes().startswith(b"\x89PNG")
