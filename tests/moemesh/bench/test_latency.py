"""Statistics of what clients saw, against figures worked out by hand."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moemesh.bench.latency import RequestTrace, Spread, peak_concurrency, peak_per_second, summarize

FIRST = RequestTrace(sent=10.0, arrivals=(10.5, 10.6, 10.8), input_tokens=7, output_tokens=3)
SECOND = RequestTrace(sent=10.2, arrivals=(11.2, 11.3), input_tokens=5, output_tokens=2)


def test_one_request() -> None:
    assert math.isclose(FIRST.ttft, 0.5)
    assert math.isclose(FIRST.latency, 0.8)
    assert FIRST.gaps == pytest.approx([0.1, 0.2])
    assert FIRST.tpot == pytest.approx(0.15)


def test_tokens_that_come_together_count_one_by_one_in_tpot_only() -> None:
    trace = RequestTrace(sent=0.0, arrivals=(1.0, 2.0), input_tokens=1, output_tokens=5)
    assert trace.gaps == [1.0]
    assert trace.tpot == 0.25


def test_a_single_token_has_no_tpot() -> None:
    trace = RequestTrace(sent=0.0, arrivals=(1.0,), input_tokens=1, output_tokens=1)
    assert trace.tpot is None
    summary = summarize([trace], 1.0)
    assert (summary.ttft.mean, summary.tpot.mean, summary.itl.p99) == (1000.0, 0.0, 0.0)


def test_a_run_with_a_failure() -> None:
    failed = RequestTrace(sent=10.0, arrivals=(10.1,), error="status 503: full")
    summary = summarize([FIRST, failed, SECOND], 2.0)
    assert (summary.completed, summary.failed, summary.errors) == (2, 1, ("status 503: full",))
    assert (summary.input_tokens, summary.output_tokens) == (12, 5)
    assert (summary.request_throughput, summary.output_throughput, summary.total_throughput) == (1.0, 2.5, 8.5)
    assert summary.ttft.mean == pytest.approx(750)
    assert summary.tpot.mean == pytest.approx((150 + 100) / 2)
    assert summary.itl.mean == pytest.approx(400 / 3)  # over all gaps, not over requests
    assert summary.itl.median == pytest.approx(100)
    assert summary.peak_concurrency == 2
    assert summary.peak_output_per_s == 5


def test_no_request_succeeded() -> None:
    summary = summarize([RequestTrace(sent=0.0, error="refused")], 1.0)
    assert (summary.completed, summary.output_throughput, summary.ttft.p99) == (0, 0.0, 0.0)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50))
def test_a_spread_is_in_milliseconds(seconds: list[float]) -> None:
    spread = Spread.of(seconds)
    assert spread.mean == pytest.approx(1000 * statistics.fmean(seconds), abs=1e-6)
    assert spread.median == pytest.approx(1000 * statistics.median(seconds), abs=1e-6)
    assert spread.median - 1e-6 <= spread.p99 <= 1000 * max(seconds) + 1e-6


def test_percentiles_lie_between_values() -> None:
    assert Spread.of([0.0, 1.0]).p99 == pytest.approx(990)


def test_peaks() -> None:
    assert peak_per_second([]) == 0
    assert peak_per_second([0.5, 0.6, 1.4, 1.6]) == 3
    assert peak_concurrency([]) == 0
    assert peak_concurrency([(0, 1), (1, 2), (0.5, 3)]) == 2
