"""Results as a table for people, a document for machines, and the story of each repetition that failed."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tests.chaos.checks import describe_endings
from tests.chaos.history import History, Verdict, ViewSample
from tests.chaos.runner import Result
from tests.chaos.scenario import Scenario

HEADER = ("scenario", "result", "repetitions", "figures: median / worst (bar)", "failed checks")
STORY_LINES = 40


def table(results: Sequence[Result], obstacles: Mapping[str, str]) -> str:
    """One line for each scenario, in Markdown."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.scenario.name, []).append(result)
    rows = [_row(name, repetitions) for name, repetitions in by_name.items()]
    rows += [(name, "NOT RUN", "0", reason, "") for name, reason in obstacles.items()]
    widths = [max(len(row[column]) for row in (HEADER, *rows)) for column in range(len(HEADER))]
    rule = tuple("-" * width for width in widths)
    return "\n".join(_line(row, widths) for row in (HEADER, rule, *rows))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"


def _row(name: str, repetitions: Sequence[Result]) -> tuple[str, ...]:
    passed = sum(result.passed for result in repetitions)
    verdict = "passed" if passed == len(repetitions) else "FAILED"
    failed: dict[str, int] = {}
    for result in repetitions:
        for label in _failed_labels(result):
            failed[label] = failed.get(label, 0) + 1
    shown = ", ".join(f"{label} ({count})" for label, count in failed.items())
    return (name, verdict, f"{passed}/{len(repetitions)}", ", ".join(_figures(repetitions)), shown)


def _failed_labels(result: Result) -> list[str]:
    if result.history.problem:
        return ["not carried out"]
    return [f"{one.phase} {one.check}" for one in result.verdicts if not one.passed]


def _figures(repetitions: Sequence[Result]) -> list[str]:
    """Median and worst of every check that has a figure and a bar. Bars that say >= are worst at the bottom."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for verdict in itertools.chain.from_iterable(result.verdicts for result in repetitions):
        if verdict.value is not None and verdict.bar:
            values.setdefault((verdict.phase, verdict.check, verdict.bar), []).append(verdict.value)
    return [
        f"{phase} {check} {statistics.median(seen):.2f} / {(min if '>=' in bar else max)(seen):.2f} ({bar})"
        for (phase, check, bar), seen in values.items()
    ]


def story(result: Result) -> str:
    """What happened in one repetition, in order; seconds count from the start of the steady phase."""
    history = result.history
    zero = min((window.start for window in history.windows.values()), default=0.0)
    lines = [f"{result.scenario.name}, seed {result.seed}: {'passed' if result.passed else 'FAILED'}"]
    lines += [f"  {_verdict(verdict)}" for verdict in result.verdicts if verdict.phase in history.windows]
    if history.problem:
        lines += ["  not carried out:", *_indented(history.problem)]
    lines += [f"  the harness itself was at most {history.lateness:.2f} s late"]
    moments = sorted(_moments(history), key=lambda moment: moment[0])
    lines += [f"  {when - zero:8.2f} s  {what}" for when, what in moments]
    lines += ["  the mesh's last words:", *_indented(history.log)] if not result.passed and history.log else []
    return "\n".join(lines)


def _verdict(verdict: Verdict) -> str:
    bar = f" ({verdict.bar})" if verdict.bar else ""
    return f"{'ok    ' if verdict.passed else 'FAILED'} {verdict.phase}: {verdict.check}: {verdict.found}{bar}"


def _indented(text: str) -> list[str]:
    return [f"      {line}" for line in text.strip().splitlines()[-STORY_LINES:]]


def _moments(history: History) -> list[tuple[float, str]]:
    found = [(window.start, f"--- {phase}") for phase, window in history.windows.items()]
    found += [(event.moment, event.what) for event in history.occurrences]
    found += _changes_of_view(history.views)
    broken = [stream for stream in history.streams if stream.ending != "complete"]
    if broken:
        first = min(broken, key=lambda stream: stream.ended)
        found.append((first.ended, f"the first stream breaks off; in the end {describe_endings(history.streams)}"))
    return found


def _changes_of_view(views: Sequence[ViewSample]) -> list[tuple[float, str]]:
    changes = []
    before = None
    for sample in views:
        now = _describe_view(sample)
        if now != before:
            changes.append((sample.moment, now))
        before = now
    return changes


def _describe_view(sample: ViewSample) -> str:
    if not sample.reachable:
        return "view: nobody answers"
    ranks = " ".join(f"{rank}.{seen.incarnation}:{seen.state}" for rank, seen in sorted(sample.ranks.items()))
    return f"view: {ranks}; /health {sample.health}"


def document(results: Sequence[Result], obstacles: Mapping[str, str]) -> dict[str, Any]:
    """Everything that was found, for a file; of the streams only how they ended."""
    return {
        "table": table(results, obstacles).splitlines(),
        "not_run": dict(obstacles),
        "repetitions": [_repetition(result) for result in results],
    }


def _repetition(result: Result) -> dict[str, Any]:
    history = result.history
    return {
        "scenario": _scenario(result.scenario),
        "seed": result.seed,
        "passed": result.passed,
        "verdicts": [dataclasses.asdict(verdict) for verdict in result.verdicts],
        "problem": history.problem,
        "streams": describe_endings(history.streams),
        "resources": {phase: dataclasses.asdict(held) for phase, held in history.resources.items()},
        "story": story(result).splitlines(),
    }


def _scenario(scenario: Scenario) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "row": scenario.row,
        "flags": list(scenario.flags),
        "events": [str(event) for event in scenario.events],
    }
