"""The generic names of our root packages (`gating`, `experts`, ...) must mean ours, not another distribution's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import sysconfig
from pathlib import Path

DISTRIBUTION = "moemesh"
ROOT_PACKAGES = ("mesh_config", "kernels", "transport", "gating", "experts", "attention")


class InstallError(RuntimeError):
    """Another distribution's package stands in the place of one of ours."""


def check_installation() -> None:
    """Raises InstallError when Python would import one of ROOT_PACKAGES from elsewhere than beside moemesh."""
    root = Path(__file__).resolve().parents[1]
    for name in ROOT_PACKAGES:
        found = _location(name)
        if found != root / name:
            raise InstallError(
                f"Python would not import moemesh's package {name!r}: expected {root / name}, found {found or 'none'}; "
                "remove the other one from sys.path, or install moemesh in an environment of its own"
            )
    if root in {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}:
        _check_owners()


def _location(name: str) -> Path | None:
    """The folder `import name` reads, without importing it."""
    loaded = sys.modules.get(name)
    spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.origin is None or not spec.has_location:  # a folder without __init__.py
        return next((Path(folder).resolve() for folder in spec.submodule_search_locations or ()), None)
    origin = Path(spec.origin).resolve()
    return origin.parent if origin.name == "__init__.py" else origin


def _check_owners() -> None:
    """In one site-packages two distributions overwrite each other's files: then only their lists of files tell."""
    owners = importlib.metadata.packages_distributions()
    for name in ROOT_PACKAGES:
        others = sorted(set(owners.get(name, ())) - {DISTRIBUTION})
        if others:
            raise InstallError(
                f"the package {name!r} is claimed by {', '.join(others)} as well as by moemesh: uninstall {others[0]} "
                "and reinstall moemesh, or install moemesh in an environment of its own"
            )
