"""A rank that only waits: `rank.py RUN_DIRECTORY NUM_RANKS`."""

import os
import sys
import threading

from moemesh.run_directory import RunDirectory
from moemesh.watchdog import Watchdog


def main(run_directory: str, num_ranks: int) -> None:
    started_by = os.getppid()
    if num_ranks > 1:
        # As transport.init_mpi does, without loading torch.
        import mpi4py

        mpi4py.rc.finalize = False
        from mpi4py import MPI

        MPI.COMM_WORLD.Bcast(bytearray(4))
    print("hello from a rank", flush=True)
    Watchdog(RunDirectory.open(run_directory), started_by=started_by).start()
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
