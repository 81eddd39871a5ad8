"""What production code leaves to threads of its own, in virtual time: loading while the rank serves."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from moemesh.checkpoint import Checkpoint, CheckpointError, TensorInfo
from moemesh.take_over import TakeOver
from tests.simulation.virtual_time import VirtualTime

T = TypeVar("T")

LOAD_SECONDS = (0.02, 0.4)
"""What it takes to load a few experts, or other heads."""


class Loading:
    """The time that the loading threads of one process take. `wake` is called when something has been done."""

    def __init__(self, time: VirtualTime, rng: random.Random, wake: Callable[[], None]) -> None:
        self._time, self._rng, self._wake = time, rng, wake

    def later(self, action: Callable[[], object]) -> None:
        """Done by a thread."""

        def done() -> None:
            action()
            self._wake()

        self._time.after(self._rng.uniform(*LOAD_SECONDS), done)


class WeakCheckpoint(Checkpoint):
    """The production class over files that are open already, and that cannot be read while `unreadable` says so."""

    def __init__(self, checkpoint: Checkpoint, unreadable: Callable[[], bool]) -> None:
        self.__dict__.update(checkpoint.__dict__)
        self._unreadable = unreadable

    def _info(self, name: str) -> TensorInfo:
        if self._unreadable():
            raise CheckpointError((f"{name}: Input/output error",))
        return super()._info(name)


class VirtualExecutor(Executor):
    """Does one thing after the other, each of which takes its time."""

    def __init__(self, loading: Loading) -> None:
        self._loading = loading

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        self._loading.later(work)
        return future


class VirtualTakeOver(TakeOver):
    """The production class; what its thread would do happens in virtual time."""

    def __init__(self, loading: Loading, *arguments: Any, free_memory: Callable[[], int]) -> None:
        super().__init__(*arguments, prepare=lambda: None, wake=lambda: None, free_memory=free_memory)
        self._loading = loading

    def _start(self) -> None:
        """Called before something is ordered."""
        self._loading.later(self._load_what_is_ordered)

    def _load_what_is_ordered(self) -> None:
        while not self._orders.empty():
            batch = self._orders.get()
            assert batch is not None
            for outcome in self._outcomes_of(batch):
                self._outcomes.put(outcome)
