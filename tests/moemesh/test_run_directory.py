"""The folder of a run is private, short enough for a socket, and goes away completely, whoever removes it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moemesh import run_directory
from moemesh.contact import Contact
from moemesh.options import EngineOptions, ServeOptions
from moemesh.processes import ProcessIdentity
from moemesh.run_directory import RunDirectory, RunDirectoryError, make_shared_memory_folder
from transport.control import new_curve_keys


@pytest.fixture
def run() -> Iterator[RunDirectory]:
    made = RunDirectory.create(num_ranks=2)
    yield made
    made.remove()


def ended_process() -> ProcessIdentity:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return ProcessIdentity(child.pid, 1)


def test_it_is_private_and_names_its_frontend(run: RunDirectory) -> None:
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert run.shared_memory.stat().st_mode & 0o777 == 0o700
    assert run.frontend == ProcessIdentity.current()
    assert RunDirectory.open(run.path) == run
    assert run.contact == Contact(endpoint=f"ipc://{run.path}/control")
    assert not run.is_remote
    assert run.port is None


def test_options_come_back_as_they_were(run: RunDirectory) -> None:
    options = ServeOptions(ranks=4, port=9000, api_key=("secret",))
    run.write_options(options)
    assert run.read_options() == options
    assert (run.path / "options.json").stat().st_mode & 0o777 == 0o600
    run.write_options(EngineOptions())
    assert run.read_options() == EngineOptions()


def test_a_host_without_the_frontend_has_a_folder_too() -> None:
    contact = Contact(endpoint="tcp://10.0.0.1:5555", keys=new_curve_keys().for_client(), machines=("a", "b"))
    made = RunDirectory.create_remote(contact, ServeOptions(ranks=2), num_ranks=1)
    run = RunDirectory.open(made.path)
    assert run.is_remote
    assert run.frontend is None
    assert run.contact == contact
    assert (run.path / "contact.json").stat().st_mode & 0o777 == 0o600
    assert run.read_options() == ServeOptions(ranks=2)
    run.remove()
    assert not run.is_remote


def test_processes_register(run: RunDirectory) -> None:
    assert run.processes() == []
    run.register(ProcessIdentity.current())
    run.register(ProcessIdentity(1, 2))
    assert run.processes() == [ProcessIdentity.current(), ProcessIdentity(1, 2)]


def test_removal_takes_the_companions_and_may_be_repeated(run: RunDirectory, tmp_path: Path) -> None:
    ours, foreign, living, ended = (tmp_path / name for name in ("moemesh-a", "precious", "ompi.1", "ompi.2"))
    for folder in (ours, foreign, living, ended):
        folder.mkdir()
        (folder / "file").write_text("x")
    run.add_companion(ours)
    run.add_companion(foreign)
    run.add_companion(living, unless_alive=ProcessIdentity.current())
    run.add_companion(ended, unless_alive=ended_process())
    segments = run.shared_memory
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(run.remove) for _ in range(8)]:
            done.result()
    assert not run.path.exists()
    assert not segments.exists()
    assert not ours.exists()
    assert not ended.exists()
    assert foreign.exists(), "not named as a folder of ours"
    assert living.exists(), "its owner lives and removes it"


def test_a_removed_run_is_recognised(run: RunDirectory) -> None:
    run.remove()
    with pytest.raises(RunDirectoryError, match="is not there: the mesh has ended"):
        RunDirectory.open(run.path)
    with pytest.raises(RunDirectoryError, match="names no frontend"):
        _ = run.frontend
    assert run.processes() == []


def test_a_folder_open_to_others_is_refused(run: RunDirectory) -> None:
    run.path.chmod(0o755)
    with pytest.raises(RunDirectoryError, match="is no run directory"):
        RunDirectory.open(run.path)
    run.path.chmod(0o700)


def test_a_path_too_long_for_a_socket_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    made = RunDirectory.create()
    assert len(os.fsencode(made.path / "control")) <= run_directory.MAX_SOCKET_PATH
    made.remove()


def test_a_small_shared_memory_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_directory, "SHARED_MEMORY_PER_RANK", 2**60)
    assert make_shared_memory_folder(2, fallback=tmp_path).parent == tmp_path


def test_an_identity_is_not_another_process_with_its_pid() -> None:
    own = ProcessIdentity.current()
    assert own.alive()
    assert ProcessIdentity.parse(str(own)) == own
    impostor = ProcessIdentity(own.pid, own.start_time - 1)
    assert not impostor.alive()
    assert not impostor.send(9), "this test process would be dead now"
    assert not ended_process().send(9)
