"""What clients saw, in numbers: from the times of streamed tokens to the statistics of `vllm bench serve`.

TTFT: from sending a request to its first streamed token. ITL: the gaps between streamed tokens, of all requests
together. TPOT: (end to end - TTFT) / (tokens - 1), one figure for each request of two tokens or more. Times are seconds
on one clock; statistics are milliseconds, percentiles interpolated linearly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RequestTrace:
    """One request as its client saw it: when it was sent, when each event with a token came, what `usage` said.

    `error` says why it did not succeed.
    """

    sent: float
    arrivals: tuple[float, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def latency(self) -> float:
        """End to end: up to the last token."""
        return self.arrivals[-1] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """None for a single token, behind which there is no time to divide."""
        return None if self.output_tokens < 2 else (self.latency - self.ttft) / (self.output_tokens - 1)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Statistics of one kind of latency in milliseconds; all zero where there was nothing to measure."""

    mean: float
    median: float
    std: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread:
        values = np.fromiter(seconds, dtype=np.float64) * 1000
        if not values.size:
            return cls(mean=0.0, median=0.0, std=0.0, p99=0.0)
        return cls(
            mean=float(values.mean()),
            median=float(np.median(values)),
            std=float(values.std()),
            p99=float(np.percentile(values, 99)),
        )


@dataclass(frozen=True, kw_only=True)
class ServeStatistics:
    """All requests of a run of `duration` seconds; failed ones count in nothing but `failed` and `errors`."""

    duration: float
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    peak_output_per_s: float
    peak_concurrency: int
    ttft: Spread
    tpot: Spread
    itl: Spread
    errors: tuple[str, ...] = field(default=())

    @property
    def request_throughput(self) -> float:
        return self.completed / self.duration

    @property
    def output_throughput(self) -> float:
        return self.output_tokens / self.duration

    @property
    def total_throughput(self) -> float:
        return (self.input_tokens + self.output_tokens) / self.duration


def summarize(traces: Sequence[RequestTrace], duration: float) -> ServeStatistics:
    """The statistics of a run that took `duration` seconds from the first request to the last answer."""
    good = [trace for trace in traces if trace.error is None]
    tpots = (trace.tpot for trace in good)
    return ServeStatistics(
        duration=duration,
        completed=len(good),
        failed=len(traces) - len(good),
        input_tokens=sum(trace.input_tokens for trace in good),
        output_tokens=sum(trace.output_tokens for trace in good),
        peak_output_per_s=peak_per_second([moment for trace in good for moment in trace.arrivals]),
        peak_concurrency=peak_concurrency([(trace.sent, trace.arrivals[-1]) for trace in good]),
        ttft=Spread.of(trace.ttft for trace in good),
        tpot=Spread.of(tpot for tpot in tpots if tpot is not None),
        itl=Spread.of(gap for trace in good for gap in trace.gaps),
        errors=tuple(trace.error for trace in traces if trace.error is not None),
    )


def peak_per_second(moments: Sequence[float]) -> float:
    """The most events in one of the whole seconds since the first."""
    if not moments:
        return 0.0
    first = min(moments)
    return float(np.bincount([math.floor(moment - first) for moment in moments]).max())


def peak_concurrency(spans: Sequence[tuple[float, float]]) -> int:
    """The most (start, end) spans that overlap; one that ends when another begins does not."""
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most
