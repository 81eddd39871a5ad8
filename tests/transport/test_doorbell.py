"""Bells: who has lain down is woken by whoever rings, once."""

from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from transport.doorbell import Doorbell


@pytest.fixture
def bells(tmp_path: Path) -> Iterator[list[Doorbell]]:
    bells = [Doorbell(tmp_path, rank, 3) for rank in range(3)]
    yield bells
    for bell in bells:
        bell.close()


def rung(bell: Doorbell) -> bool:
    return bool(select.select([bell.fileno()], [], [], 0)[0])


def test_who_is_awake_is_not_disturbed(bells: list[Doorbell]) -> None:
    bells[1].ring(0)
    assert not rung(bells[0])


def test_who_lies_is_woken_and_no_one_else(bells: list[Doorbell]) -> None:
    for bell in bells:
        bell.lie_down()
    bells[1].ring(0)
    bells[2].ring(0)
    assert [rung(bell) for bell in bells] == [True, False, False]


def test_who_got_up_lies_in_silence_again(bells: list[Doorbell]) -> None:
    bells[0].lie_down()
    bells[1].ring(0)
    bells[0].get_up()
    assert not rung(bells[0])
    bells[0].lie_down()
    assert not rung(bells[0])
    bells[1].ring(0)
    assert rung(bells[0])


def test_ringing_where_nobody_lives(tmp_path: Path, bells: list[Doorbell]) -> None:
    bells[0].lie_down()
    (tmp_path / "bell.0").unlink()
    bells[1].ring(0)
