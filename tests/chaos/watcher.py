"""What /mesh and /health say, asked all the time by a thread of its own."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from types import TracebackType
from typing import Any, Self

from tests.chaos.history import RankSeen, ViewSample

PERIOD_SECONDS = 0.1
PATIENCE_SECONDS = 2.0


class Watcher:
    """Samples of the view from `__enter__` to `__exit__`. A frontend that does not answer is a sample as well."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._samples: list[ViewSample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    @property
    def samples(self) -> list[ViewSample]:
        """Those so far."""
        return list(self._samples)

    def _run(self) -> None:
        while not self._over.wait(PERIOD_SECONDS):
            self._samples.append(take_sample(self._url))


def take_sample(url: str) -> ViewSample:
    """What the mesh says now; the moment is that of the answer."""
    mesh = _get(f"{url}/mesh")[1]
    health, body = _get(f"{url}/health")
    ranks: dict[int, RankSeen] = {}
    with contextlib.suppress(ValueError):
        ranks = ranks_of(json.loads(mesh))
    return ViewSample(moment=time.monotonic(), ranks=ranks, health=health, health_body=body)


def ranks_of(mesh: dict[str, Any]) -> dict[int, RankSeen]:
    """The ranks in the JSON of /mesh."""
    return {
        rank["rank"]: RankSeen(state=rank["state"], incarnation=rank["incarnation"], pid=rank["pid"])
        for rank in mesh["ranks"]
    }


def _get(url: str) -> tuple[int, str]:
    """Status and body; (0, "") when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")
    except OSError:
        return 0, ""
