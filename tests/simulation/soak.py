"""As many seeds as there is time for, on all cores."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path

from tests.simulation.run import Expected, expectations, play
from tests.simulation.scenario import draw
from tests.simulation.tiny_model import Model

CHUNK = 25


def soak(folder: Path, first: int, seconds: float) -> bool:
    """Play seeds of the model in `folder`, from the first on, and tell of those that fail; whether all went well."""
    began, failed, played = time.monotonic(), 0, 0
    workers = os.cpu_count() or 1
    chunks = (range(start, start + CHUNK) for start in count(first, CHUNK))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while time.monotonic() - began < seconds:
            for stories in pool.map(_play_some, [folder] * workers, islice(chunks, workers)):
                played += CHUNK
                failed += len(stories)
                print(*stories, sep="\n\n", end="\n\n" if stories else "", flush=True)
    print(f"{played} seeds from {first} on in {time.monotonic() - began:.0f} s, {failed} failed")
    return not failed


def _play_some(folder: Path, seeds: range) -> list[str]:
    """The stories of those that fail."""
    return list(_failures(folder, seeds))


def _failures(folder: Path, seeds: range) -> Iterator[str]:
    model, expected = loaded(folder)
    for seed in seeds:
        outcome = play(model, draw(seed), expected)
        if outcome.complaints:
            yield str(outcome)


@cache
def loaded(folder: Path) -> tuple[Model, Expected]:
    """The model, and what its requests give."""
    model = Model(folder)
    return model, expectations(model)
