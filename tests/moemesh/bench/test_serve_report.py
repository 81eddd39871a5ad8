"""The block and the JSON of `moemesh bench serve` have vLLM's lines and keys."""

from __future__ import annotations

import json
from pathlib import Path

from moemesh.bench.latency import RequestTrace, summarize
from moemesh.bench.options import BenchServeOptions
from moemesh.bench.results import result_document, write_result
from moemesh.bench.serve_report import result_block, result_fields

TRACES = [
    RequestTrace(sent=0.0, arrivals=(0.5, 0.75, 1.0), input_tokens=4, output_tokens=3),
    RequestTrace(sent=0.0, error="refused"),
]

BLOCK = """\
============ Serving Benchmark Result ============
Successful requests:                     1
Failed requests:                         1
Maximum request concurrency:             8
Request rate configured (RPS):           2.50
Benchmark duration (s):                  2.00
Total input tokens:                      4
Total generated tokens:                  3
Request throughput (req/s):              0.50
Output token throughput (tok/s):         1.50
Peak output token throughput (tok/s):    3.00
Peak concurrent requests:                1.00
Total token throughput (tok/s):          3.50
---------------Time to First Token----------------
Mean TTFT (ms):                          500.00
Median TTFT (ms):                        500.00
P99 TTFT (ms):                           500.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          250.00
Median TPOT (ms):                        250.00
P99 TPOT (ms):                           250.00
---------------Inter-token Latency----------------
Mean ITL (ms):                           250.00
Median ITL (ms):                         250.00
P99 ITL (ms):                            250.00
=================================================="""


def test_the_block() -> None:
    options = BenchServeOptions(max_concurrency=8, request_rate=2.5)
    shown = result_block(options, summarize(TRACES, 2.0)).splitlines()
    assert [line.rstrip() for line in shown] == BLOCK.splitlines()


def test_limits_that_were_not_set_have_no_line() -> None:
    shown = result_block(BenchServeOptions(), summarize(TRACES, 2.0))
    assert "Maximum request concurrency" not in shown
    assert "Request rate configured" not in shown


def test_the_json_has_no_key_and_no_infinity(tmp_path: Path) -> None:
    options = BenchServeOptions(api_key="secret")
    path = tmp_path / "result.json"
    write_result(path, result_document(options, result_fields(options, "m", summarize(TRACES, 2.0), TRACES)))
    text = path.read_text()
    assert "secret" not in text
    result = json.loads(text)
    assert result["benchmark"] == "bench serve"
    assert (result["request_rate"], result["completed"], result["p99_itl_ms"]) == ("inf", 1, 250.0)
    assert result["itls"] == [[0.25, 0.25], []]
    assert {"date", "hardware", "versions", "configuration", "mean_ttft_ms", "median_tpot_ms"} <= result.keys()
