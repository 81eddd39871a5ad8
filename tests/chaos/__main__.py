"""`python -m tests.chaos --repetitions 20 [--scenario NAME ...]`: the table, and a dated file in results/."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from moemesh.bench.machine import describe_hardware, describe_versions
from moemesh.bench.results import write_result
from tests.chaos.report import document, story, table
from tests.chaos.runner import Obstacle, References, Result, run_scenario
from tests.chaos.scenarios import IN_CI, SCENARIOS

RESULTS = Path(__file__).with_name("results")


def main(arguments: Sequence[str]) -> int:
    """0 when every repetition passed."""
    given = _parse(arguments)
    if given.list:
        print("\n".join(f"{name:32}{'CI  ' if name in IN_CI else '    '}{one.row}" for name, one in SCENARIOS.items()))
        return 0
    references = References()
    results: list[Result] = []
    obstacles: dict[str, str] = {}
    try:
        for name in given.scenario or SCENARIOS:
            try:
                for seed in range(given.seed, given.seed + given.repetitions):
                    results.append(run_scenario(SCENARIOS[name], seed, references))
                    _tell(results[-1], verbose=given.verbose)
            except Obstacle as obstacle:
                obstacles[name] = str(obstacle)
    finally:
        print(f"\n{table(results, obstacles)}\n\n{_write(given.results, results, obstacles)}")
    return 0 if results and all(result.passed for result in results) else 1


def _tell(result: Result, *, verbose: bool) -> None:
    whole = verbose or not result.passed
    print(story(result) if whole else f"{result.scenario.name}, seed {result.seed}: passed", flush=True)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=1, help="how often each scenario runs (default: 1)")
    parser.add_argument("--scenario", nargs="+", choices=list(SCENARIOS), metavar="NAME", help="only these")
    parser.add_argument("--seed", type=int, default=0, help="of the first repetition; the next ones count on")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the dated file")
    parser.add_argument("--list", action="store_true", help="show the scenarios and end")
    parser.add_argument("--verbose", action="store_true", help="the story of those that passed, too")
    return parser.parse_args(arguments)


def _write(folder: Path, results: Sequence[Result], obstacles: dict[str, str]) -> Path:
    now = datetime.now(UTC)
    folder.mkdir(exist_ok=True)
    path = folder / f"{now:%Y-%m-%d-%H%M%S}.json"
    head = {"date": now.isoformat(timespec="seconds"), "hardware": describe_hardware(), "versions": describe_versions()}
    write_result(path, head | document(results, obstacles))
    path.with_suffix(".md").write_text(table(results, obstacles) + "\n")
    return path


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing behind then, either
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
