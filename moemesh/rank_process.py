"""`python -m moemesh.rank_process`: one rank, from its first line to its last.

Hello to the frontend, Start from it with the mesh it has planned, load, Ready, serve until Stop. A rank ends in order
with `os._exit(0)` and in any other case with SIGKILL: MPI sees the one and not the other.

`--newcomer`: one that a survivor spawned. What mpirun's variables say then tells of a job of one process.
"""

import argparse
import gc
import logging
import os
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from mesh_config import ConfigError
from moemesh.light_torch import put_off_unused
from moemesh.mpi_launch import prepare_newcomer
from moemesh.rank_place import RankPlace
from moemesh.run_directory import RunDirectory
from moemesh.shard_file import CheckpointError
from moemesh.watchdog import Watchdog, end_alone, end_failed
from transport import messages
from transport.control import ControlClient
from transport.mpi_runtime import say_goodbye

GOODBYE_SECONDS = 1.0

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> NoReturn:
    """The rank's process; never returns."""
    parser = argparse.ArgumentParser(description="one rank of a mesh; started by `moemesh serve`")
    parser.add_argument("--run-directory", required=True)
    parser.add_argument("--incarnation", type=int, default=0)
    parser.add_argument("--newcomer", type=int, nargs=7, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    run = RunDirectory.open(given.run_directory)
    if given.newcomer is None:
        run_rank(RankPlace.of_launch(run, os.environ, given.incarnation))
    prepare_newcomer(os.environ)
    run_rank(RankPlace.of_newcomer(run, given.newcomer))


def run_rank(place: RankPlace) -> NoReturn:
    """Be this life of a rank. Never returns."""
    started_by, run, rank = os.getppid(), place.run, place.rank
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    Watchdog(run, started_by=started_by).start()
    control = ControlClient(run.contact.endpoint, place.life, keys=run.contact.keys)
    control.send(messages.Started(pid=os.getpid(), host=socket.gethostname()))
    # Of what is imported and loaded from here on nothing is garbage: looking for it took a tenth of the time.
    gc.disable()
    put_off_unused()
    try:
        # Not at the top: torch takes a second, in which nobody would watch over this process.
        from moemesh.rank_startup import serve_rank

        serve_rank(place, control)
    except (ConfigError, CheckpointError) as error:
        _fail(run, control, rank, str(error))
    except Exception as error:
        logger.exception("rank %d cannot go on", rank)
        _fail(run, control, rank, f"{type(error).__name__}: {error}")
    control.close()
    if run.is_remote:
        run.remove()
    say_goodbye()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _fail(run: RunDirectory, control: ControlClient, rank: int, error: str) -> NoReturn:
    control.send(messages.Failed(rank=rank, error=error))
    control.close(linger_s=GOODBYE_SECONDS)
    if run.is_remote:
        end_alone(run, error)
    end_failed()


if __name__ == "__main__":
    main(sys.argv[1:])
