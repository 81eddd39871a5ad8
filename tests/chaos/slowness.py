"""A process that crawls: by a quota of the kernel's where we may set one, else stopped and continued in turn."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

MEASURE_SECONDS = 0.5
_QUOTA_US = 1_000  # the least that the kernel takes: the process crawls instead of pausing
_LONGEST_PERIOD_US = 1_000_000  # the most that it takes
_LEAST_CORES = 0.02
_CGROUPS = Path("/sys/fs/cgroup")


@contextmanager
def slowed(process: psutil.Process, factor: float) -> Iterator[str]:
    """The process gets 1/factor of the time that it took before, within the block; yields by which means."""
    cores = max(_LEAST_CORES, process.cpu_percent(MEASURE_SECONDS) / 100)
    group = _make_group(f"moemesh-chaos-{process.pid}", min(_LONGEST_PERIOD_US, round(_QUOTA_US * factor / cores)))
    if group is None:
        with duty_cycle(process, factor):
            yield "SIGSTOP and SIGCONT in turn"
        return
    home = _home_of(process.pid, group)
    try:
        _move(process.pid, group)
        yield f"it took {cores:.2f} cores, now a quota of {group}"
    finally:
        with suppress(OSError):  # it has ended
            _move(process.pid, home)
        _remove(group)


def _make_group(name: str, period_us: int) -> Path | None:
    """A new control group with the least quota in each period, version 2 or 1; None where we may not make one."""
    for base, settings in (
        (_CGROUPS, {"cpu.max": f"{_QUOTA_US} {period_us}"}),
        (_CGROUPS / "cpu", {"cpu.cfs_period_us": str(period_us), "cpu.cfs_quota_us": str(_QUOTA_US)}),
    ):
        group = base / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for setting, value in settings.items():
                with (group / setting).open("r+") as file:  # not "w": where no kernel made the file, it is not ours to
                    file.write(value)
            return group
        except OSError:
            group.rmdir()
    return None


def _home_of(pid: int, group: Path) -> Path:
    """The control group that a process is in now, in the hierarchy of `group`."""
    version_1 = group.parent.name == "cpu"
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(",") if version_1 else number == "0":
            return group.parent / path.lstrip("/")
    return group.parent


def _move(pid: int, group: Path) -> None:
    (group / "cgroup.procs").write_text(str(pid))


def _remove(group: Path) -> None:
    """A killed process stays in its group until it is reaped."""
    for _ in range(200):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError(f"{group} cannot be removed: {(group / 'cgroup.procs').read_text().split()} are in it")


@contextmanager
def duty_cycle(process: psutil.Process, factor: float) -> Iterator[None]:
    """The process runs 1/factor of the time within the block, and all of it afterwards."""
    over = threading.Event()
    run_s = 5 * _QUOTA_US * 1e-6

    def cycle() -> None:
        with suppress(ProcessLookupError):
            while not over.wait(run_s):
                os.kill(process.pid, signal.SIGSTOP)
                over.wait(run_s * (factor - 1))
                os.kill(process.pid, signal.SIGCONT)

    thread = threading.Thread(target=cycle, name="duty cycle")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
