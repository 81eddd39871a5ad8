"""The table and the stories."""

from __future__ import annotations

import json
from dataclasses import replace

from tests.chaos.histories import history, stream, view
from tests.chaos.history import History, Occurrence, Verdict
from tests.chaos.report import document, story, table
from tests.chaos.runner import Result
from tests.chaos.scenario import Scenario

SCENARIO = Scenario(name="kill-leader", row="SIGKILL a leader", flags=("--ranks", "4"))
GAP = Verdict(check="gap", passed=True, found="0.40 s", bar="<= 0.5 s", value=0.4, phase="fault")


def result(seed: int, *verdicts: Verdict, seen: History | None = None) -> Result:
    return Result(scenario=SCENARIO, seed=seed, history=seen or history(stream([1.0])), verdicts=verdicts)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]


def test_a_row_has_median_and_worst() -> None:
    found = [result(seed, replace(GAP, value=value)) for seed, value in enumerate((0.1, 0.4, 0.2))]
    assert cells(table(found, {}))[2] == ["kill-leader", "passed", "3/3", "fault gap 0.20 / 0.40 (<= 0.5 s)", ""]


def test_of_a_lower_bar_the_smallest_is_the_worst() -> None:
    rate = Verdict(check="rate", passed=True, found="", bar=">= 0.45 of steady", phase="fault")
    found = [result(seed, replace(rate, value=value)) for seed, value in enumerate((0.9, 0.5, 0.6))]
    assert "0.60 / 0.50" in table(found, {})


def test_one_failure_fails_the_row_and_names_the_check() -> None:
    late = replace(GAP, passed=False, value=0.7)
    row = cells(table([result(0, GAP), result(1, late)], {}))[2]
    assert row[1:3] == ["FAILED", "1/2"]
    assert row[4] == "fault gap (1)"


def test_a_repetition_that_could_not_be_carried_out_has_failed() -> None:
    seen = history()
    seen.problem = "AssertionError: it ended with 2"
    row = cells(table([result(0, seen=seen)], {}))[2]
    assert row[1:] == ["FAILED", "0/1", "", "not carried out (1)"]


def test_what_was_not_run_says_why() -> None:
    assert cells(table([], {"cut-link": "not permitted"}))[2] == ["cut-link", "NOT RUN", "0", "not permitted", ""]


def test_a_story_is_told_in_order() -> None:
    broken = stream([11.0, 12.0], ended=14.0, ending="error", detail="the mesh has failed: rank 2 ended")
    seen = history(broken)
    seen.occurrences = [Occurrence(moment=11.5, what="SIGKILL to rank 2 (pid 77)")]
    seen.views = [view(1.0, ("up", 0)), view(2.0, ("up", 0)), view(12.5, ("dead", 0), health=503)]
    seen.log = "ERROR: the mesh has failed"
    told = story(result(3, replace(GAP, passed=False), seen=seen))
    parts = [
        "kill-leader, seed 3: FAILED",
        "FAILED fault: gap: 0.40 s (<= 0.5 s)",
        "1.00 s  view: 0.0:up; /health 200",
        "11.50 s  SIGKILL to rank 2 (pid 77)",
        "12.50 s  view: 0.0:dead; /health 503",
        "14.00 s  the first stream breaks off; in the end 1 error (the mesh has failed: rank 2 ended)",
        "ERROR: the mesh has failed",
    ]
    assert [told.find(part) for part in parts] == sorted(told.find(part) for part in parts)
    assert all(part in told for part in parts)
    assert told.count("view: 0.0:up") == 1  # only what changes is told


def test_the_document_is_json() -> None:
    written = json.loads(json.dumps(document([result(0, GAP)], {"cut-link": "not permitted"})))
    assert written["repetitions"][0]["verdicts"][0]["value"] == 0.4
    assert written["not_run"] == {"cut-link": "not permitted"}
