"""What is measured on histories."""

from __future__ import annotations

import json
import math

import pytest

from tests.chaos.histories import WINDOWS, history, stream, view
from tests.chaos.history import Occurrence, read_stream

STEADY, FAULT = WINDOWS["steady"], WINDOWS["fault"]


def event(*tokens: int, finish: str | None = None) -> bytes:
    logprobs = {
        "tokens": [f"token_id:{token}" for token in tokens],
        "token_logprobs": [-0.5] * len(tokens),
        "top_logprobs": [{f"token_id:{token}": -0.5} for token in tokens],
    }
    choice = {"index": 0, "token_ids": list(tokens), "logprobs": logprobs, "finish_reason": finish}
    return json.dumps({"choices": [choice]}).encode()


def test_a_gap_belongs_to_every_phase_it_touches() -> None:
    one = stream([1.0, 2.0, 9.0, 12.0, 12.5])
    assert one.longest_gap(STEADY) == 7.0
    assert one.longest_gap(FAULT) == 3.0
    assert one.longest_gap(WINDOWS["recovered"]) == 0.0


def test_the_time_from_the_last_token_to_the_end_is_a_gap() -> None:
    assert stream([11.0, 12.0], ended=19.0, ending="error").longest_gap(FAULT) == 7.0


def test_before_the_first_token_there_is_no_gap() -> None:
    assert stream([], ended=19.0, ending="cut").longest_gap(FAULT) == 0.0
    assert stream([15.0, 15.5]).longest_gap(FAULT) == 0.5


def test_the_longest_gap_of_all_streams() -> None:
    assert history(stream([11.0, 12.0]), stream([11.0, 14.0], client=1)).longest_gap(FAULT) == 3.0


def test_the_rate_counts_the_tokens_within() -> None:
    assert history(stream([1.0, 2.0, 11.0]), stream([3.0], client=1)).rate(STEADY) == pytest.approx(0.3)


def test_silence_is_when_all_are_still() -> None:
    assert history(stream([11.0, 19.0]), stream([14.0], client=1)).silence(FAULT) == 5.0


@pytest.mark.parametrize(
    ("lines", "ending", "tokens"),
    [
        ([event(5, 6), event(7, finish="length"), b"[DONE]"], "complete", (5, 6, 7)),
        ([event(5, 6)], "cut", (5, 6)),
        ([event(5), b'{"error": {"message": "the mesh has failed"}}'], "error", (5,)),
        ([], "cut", ()),
    ],
    ids=["complete", "cut", "told", "nothing"],
)
def test_reading_a_stream(lines: list[bytes], ending: str, tokens: tuple[int, ...]) -> None:
    timed = [(10.0 + number, line) for number, line in enumerate(lines)]
    read = read_stream(timed, cut="cut", client=0, kind=0, sent=9.0, ended=20.0)
    assert read.ending == ending
    assert read.answer.tokens == tokens
    assert len(read.answer.logprobs) == len(tokens)
    assert sum(count for _, count in read.arrivals) == len(tokens)


def test_an_event_without_a_token_is_no_arrival() -> None:
    read = read_stream([(1.0, event()), (2.0, event(5))], cut="left", client=0, kind=0, sent=0.0, ended=3.0)
    assert read.arrivals == ((2.0, 1),)
    assert read.ending == "left"


def test_back_when_every_rank_is_up_in_a_life_that_was_not_ended() -> None:
    seen = history()
    seen.occurrences = [Occurrence(moment=10.0, what="SIGKILL", victims={1: 0}, ends_life=True)]
    seen.views = [
        view(9.0, ("up", 0), ("up", 0)),
        view(10.1, ("up", 0), ("up", 0)),  # nobody has noticed yet
        view(11.0, ("up", 0), ("dead", 0)),
        view(12.0, ("up", 0), ("joining", 1)),
        view(13.0, ("up", 0), ("up", 1)),
    ]
    assert seen.back_at() == 13.0
    seen.views.pop()
    assert seen.back_at() == math.inf


def test_back_after_a_stop_may_be_the_same_life() -> None:
    seen = history()
    seen.occurrences = [
        Occurrence(moment=10.0, what="SIGSTOP", victims={1: 0}),
        Occurrence(moment=15.0, what="SIGCONT", victims={1: 0}),
    ]
    seen.views = [
        view(11.0, ("up", 0), ("up", 0)),
        view(15.5, ("up", 0), ("dead", 0)),
        view(16.0, ("up", 0), ("up", 0)),
    ]
    assert seen.back_at() == 16.0


def test_a_mesh_that_does_not_answer_is_not_back() -> None:
    seen = history()
    seen.occurrences = [Occurrence(moment=10.0, what="SIGKILL to mpirun")]
    seen.views = [view(11.0)]
    assert seen.back_at() == math.inf
