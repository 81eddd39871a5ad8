"""Generators that wait: how a forward pass gives up control while frames travel.

A task yields a `Ready` and is resumed once that is ready. Nothing here blocks, and nothing here knows what is waited
for.
"""

from collections.abc import Generator, Sequence
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Ready(Protocol):
    """Something that a task may wait for."""

    def ready(self) -> bool:
        """Whether the wait is over; asking changes nothing."""
        ...


Steps = Generator[Ready, None, T]


class AnyOf:
    """Ready when one of several waits is."""

    def __init__(self, waits: Sequence[Ready]) -> None:
        self.waits = waits

    def ready(self) -> bool:
        return any(wait.ready() for wait in self.waits)


class Task(Generic[T]):
    """A generator in progress and what it waits for."""

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self._wait: Ready | None = None
        self._result: tuple[T] | None = None

    @property
    def done(self) -> bool:
        return self._result is not None

    @property
    def wait(self) -> Ready:
        """What an unfinished task waits for."""
        assert self._wait is not None, "the task has not begun, or has ended"
        return self._wait

    @property
    def result(self) -> T:
        """What the generator returned."""
        assert self._result is not None, "the task has not ended"
        return self._result[0]

    def advance(self) -> bool:
        """Run until the next wait, if the last one is over; whether anything ran."""
        if self.done or (self._wait is not None and not self._wait.ready()):
            return False
        try:
            self._wait = next(self._steps)
        except StopIteration as stop:
            self._wait = None
            self._result = (stop.value,)
        return True

    def abandon(self) -> None:
        """Nobody wants the result: let the generator clean up after itself."""
        self._steps.close()


def together(parts: Sequence[Steps[T]]) -> Steps[list[T]]:
    """Run several tasks side by side: while one waits the others advance. Returns their results in order."""
    if len(parts) == 1:
        return [(yield from parts[0])]
    tasks = [Task(steps) for steps in parts]
    try:
        while True:
            for task in tasks:
                task.advance()
            waiting = [task.wait for task in tasks if not task.done]
            if not waiting:
                return [task.result for task in tasks]
            yield AnyOf(waiting)
    finally:
        for task in tasks:
            task.abandon()
