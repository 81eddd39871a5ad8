"""The result of `moemesh bench serve` as `vllm bench serve` shows and writes it: same lines, same order, same keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moemesh.bench.latency import RequestTrace, ServeStatistics, Spread
from moemesh.bench.options import BenchServeOptions

_WIDTH = 50

_SPREADS = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
)


def result_block(options: BenchServeOptions, statistics: ServeStatistics) -> str:
    """The text block."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
    lines += [_line("Successful requests:", statistics.completed), _line("Failed requests:", statistics.failed)]
    if options.max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", options.max_concurrency))
    if not math.isinf(options.request_rate):
        lines.append(_line("Request rate configured (RPS):", options.request_rate))
    lines += [
        _line("Benchmark duration (s):", statistics.duration),
        _line("Total input tokens:", statistics.input_tokens),
        _line("Total generated tokens:", statistics.output_tokens),
        _line("Request throughput (req/s):", statistics.request_throughput),
        _line("Output token throughput (tok/s):", statistics.output_throughput),
        _line("Peak output token throughput (tok/s):", statistics.peak_output_per_s),
        _line("Peak concurrent requests:", float(statistics.peak_concurrency)),
        _line("Total token throughput (tok/s):", statistics.total_throughput),
    ]
    for attribute, name, title in _SPREADS:
        spread: Spread = getattr(statistics, attribute)
        lines.append(f"{title:-^{_WIDTH}}")
        lines += [
            _line(f"Mean {name} (ms):", spread.mean),
            _line(f"Median {name} (ms):", spread.median),
            _line(f"P99 {name} (ms):", spread.p99),
        ]
    return "\n".join((*lines, "=" * _WIDTH))


def result_fields(
    options: BenchServeOptions, model: str, statistics: ServeStatistics, traces: Sequence[RequestTrace]
) -> dict[str, Any]:
    """The keys of vLLM's JSON, with every request's times."""
    fields: dict[str, Any] = {
        "endpoint_type": "openai",
        "model_id": model,
        "num_prompts": options.num_prompts,
        "request_rate": options.request_rate,
        "max_concurrency": options.max_concurrency,
        "duration": statistics.duration,
        "completed": statistics.completed,
        "failed": statistics.failed,
        "total_input_tokens": statistics.input_tokens,
        "total_output_tokens": statistics.output_tokens,
        "request_throughput": statistics.request_throughput,
        "output_throughput": statistics.output_throughput,
        "total_token_throughput": statistics.total_throughput,
        "max_output_tokens_per_s": statistics.peak_output_per_s,
        "max_concurrent_requests": statistics.peak_concurrency,
    }
    for attribute, _, _ in _SPREADS:
        spread: Spread = getattr(statistics, attribute)
        for kind in ("mean", "median", "std", "p99"):
            fields[f"{kind}_{attribute}_ms"] = getattr(spread, kind)
    return fields | {
        "input_lens": [trace.input_tokens for trace in traces],
        "output_lens": [trace.output_tokens for trace in traces],
        "ttfts": [trace.ttft if trace.arrivals else None for trace in traces],
        "itls": [trace.gaps for trace in traces],
        "errors": [trace.error or "" for trace in traces],
    }


def _line(label: str, value: float) -> str:
    """Trailing blanks are vLLM's."""
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"
