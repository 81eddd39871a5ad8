"""moemesh refuses to start with another distribution's package in the place of its own."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import gating
import moemesh
from moemesh import install_check
from moemesh.install_check import InstallError, check_installation
from moemesh.launcher import package_environment

PACKAGE_ROOT = Path(moemesh.__file__).resolve().parents[1]


def test_this_installation_is_fine() -> None:
    check_installation()


def test_a_foreign_package_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = type(sys)("gating")
    foreign.__spec__ = importlib.util.spec_from_file_location("gating", "/elsewhere/gating/__init__.py")
    monkeypatch.setitem(sys.modules, "gating", foreign)
    with pytest.raises(InstallError, match=r"package 'gating': expected .*gating, found /elsewhere/gating; remove"):
        check_installation()
    monkeypatch.setitem(sys.modules, "gating", gating)


@pytest.mark.parametrize("file", ["experts/__init__.py", "experts.py", "experts/module.py"])
def test_a_foreign_package_first_on_the_path(tmp_path: Path, file: str) -> None:
    foreign = tmp_path / file
    foreign.parent.mkdir(exist_ok=True)
    foreign.touch()
    # A folder without __init__.py counts only where no real package follows it: not an obstacle.
    harmless = file == "experts/module.py"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from moemesh.cli import main; sys.exit(main(['check']))"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=package_environment(),
        cwd=tmp_path,
    )
    assert ended.returncode == (0 if harmless else 1)
    assert ("Python would not import moemesh's package 'experts'" in ended.stderr) is not harmless
    assert "Traceback" not in ended.stderr


def test_two_distributions_in_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(PACKAGE_ROOT))
    owners = {name: ["moemesh"] for name in install_check.ROOT_PACKAGES}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    check_installation()
    owners["kernels"] = ["kernels", "moemesh"]
    with pytest.raises(InstallError, match="'kernels' is claimed by kernels as well as by moemesh: uninstall kernels"):
        check_installation()
