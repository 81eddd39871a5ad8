from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moemesh.metrics import Metrics


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(metrics.render().decode()):
        for item in family.samples:
            if item.name == name and item.labels == labels:
                return item.value
    return None


def filled() -> Metrics:
    metrics = Metrics()
    metrics.set_rank_up(0, True)
    metrics.epoch.set(3)
    metrics.requests.labels("stop").inc()
    metrics.http_requests.labels("/v1/models", "GET", "200").inc()
    metrics.time_to_first_token.observe(0.1)
    metrics.ranks.update(
        0, {"dispatched_tokens:3": 40, "dispatch_bytes": 9, "frames_sent:DISPATCH": 2, "running": 1, "cache_usage": 0.5}
    )
    return metrics


def test_all_names_are_ours_and_lint_clean() -> None:
    """What promtool checks: help, no colon, _total on counters alone, base units."""
    families = list(text_string_to_metric_families(filled().render().decode()))
    assert len(families) > 15
    for family in families:
        assert family.documentation, family.name
        assert re.fullmatch(r"moemesh_[a-z0-9_]+", family.name)
        assert not re.search(r"milli|_ms\b|_kb\b|_percent|minutes|_created", family.name)
        for item in family.samples:
            assert item.name.endswith("_total") == (family.type == "counter"), item.name
            assert not item.name.endswith("_created")


def test_two_meshes_have_their_own_series() -> None:
    one, other = Metrics(), Metrics()
    one.prompt_tokens.inc(5)
    assert sample(one, "moemesh_prompt_tokens_total") == 5
    assert sample(other, "moemesh_prompt_tokens_total") == 0


def test_a_ranks_counters_and_gauges() -> None:
    metrics = filled()
    assert sample(metrics, "moemesh_dispatched_tokens_total", rank="0", layer="3") == 40
    assert sample(metrics, "moemesh_frames_sent_total", rank="0", kind="DISPATCH") == 2
    assert sample(metrics, "moemesh_running_requests", rank="0") == 1
    metrics.ranks.update(0, {"dispatched_tokens:3": 50, "running": 0})
    assert sample(metrics, "moemesh_dispatched_tokens_total", rank="0", layer="3") == 50
    assert sample(metrics, "moemesh_running_requests", rank="0") == 0


def test_counters_do_not_fall_when_a_rank_starts_again() -> None:
    metrics = filled()
    metrics.ranks.update(0, {"dispatched_tokens:3": 1}, incarnation=1)
    metrics.ranks.update(0, {"dispatched_tokens:3": 2}, incarnation=2)
    assert sample(metrics, "moemesh_dispatched_tokens_total", rank="0", layer="3") == 43
    assert sample(metrics, "moemesh_dispatch_bytes_total", rank="0") == 9
    assert sample(metrics, "moemesh_running_requests", rank="0") is None
    assert metrics.ranks.total("dispatched_tokens:3") == 43


def test_a_dead_rank_runs_nothing_but_keeps_its_counts() -> None:
    metrics = filled()
    metrics.set_rank_up(0, False)
    metrics.set_rank_up(7, False)
    assert sample(metrics, "moemesh_rank_up", rank="0") == 0
    assert sample(metrics, "moemesh_running_requests", rank="0") is None
    assert sample(metrics, "moemesh_dispatch_bytes_total", rank="0") == 9


@pytest.mark.parametrize("key", ["nonsense", "dispatch_bytes:3", "frames_sent", "frames_sent:"])
def test_a_key_that_is_no_series_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Metrics().ranks.update(0, {key: 1})
