"""Command lines of the benchmarks."""

from __future__ import annotations

import math
import random

import pytest

from moemesh.bench.options import BenchDispatchOptions, BenchEngineOptions, BenchServeOptions
from moemesh.bench.serve import arrival_offsets
from moemesh.cli import main
from moemesh.options import EngineOptions
from tests.moemesh.test_options import parse


def test_a_command_line_of_engine() -> None:
    options = parse(BenchEngineOptions, "folder", "--batch-sizes", "1,8", "--prompt-tokens=128,4096", "--ranks", "2")
    assert (options.batch_sizes, options.prompt_tokens, options.output_tokens) == ((1, 8), (128, 4096), 64)
    assert options.engine_options() == EngineOptions(model="folder", ranks=2, max_num_batched_tokens=4096)


def test_rates() -> None:
    assert parse(BenchServeOptions, "--request-rate", "inf").request_rate == math.inf
    assert parse(BenchServeOptions, "--request-rate", "0.5").request_rate == 0.5


def test_links() -> None:
    assert parse(BenchDispatchOptions, "--links", "local", "--ranks", "2,16").links == ("local",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "the following arguments are required: BENCHMARK (try `moemesh bench --help`)"),
        (["bench", "engine", "--batch-sizes", "0"], "--batch-sizes: expected a whole number from 1"),
        (["bench", "engine", "--batch-sizes", ","], "--batch-sizes: expected numbers such as 1,8,32"),
        (["bench", "engine", "--batch-sizes", "300"], "a step takes --max-num-seqs 256: raise that to 300"),
        (["bench", "serve", "--request-rate", "0"], "--request-rate: expected a positive number or inf"),
        (["bench", "dispatch", "--ranks", "1,2"], "--ranks 1: an exchange takes at least 2 ranks"),
    ],
)
def test_what_is_not_understood(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_is_said_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--prompt-tokens", "4096", "--batch-sizes", "1"]) == 1
    assert "above max-model-len 2048: lower --prompt-tokens" in capsys.readouterr().err
    assert main(["bench", "engine", "--num-gpu-blocks-override", "4", "--batch-sizes", "2"]) == 1
    assert "leave room for 64 tokens in each of 2 sequences" in capsys.readouterr().err


def test_arrivals_keep_the_rate() -> None:
    assert arrival_offsets(3, math.inf, random.Random(0)) == [0.0, 0.0, 0.0]
    offsets = arrival_offsets(200, 50.0, random.Random(0))
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert 3.5 < offsets[-1] < 4.0
