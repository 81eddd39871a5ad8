"""Each benchmark once, really, on the demo model or a served fake."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from moemesh.cli import main
from tests.moemesh.gateway.serving import run, serve


def test_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "engine.json"
    sizes = ("--batch-sizes", "1,2", "--prompt-tokens", "8", "--output-tokens", "4", "--threads", "1")
    assert main(["bench", "engine", *sizes, "--max-model-len", "512", "--save-result", str(path)]) == 0
    assert "decode tok/s" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["mesh"]["threads_per_rank"] == 1
    one, two = result["cases"]
    assert (one["batch_size"], two["batch_size"]) == (1, 2)
    for case in (one, two):
        assert case["prefill_tokens_per_s"] > 0
        assert case["decode_tokens_per_s"] > 0
        assert case["decode_share_of_read"] > 0  # of three steps, whose tokens may arrive at once on a busy machine
        assert 0 < case["step_overhead_seconds"] < 1
    assert one["touched_experts"] == pytest.approx(3 * 8)  # observed: eight experts in each of three layers
    assert two["decode_bytes_per_step"] > one["decode_bytes_per_step"]


def test_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "serve.json"

    async def bench() -> None:
        async with serve() as served:
            command = ["bench", "serve", "--base-url", served.url, "--num-prompts", "5", "--max-concurrency", "2"]
            lengths = ["--random-input-len", "6", "--random-output-len", "4", "--vocab-size", "200"]
            saving = ["--save-result", "--result-filename", str(path)]
            assert await asyncio.to_thread(main, [*command, *lengths, *saving]) == 0

    run(bench())
    assert "Successful requests:                     5" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["input_lens"] == [6] * 5
    assert result["output_lens"] == [4] * 5
    assert [len(gaps) for gaps in result["itls"]] == [3] * 5


def test_serve_without_an_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:1"]) == 1
    assert "check --base-url" in capsys.readouterr().err


def test_dispatch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dispatch.json"
    command = ["bench", "dispatch", "--ranks", "2,3", "--sizes", "256,65536", "--repeats", "10"]
    assert main([*command, "--links", "local", "--save-result", str(path)]) == 0
    exchanges = json.loads(path.read_text())["exchanges"]
    assert [(e["link"], e["ranks"], e["frame_bytes"]) for e in exchanges] == [
        ("local", 2, 256), ("local", 2, 65536), ("local", 3, 256), ("local", 3, 65536),
    ]  # fmt: skip
    assert all(e["seconds"] > 0 for e in exchanges)


def test_dispatch_between_processes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mpi4py")
    assert main(["bench", "dispatch", "--links", "mpi", "--ranks", "2", "--sizes", "256", "--repeats", "10"]) == 0
    assert "mpi      2" in capsys.readouterr().out
