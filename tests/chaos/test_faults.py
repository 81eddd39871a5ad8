"""Faults do what they say: processes crawl, checkpoints break in one place, disks fill, links fall silent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from moemesh.options import DEMO_MODEL
from moemesh.shard_file import CheckpointError, read_shard_header
from tests.chaos import slowness
from tests.chaos.damage import SHARD, TENSOR, copy_of_demo, damage
from tests.chaos.faults import wait_until
from tests.end_to_end.harness import eventually

FACTOR = 20
BURST_SECONDS = 0.02  # of processor time


@pytest.fixture
def spinning() -> Iterator[psutil.Process]:
    """A process that computes all the time."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def seconds_for_a_burst(process: psutil.Process) -> float:
    """Time until the process has computed for so long."""
    begun, before = time.monotonic(), used(process)
    eventually(lambda: used(process) >= before + BURST_SECONDS, what="it gets on")
    return time.monotonic() - begun


def used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def test_a_slowed_process_crawls_and_then_runs(spinning: psutil.Process) -> None:
    home = Path(f"/proc/{spinning.pid}/cgroup").read_text()
    with slowness.slowed(spinning, FACTOR):
        assert seconds_for_a_burst(spinning) > BURST_SECONDS * FACTOR / 3
    assert Path(f"/proc/{spinning.pid}/cgroup").read_text() == home
    seconds_for_a_burst(spinning)


def test_a_process_stopped_and_continued_in_turn_crawls_too(spinning: psutil.Process) -> None:
    with slowness.duty_cycle(spinning, FACTOR):
        assert seconds_for_a_burst(spinning) > BURST_SECONDS * FACTOR / 3
    eventually(lambda: spinning.status() != psutil.STATUS_STOPPED, what="it goes on")
    seconds_for_a_burst(spinning)


def test_a_slowed_process_may_die(spinning: psutil.Process) -> None:
    with slowness.slowed(spinning, FACTOR) as means:
        spinning.kill()
    assert not any(Path(word).is_dir() for word in means.split() if word.startswith("/"))


def test_a_truncated_shard_is_found_by_name(tmp_path: Path) -> None:
    folder = copy_of_demo(tmp_path / "model")
    words = damage(folder, "truncated shard")
    with pytest.raises(CheckpointError) as caught:
        read_shard_header(folder / SHARD)
    assert all(word in str(caught.value) for word in words)


def test_a_flipped_byte_is_one_byte(tmp_path: Path) -> None:
    folder = copy_of_demo(tmp_path / "model")
    assert damage(folder, "flipped byte") == (TENSOR,)
    before, after = (DEMO_MODEL / SHARD).read_bytes(), (folder / SHARD).read_bytes()
    assert len(before) == len(after)
    [place] = [place for place in range(len(before)) if before[place] != after[place]]
    info = read_shard_header(folder / SHARD)[TENSOR]
    data = len(before) - max(tensor.end for tensor in read_shard_header(folder / SHARD).values())
    assert data + info.begin <= place < data + info.end


def test_a_missing_tensor_is_the_only_one(tmp_path: Path) -> None:
    folder = copy_of_demo(tmp_path / "model")
    damage(folder, "missing tensor")
    assert set(read_shard_header(DEMO_MODEL / SHARD)) - set(read_shard_header(folder / SHARD)) == {TENSOR}


def test_another_checkpoint_has_the_same_shapes(tmp_path: Path) -> None:
    folder = copy_of_demo(tmp_path / "model")
    damage(folder, "another checkpoint")
    shapes = [
        {name: info.shape for name, info in read_shard_header(one / SHARD).items()} for one in (DEMO_MODEL, folder)
    ]
    assert shapes[0] == shapes[1]
    assert (DEMO_MODEL / SHARD).read_bytes() != (folder / SHARD).read_bytes()


def test_whoever_has_the_file_open_keeps_it_when_it_is_unlinked(tmp_path: Path) -> None:
    folder = copy_of_demo(tmp_path / "model")
    with (folder / SHARD).open("rb") as file:
        assert damage(folder, "unlinked") == (SHARD,)
        assert len(file.read()) == os.path.getsize(DEMO_MODEL / SHARD)
    assert not (folder / SHARD).exists()


def test_waiting_for_a_moment_ends_early() -> None:
    assert wait_until(time.monotonic(), unless=lambda: False)
    assert not wait_until(time.monotonic() + 60, unless=lambda: True)
