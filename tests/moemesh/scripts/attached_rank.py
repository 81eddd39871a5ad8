"""What `mpirun ... moemesh serve` is in each process, with a frontend that only waits: `attached_rank.py NUM_RANKS`."""

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence

from moemesh.mpi_launch import AttachedRanks, join_mesh
from moemesh.processes import ProcessIdentity
from moemesh.run_directory import RunDirectory
from moemesh.watchdog import Watchdog


async def _wait(ranks: AttachedRanks) -> None:
    waiting = asyncio.ensure_future(ranks.wait())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, waiting.cancel)
    try:
        await waiting
    except asyncio.CancelledError:
        return


def frontend(path: str, starter: str) -> None:
    run = RunDirectory.open(path)
    ranks = AttachedRanks(run, starter=ProcessIdentity.parse(starter))
    print(json.dumps({"frontend": os.getpid(), "run": path}), flush=True)
    try:
        asyncio.run(_wait(ranks))
    finally:
        ranks.stop(1.0)
        run.remove()


def prepare(_: tuple[str, ...]) -> tuple[RunDirectory, Sequence[str]]:
    if sys.argv[2:] == ["refuse"]:
        raise ValueError("rank 0 refuses")
    run = RunDirectory.create(num_ranks=2)
    return run, [sys.executable, "-P", __file__, "frontend", str(run.path), str(ProcessIdentity.current())]


def main() -> None:
    started_by = os.getppid()
    run = join_mesh(int(sys.argv[1]), prepare)
    Watchdog(run, started_by=started_by).start()
    threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "frontend":
        frontend(*sys.argv[2:])
    else:
        main()
