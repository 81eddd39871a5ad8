"""Everything `/metrics` shows: what the gateway measures, what the controller knows, and the counters ranks report.

A rank sends cumulative counters under short keys; RANK_COUNTERS and RANK_GAUGES say which series each becomes. All
names start with `moemesh_`, in base units; one registry belongs to one mesh, so that two can live in a process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class RankSeries:
    """A series with the label `rank`, and a second one if the key a rank sends is `name:value`."""

    name: str
    help: str
    label: str | None = None


# Key in Stats.counters -> series; a labelled key carries its value behind a colon: "dispatched_tokens:12" is layer 12.
RANK_COUNTERS: Final[Mapping[str, RankSeries]] = {
    "dispatched_tokens": RankSeries(
        "moemesh_dispatched_tokens", "Tokens sent to experts of this rank, by MoE layer.", "layer"
    ),
    "dispatch_bytes": RankSeries("moemesh_dispatch_bytes", "Bytes this rank sent to the experts of other ranks."),
    "dispatch_seconds": RankSeries(
        "moemesh_dispatch_seconds", "Time from sending tokens to their experts until all answers were there."
    ),
    "expert_calls_repeated": RankSeries(
        "moemesh_expert_calls_repeated",
        "Calls sent again because an answer was late, or the rank gone or without the expert.",
        "cause",
    ),
    "expert_answers_dropped": RankSeries(
        "moemesh_expert_answers_dropped", "Answers that came after their call was over, twice, or malformed.", "cause"
    ),
    "frames_sent": RankSeries("moemesh_frames_sent", "Frames this rank posted to other ranks, by kind.", "kind"),
    "frames_refused": RankSeries(
        "moemesh_frames_refused",
        "Frames that came in vain: damaged, malformed, of a life that is over (stale), too late, or twice.",
        "cause",
    ),
    "frames_unsent": RankSeries("moemesh_frames_unsent", "Frames for ranks that were lost, dropped."),
    "bytes_sent": RankSeries("moemesh_bytes_sent", "Bytes this rank posted to other ranks."),
    "steps": RankSeries("moemesh_steps", "Forward passes that this rank took part in."),
    "computed_tokens": RankSeries(
        "moemesh_computed_tokens", "Tokens of prompts and answers that groups led by this rank computed, or again."
    ),
    "busy_seconds": RankSeries("moemesh_busy_seconds", "Time in which this rank had something to do."),
    "kernel_seconds": RankSeries("moemesh_kernel_seconds", "Time of that in which its kernels computed (CPU only)."),
    "preemptions": RankSeries("moemesh_preemptions", "Sequences that gave up their cache to others."),
    "nonfinite_logits": RankSeries(
        "moemesh_nonfinite_logits", "Sequences that ended because their logits were not finite numbers."
    ),
    "prefix_cache_queries": RankSeries(
        "moemesh_prefix_cache_queries", "Tokens of new sequences that were looked up in the prefix cache."
    ),
    "prefix_cache_hits": RankSeries(
        "moemesh_prefix_cache_hits", "Tokens of new sequences that were in the prefix cache and not computed again."
    ),
}
RANK_GAUGES: Final[Mapping[str, RankSeries]] = {
    "running": RankSeries("moemesh_running_requests", "Sequences being computed by this attention leader."),
    "waiting": RankSeries("moemesh_waiting_requests", "Sequences waiting at this attention leader."),
    "cache_blocks": RankSeries("moemesh_cache_blocks", "Latent cache blocks that this rank has."),
    "cache_blocks_used": RankSeries("moemesh_cache_used_blocks", "Latent cache blocks in use."),
    "cache_usage": RankSeries("moemesh_cache_usage_ratio", "Share of the latent cache blocks in use, 0 to 1."),
}


@dataclass
class _RankState:
    incarnation: int
    # What earlier incarnations counted: a rank that starts again counts from 0, its series must not fall.
    base: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)


class RankReports(Collector):
    """The last report of each rank, as Prometheus series."""

    def __init__(self) -> None:
        self._ranks: dict[int, _RankState] = {}

    def update(self, rank: int, counters: Mapping[str, float], *, incarnation: int = 0) -> None:
        """Takes a rank's cumulative counters and current gauges; ValueError for an unknown key."""
        for key in counters:
            _series_of(key)
        state = self._ranks.setdefault(rank, _RankState(incarnation))
        if state.incarnation != incarnation:
            for key, value in state.values.items():
                if _name_of(key) in RANK_COUNTERS:
                    state.base[key] = state.base.get(key, 0.0) + value
            state.incarnation, state.values = incarnation, {}
        state.values.update(counters)

    def rename(self, rank: int, incarnation: int) -> None:
        """The same process counts on as another incarnation."""
        if rank in self._ranks:
            self._ranks[rank].incarnation = incarnation

    def forget_gauges(self, rank: int) -> None:
        """A dead rank runs nothing and holds no cache; what it counted stays."""
        state = self._ranks.get(rank)
        if state is not None:
            state.values = {key: value for key, value in state.values.items() if _name_of(key) in RANK_COUNTERS}

    def total(self, key: str) -> float:
        """The sum over the ranks of one key, earlier incarnations included."""
        return sum(self._value(state, key) for state in self._ranks.values())

    def collect(self) -> Iterator[Metric]:
        for name, series in RANK_COUNTERS.items():
            yield self._fill(CounterMetricFamily(series.name, series.help, labels=_labels(series)), name)
        for name, series in RANK_GAUGES.items():
            yield self._fill(GaugeMetricFamily(series.name, series.help, labels=_labels(series)), name)

    def _fill(self, family: CounterMetricFamily | GaugeMetricFamily, name: str) -> Metric:
        for rank, state in sorted(self._ranks.items()):
            for key in sorted(state.values.keys() | state.base.keys()):
                if _name_of(key) == name:
                    value = key.partition(":")[2]
                    family.add_metric([str(rank), value] if value else [str(rank)], self._value(state, key))
        return family

    @staticmethod
    def _value(state: _RankState, key: str) -> float:
        return state.base.get(key, 0.0) + state.values.get(key, 0.0)


