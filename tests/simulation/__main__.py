"""Play seeds and tell their stories, or play as many as there is time for and tell of those that fail.

python -m tests.simulation 185 208                     # the stories of two seeds
python -m tests.simulation --soak 600 --first 10000    # ten minutes, on all cores, from that seed on
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path

from tests.simulation.run import Expected, expectations, play
from tests.simulation.scenario import draw
from tests.simulation.tiny_model import Model, write_model

CHUNK = 25


def main() -> int:
    """The exit code: 1 where anything is to be complained of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="*")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="play seeds for so long")
    parser.add_argument("--first", type=int, default=0, help="the seed to begin with")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name))
        if given.soak is not None:
            return _soak(folder, given.first, given.soak)
        model, expected = _loaded(folder)
        outcomes = [play(model, draw(seed), expected) for seed in given.seeds]
        print(*outcomes, sep="\n\n")
        return int(any(outcome.complaints for outcome in outcomes))


def _soak(folder: Path, first: int, seconds: float) -> int:
    began, failed, played = time.monotonic(), 0, 0
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chunks = _chunks(first)
        while time.monotonic() - began < seconds:
            for stories in pool.map(_play_some, [folder] * workers, islice(chunks, workers)):
                played += CHUNK
                failed += len(stories)
                print(*stories, sep="\n\n", end="\n\n" if stories else "", flush=True)
    print(f"{played} seeds from {first} on in {time.monotonic() - began:.0f} s, {failed} failed")
    return int(failed > 0)


def _chunks(first: int) -> Iterator[range]:
    for start in count(first, CHUNK):
        yield range(start, start + CHUNK)


def _play_some(folder: Path, seeds: range) -> list[str]:
    """The stories of those that fail."""
    model, expected = _loaded(folder)
    outcomes = (play(model, draw(seed), expected) for seed in seeds)
    return [str(outcome) for outcome in outcomes if outcome.complaints]


@cache
def _loaded(folder: Path) -> tuple[Model, Expected]:
    model = Model(folder)
    return model, expectations(model)


if __name__ == "__main__":
    sys.exit(main())
