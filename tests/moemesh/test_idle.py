"""How a rank with nothing to do waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moemesh.idle import LONG_BELL_NAP_SECONDS, LONG_NAP_AFTER, NAP_SECONDS, SPIN_SECONDS, IdleWait
from transport.doorbell import Doorbell


class Sleeps:
    """A control port that notes how long it was to sleep, and on what."""

    def __init__(self) -> None:
        self.slept: list[tuple[float, int | None]] = []

    def wait(self, timeout_s: float, also: int | None = None) -> bool:
        self.slept.append((timeout_s, also))
        return False


@pytest.fixture
def bell(tmp_path: Path) -> Iterator[Doorbell]:
    bell = Doorbell(tmp_path, 0, 2)
    yield bell
    bell.close()


def test_alone_it_sleeps_on_the_control_socket() -> None:
    control = Sleeps()
    IdleWait(control, bell=None, alone=True, crowded=False).wait(0.5, arriving=False)
    assert control.slept == [(0.5, None)]


def test_in_a_crowd_it_looks_once_more_and_sleeps_on_the_bell(bell: Doorbell) -> None:
    control = Sleeps()
    idle = IdleWait(control, bell=bell, alone=False, crowded=True)
    idle.wait(0.5, arriving=False)
    assert control.slept == []
    idle.wait(0.5, arriving=False)
    assert control.slept == [(NAP_SECONDS, bell.fileno())]


def test_it_does_not_sleep_while_a_frame_arrives(bell: Doorbell) -> None:
    control = Sleeps()
    idle = IdleWait(control, bell=bell, alone=False, crowded=True)
    for _ in range(3):
        idle.wait(0.5, arriving=True)
    assert control.slept == []


def test_a_frame_that_came_before_it_slept(bell: Doorbell) -> None:
    control = Sleeps()
    idle = IdleWait(control, bell=bell, alone=False, crowded=True)
    idle.wait(0.5, arriving=False)
    idle.worked()
    idle.wait(0.5, arriving=False)
    assert control.slept == []


def test_with_a_core_for_everybody_it_looks_again_first(bell: Doorbell) -> None:
    control = Sleeps()
    time = [0.0]
    idle = IdleWait(control, bell=bell, alone=False, crowded=False, clock=lambda: time[0])
    for _ in range(3):
        idle.wait(0.5, arriving=False)
    assert control.slept == []
    time[0] += SPIN_SECONDS
    for _ in range(2):
        idle.wait(0.5, arriving=False)
    assert control.slept == [(NAP_SECONDS, bell.fileno())]


def test_whom_a_bell_wakes_sleeps_longer_once_it_has_been_idle(bell: Doorbell) -> None:
    control = Sleeps()
    time = [0.0]
    idle = IdleWait(control, bell=bell, alone=False, crowded=True, clock=lambda: time[0])
    idle.wait(0.5, arriving=False)
    time[0] += 2 * LONG_NAP_AFTER
    idle.wait(0.5, arriving=False)
    assert control.slept == [(LONG_BELL_NAP_SECONDS, bell.fileno())]