def _name_of(key: str) -> str:
    return key.partition(":")[0]


def _series_of(key: str) -> RankSeries:
    name, _, value = key.partition(":")
    series = RANK_COUNTERS.get(name) or RANK_GAUGES.get(name)
    if series is None:
        raise ValueError(f"a rank reported {key!r}, which is in neither RANK_COUNTERS nor RANK_GAUGES")
    if bool(value) != (series.label is not None):
        raise ValueError(
            f"a rank reported {key!r}: {name} has {f'the label {series.label}' if series.label else 'no label'}"
        )
    return series


def _labels(series: RankSeries) -> list[str]:
    return ["rank"] if series.label is None else ["rank", series.label]


class _WithoutCreationTimes:
    """The library adds a `_created` gauge to every counter and histogram, which nobody reads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """All series of one mesh. Attributes are prometheus_client objects; only this process writes them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ranks = RankReports()
        self.registry.register(self.ranks)
        self._add_request_series(self.registry)
        self._add_mesh_series(self.registry)

    def _add_request_series(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...] = _LATENCY_BUCKETS) -> Histogram:
            return Histogram(f"moemesh_{name}", text, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"moemesh_{name}", text, labels, registry=registry)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token, per choice."
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between consecutive outputs of tokens of one choice."
        )
        self.request_latency = histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token, per choice."
        )
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a choice.", _TOKEN_BUCKETS)
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens of a choice.", _TOKEN_BUCKETS
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of all requests, once per prompt.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated for clients.")
        self.requests = counter(
            "requests", "Choices that ended, by outcome: stop, length, cancelled, or the kind of error.", ("outcome",)
        )
        self.http_requests = counter(
            "http_requests", "HTTP requests answered, by route, method and status.", ("path", "method", "status")
        )
        self.open_requests = Gauge("moemesh_open_requests", "Choices now open at the gateway.", registry=registry)

    def _add_mesh_series(self, registry: CollectorRegistry) -> None:
        self.replay_mismatch = Counter(
            "moemesh_replay_mismatch",
            "Replayed tokens that differed from what had been sent; none was sent.",
            registry=registry,
        )
        self.epoch = Gauge("moemesh_membership_epoch", "Number of the membership view in force.", registry=registry)
        self.transitions = Counter(
            "moemesh_rank_transitions",
            "Changes of a rank's state, by the new one: up, suspect, dead or joining.",
            ("rank", "state"),
            registry=registry,
        )
        self.slow_ranks = Counter(
            "moemesh_slow_ranks_given_up",
            "Ranks given up because they were slow, by rank.",
            ("rank",),
            registry=registry,
        )
        self.respawns = Counter(
            "moemesh_rank_respawns",
            "Processes that were to be started in the place of a lost one.",
            ("rank",),
            registry=registry,
        )
        self.restarts = Counter(
            "moemesh_request_restarts",
            "Requests that were given to an attention group again, with their tokens so far.",
            registry=registry,
        )
        self.stale_messages = Counter(
            "moemesh_stale_messages", "Messages of lives of ranks that are over; none was believed.", registry=registry
        )
        self.experts_missing = Gauge(
            "moemesh_experts_missing", "Experts that no living rank hosts, over all layers.", registry=registry
        )
        self.experts_taken_over = Counter(
            "moemesh_experts_taken_over",
            "Experts loaded by a rank because no other had them.",
            ("rank",),
            registry=registry,
        )
        self.experts_refused = Counter(
            "moemesh_experts_refused",
            "Experts that a rank was to take over and could not load.",
            ("rank",),
            registry=registry,
        )
        self._rank_up = Gauge("moemesh_rank_up", "1 while the rank serves, else 0.", ("rank",), registry=registry)

    def set_rank_up(self, rank: int, up: bool) -> None:
        """Whether a rank serves; a rank that does not has no running sequences and no cache."""
        self._rank_up.labels(str(rank)).set(up)
        if not up:
            self.ranks.forget_gauges(rank)

    def render(self) -> bytes:
        """The text exposition format, of CONTENT_TYPE."""
        return generate_latest(_WithoutCreationTimes(self.registry))
