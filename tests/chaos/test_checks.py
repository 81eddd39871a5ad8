"""Each check passes what it must and fails what it must."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.chaos import checks
from tests.chaos.histories import WINDOWS, history, stream, view
from tests.chaos.history import Answer, History, MeshEnd, Occurrence, Refusal, Resources

FAULT = WINDOWS["fault"]
WELL = stream([11.0, 12.0, 13.0, 14.0])
OTHER = stream([11.0, 12.0, 13.0, 14.0], client=1)
BROKEN = stream([11.0, 12.0], client=1, ended=19.0, ending="error", detail="the mesh has failed")
HELD = Resources(
    frontend_rss=100 << 20,
    ranks_rss=1000 << 20,
    frontend_descriptors=40,
    ranks_descriptors=200,
    shared_memory=64 << 20,
    run_files=20,
    num_processes=7,
)


def passes(check: checks.Check, seen: History) -> bool:
    return check.judge(seen, FAULT).passed


def struck(*streams: object, at: float = 10.0) -> History:
    seen = history(*streams)  # type: ignore[arg-type]
    seen.occurrences = [Occurrence(moment=at, what="SIGKILL", victims={1: 0}, ends_life=True)]
    return seen


def test_complete() -> None:
    assert passes(checks.Complete(), history(WELL, OTHER))
    assert not passes(checks.Complete(), history())
    verdict = checks.Complete().judge(history(WELL, BROKEN), FAULT)
    assert not verdict.passed
    assert verdict.found == "1 error (the mesh has failed)"


def test_who_is_refused_was_not_admitted() -> None:
    seen = history(WELL, stream([], client=1, ended=11.0, ending="refused", retry_after=1.0))
    assert not passes(checks.Complete(), seen)
    assert passes(checks.Complete(refused=True), seen)
    assert not passes(checks.Complete(refused=True), history(WELL, BROKEN))


def test_identical_as_far_as_a_stream_got() -> None:
    assert passes(checks.Identical(), history(WELL, OTHER, BROKEN))
    assert not passes(checks.Identical(), history())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(tokens=(5, 6, 1, 8), logprobs=(-0.5, -0.25, -1.0, -2.0)), "token 2 is 1 instead of 7"),
        (Answer(tokens=(5, 6, 7), logprobs=(-0.5, -0.25, -1.0)), "3 tokens instead of 4"),
        (Answer(tokens=(5, 6, 7, 8), logprobs=(-0.5, -0.25, -1.5, -2.0)), "log-probability 2 is -1.5 instead of -1.0"),
        (Answer(tokens=(5, 6, 7, 8), logprobs=(-0.5,)), "1 log-probabilities instead of 4"),
        (Answer(tokens=(5, 6, 7, 8, 8), logprobs=(-0.5, -0.25, -1.0, -2.0, -2.0)), "5 tokens instead of 4"),
    ],
    ids=["token", "short", "log-probability", "too few log-probabilities", "a token twice"],
)
def test_identical_finds(answer: Answer, words: str) -> None:
    verdict = checks.Identical().judge(history(OTHER, replace(WELL, answer=answer)), FAULT)
    assert not verdict.passed
    assert verdict.found == f"client 0, request 0: {words}"


def test_what_the_crowd_got_is_compared_too() -> None:
    seen = history(WELL)
    seen.crowd = [replace(OTHER, answer=Answer(tokens=(1, 2, 3, 4)))]
    assert not passes(checks.Identical(), seen)


def test_longest_gap() -> None:
    assert passes(checks.LongestGap(1.0), history(WELL, OTHER))
    assert not passes(checks.LongestGap(6.9), history(WELL, BROKEN))
    assert not passes(checks.LongestGap(1.0), history(stream([1.0])))  # nobody had any token: no proof


def test_flowing() -> None:
    assert passes(checks.Flowing(), history(WELL, OTHER))
    verdict = checks.Flowing().judge(history(WELL, stream([9.0], client=1)), FAULT)
    assert not verdict.passed
    assert "none for 1 of 2 clients" in verdict.found


def test_never_still() -> None:
    assert passes(checks.NeverStill(6.0), history(WELL, OTHER))
    assert not passes(checks.NeverStill(5.0), history(WELL, OTHER))


def test_undisturbed() -> None:
    seen = history(WELL, BROKEN)
    assert passes(checks.Undisturbed(share=0.5, seconds=1.0), seen)
    assert not passes(checks.Undisturbed(share=0.6, seconds=1.0), seen)


def test_whole_again() -> None:
    seen = struck(WELL)
    seen.views = [view(11.0, ("up", 0), ("dead", 0)), view(15.0, ("up", 0), ("up", 1))]
    assert passes(checks.WholeAgain(5.0), seen)
    assert not passes(checks.WholeAgain(4.0), seen)
    seen.views.pop()
    assert checks.WholeAgain(5.0).judge(seen, FAULT).found == "never"


def test_degraded_and_saying_so() -> None:
    seen = struck(WELL)
    assert not passes(checks.Degraded(), seen)
    seen.views = [view(11.0, ("up", 0), ("dead", 0), body='{"degraded": true}')]
    assert passes(checks.Degraded(), seen)
    seen.views.append(view(12.0, ("up", 0), ("dead", 0), body='{"degraded": false}'))
    assert not passes(checks.Degraded(), seen)
    seen.views.append(view(13.0))
    assert not passes(checks.Degraded(), seen)


def test_crippled_and_saying_so() -> None:
    seen = struck(WELL)
    assert not passes(checks.Crippled(), seen)
    seen.views = [replace(view(11.0, ("up", 0), ("dead", 0), body='{"degraded": true}'), health=503)]
    assert passes(checks.Crippled(), seen)
    seen.views.append(view(12.0, ("up", 0), ("dead", 0), body='{"degraded": true}'))
    assert not passes(checks.Crippled(), seen)
    seen.views.append(view(13.0))
    assert not passes(checks.Crippled(), seen)


def test_rate_against_the_steady_phase() -> None:
    seen = history(stream([1.0, 2.0, 11.0]))
    assert passes(checks.Rate(0.5), seen)
    assert not passes(checks.Rate(0.51), seen)


def test_rate_of_a_rival() -> None:
    seen = history()
    seen.rates = {"mesh": [96.0, 485.0, 500.0], "rival": [100.0, 500.0, 1.0]}
    assert passes(checks.RateOfRival(0.97), seen)
    assert not passes(checks.RateOfRival(0.98), seen)
    assert not passes(checks.RateOfRival(0.97), history())


def test_told() -> None:
    assert passes(checks.Told(10.0), struck(WELL, BROKEN))
    assert not passes(checks.Told(8.0), struck(WELL, BROKEN))
    assert not passes(checks.Told(10.0), struck(WELL, replace(BROKEN, ending="silent")))


def test_nothing_left() -> None:
    seen = history(WELL)
    assert not passes(checks.NothingLeft(10), seen)
    seen.end = MeshEnd(exit_code=0, left=(), seconds=2.0)
    assert passes(checks.NothingLeft(10), seen)
    seen.end = MeshEnd(exit_code=0, left=("psutil.Process(pid=7)",), seconds=2.0)
    verdict = checks.NothingLeft(10).judge(seen, FAULT)
    assert not verdict.passed
    assert "pid=7" in verdict.found


@pytest.mark.parametrize(("code", "zero", "passed"), [(0, True, True), (1, True, False), (-9, False, True)])
def test_exit_code(code: int, zero: bool, passed: bool) -> None:
    seen = history(WELL)
    seen.end = MeshEnd(exit_code=code, left=(), seconds=2.0)
    assert passes(checks.EndsWith(zero=zero), seen) == passed


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"ranks_rss": 1100 << 20}, True),
        ({"ranks_rss": 1200 << 20}, False),
        ({"ranks_descriptors": 208}, True),
        ({"ranks_descriptors": 209}, False),
        ({"shared_memory": (64 << 20) + 1}, False),
        ({"shared_memory": 0}, True),
        ({"num_processes": 8}, False),
    ],
)
def test_resources(change: dict[str, int], passed: bool) -> None:
    seen = history(WELL)
    seen.resources = {"steady": HELD, "recovered": replace(HELD, **change)}
    assert passes(checks.FlatResources(), seen) == passed


def test_resources_of_a_mesh_that_was_gone() -> None:
    assert not passes(checks.FlatResources(), history(WELL))


def test_a_crowd_is_refused_with_retry_after() -> None:
    seen = history(WELL)
    refused = stream([], client=1, ended=11.0, ending="refused", retry_after=1.0)
    seen.crowd = [OTHER, refused]
    assert passes(checks.CrowdRefused(), seen)
    seen.crowd = [OTHER]
    assert not passes(checks.CrowdRefused(), seen)  # all were taken: no overload
    seen.crowd = [OTHER, replace(refused, retry_after=None)]
    assert not passes(checks.CrowdRefused(), seen)
    seen.crowd = [OTHER, refused, BROKEN]
    assert not passes(checks.CrowdRefused(), seen)


@pytest.mark.parametrize(
    ("said", "code", "passed"),
    [
        ("error: model.safetensors: is truncated", 1, True),
        ("error: model.safetensors: is odd", 1, False),
        ("model.safetensors is truncated, never mind", 0, False),
    ],
)
def test_refused_by_name(said: str, code: int, passed: bool) -> None:
    seen = history(WELL)
    seen.refusals = [Refusal(words=("model.safetensors", "truncated"), said=said, exit_code=code)]
    assert passes(checks.RefusedByName(), seen) == passed


def test_a_phase_that_was_not_reached_fails_its_checks() -> None:
    seen = history(WELL)
    del seen.windows["recovered"]
    first, second = checks.judge_all([("fault", checks.Complete()), ("recovered", checks.Complete())], seen)
    assert first.passed
    assert first.phase == "fault"
    assert not second.passed
    assert "never reached" in second.found
