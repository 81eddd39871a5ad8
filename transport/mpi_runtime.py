"""Starting MPI, leaving it, and finding out whether we were started by it."""

import ctypes
import os
import sys
from collections.abc import Mapping
from types import ModuleType

_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMIX_RANK", "PMIX_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


def detect_mpi_launch(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """(rank, size) when an MPI launcher started this process, else None. Does not load MPI.

    PMIx alone does not say the size in a variable, but mpirun's own variables do.
    """
    for rank_name, size_name in _LAUNCHERS:
        rank, size = environ.get(rank_name, ""), environ.get(size_name, "")
        if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
            return int(rank), int(size)
    return None


def say_goodbye() -> None:
    """Tell mpirun that this process is about to end in order; it is to call nothing of MPI any more.

    MPI_Finalize would say so too, but waits for the others. Without it mpirun complains of an orderly end. Where the
    library that knows how cannot be found, as in an Open MPI with a PMIx of its own, it goes on complaining.
    """
    if "mpi4py.MPI" not in sys.modules:
        return
    try:
        pmix = ctypes.CDLL("libpmix.so.2", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return
    pmix.PMIx_Finalize(None, ctypes.c_size_t(0))


def init_mpi() -> ModuleType:
    """Load and initialise MPI; returns `mpi4py.MPI`. Safe to call again.

    Never finalised: MPI_Finalize hangs once a rank is lost, so ranks end by `os._exit`. Thread level "multiple":
    helper threads accept newcomers while the engine thread polls.
    """
    import mpi4py

    mpi4py.rc.finalize = False
    mpi4py.rc.thread_level = "multiple"
    from mpi4py import MPI

    return MPI
