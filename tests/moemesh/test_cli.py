"""The command line: what it prints, on which stream, and with which exit code."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from moemesh import __version__
from moemesh.cli import main
from moemesh.flags import OptionsError
from moemesh.launcher import package_environment
from moemesh.port import listen
from tests.moemesh.processes_under_test import ROOT_CONSENT, mpirun


def command(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, sys.executable, "-P", "-m", "moemesh", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**package_environment(), **ROOT_CONSENT},
    )


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--version"], f"moemesh {__version__}"),
        (["--help"], "serve"),
        (["serve", "--help"], "--max-num-batched-tokens"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        shown = capsys.readouterr().out
        assert expected in shown
        assert "attached-frontend" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (try `moemesh --help`)"),
        (["dance"], "invalid choice: 'dance'"),
        (["serve", "--ranks", "many"], "--ranks: expected a whole number from 1 to 1024, got 'many'"),
        (["serve", "a", "b"], "unrecognized arguments: b"),
        (["generate"], "nothing to continue"),
        (["check", "--ranks", "2"], "unrecognized arguments: --ranks"),
    ],
)
def test_what_is_not_understood_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("moemesh: error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_a_folder_that_is_no_model_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().out
    assert main(["serve", "--port", "0", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("moemesh: error: ")
    assert str(tmp_path) in shown


def test_the_demo_model_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert "ok" in capsys.readouterr().out


def test_a_port_in_use_is_refused_by_name_before_the_model_is_looked_at() -> None:
    (taken,) = listen("127.0.0.1", 0)
    with closing(taken):
        port = taken.getsockname()[1]
        ended = command("serve", "/no/such/model", "--port", str(port))
    assert ended.returncode == 1
    assert ended.stderr == (
        f"moemesh: error: 127.0.0.1:{port} is in use by another process; stop it or choose another --port\n"
    )


def test_ranks_must_be_mpiruns() -> None:
    ended = command("serve", "--ranks", "3", launcher=tuple(mpirun(2)))
    assert ended.returncode == 2
    assert ended.stderr.count("moemesh: error: ") == 1
    assert "--ranks 3, but mpirun started 2 processes: leave --ranks away" in ended.stderr


def test_an_error_of_rank_0_is_said_once_under_mpirun() -> None:
    (taken,) = listen("127.0.0.1", 0)
    with closing(taken):
        ended = command("serve", "--port", str(taken.getsockname()[1]), launcher=tuple(mpirun(2)))
    assert ended.returncode != 0
    assert ended.stderr.count("is in use by another process") == 1
    assert "Traceback" not in ended.stderr


def test_a_fault_of_ours_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(given: list[str]) -> int:
        raise KeyError("ours")

    monkeypatch.setattr("moemesh.cli._run", fault)
    with pytest.raises(KeyError, match="ours"):
        main([])


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(given: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("moemesh.cli._run", interrupted)
    assert main([]) == 130


def test_options_errors_are_value_errors() -> None:
    assert issubclass(OptionsError, ValueError)
