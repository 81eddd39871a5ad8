"""`moemesh serve`: who starts whom.

With `--ranks N` the command itself is the frontend and starts the ranks. Under a user's own mpirun every process
becomes a rank, and rank 0 starts the frontend, which is `serve_attached`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from moemesh.launcher import RankLauncher, module_command
from moemesh.mpi_command import ENDS_WITH_A_RANK
from moemesh.mpi_launch import ATTACHED_FRONTEND, AttachedRanks, join_mesh, outlives_ranks
from moemesh.options import ServeOptions
from moemesh.port import check_port_free, listening
from moemesh.processes import ProcessIdentity
from moemesh.rank_place import RankPlace
from moemesh.run_directory import RunDirectory, RunDirectoryError
from moemesh.trace_file import save_trace

logger = logging.getLogger(__name__)

# When the frontend has ended it has told the ranks to stop; those still there get SIGTERM, and so long before SIGKILL.
_STOP_GRACE_SECONDS = 1.0


def serve(options: ServeOptions) -> int:
    """Be the frontend of a mesh that this process starts; the exit code.

    Refuses a port in use, a model or a mesh that cannot be served, before anything is started or loaded.
    """
    # Until the frontend listens to signals itself: leave by the `finally` below.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with listening(options.host, options.port) as sockets:
        from moemesh.mesh_plan import plan_mesh

        plan = plan_mesh(options)
        run = RunDirectory.create(num_ranks=options.ranks)
        ranks = RankLauncher(options, run)
        try:
            run.write_options(options)
            ranks.start()
            # Not at the top: a rank has no use for the gateway, and the ranks of this mesh need not wait for it.
            from moemesh.frontend import run_frontend

            return run_frontend(options, plan, run_directory=run, ranks=ranks, sockets=sockets)
        finally:
            ranks.stop(_STOP_GRACE_SECONDS)
            save_trace(run)
            run.remove()


def serve_as_rank(options: ServeOptions) -> None:
    """Be one of the `options.ranks` ranks of a user's mpirun. Never returns; raises LaunchError when it cannot."""
    run = join_mesh(options.ranks, lambda machines: _prepare_attached(options, machines))
    from moemesh.rank_process import run_rank

    run_rank(RankPlace.of_launch(run, os.environ))


def serve_attached(run_directory: str, starter: str) -> int:
    """Be the frontend of a mesh whose rank 0 (`starter`, a ProcessIdentity) started this process; the exit code."""
    from moemesh.frontend import run_frontend
    from moemesh.mesh_plan import plan_mesh

    run = RunDirectory.open(run_directory)
    ranks = AttachedRanks(run, starter=ProcessIdentity.parse(starter))
    try:
        options = run.read_options()
        if not isinstance(options, ServeOptions):
            raise RunDirectoryError(f"{run.path} belongs to `moemesh {options.command}`, not to `moemesh serve`")
        with listening(options.host, options.port) as sockets:
            plan = plan_mesh(options, run.contact.machines)
            return run_frontend(options, plan, run_directory=run, ranks=ranks, sockets=sockets)
    finally:
        ranks.stop(_STOP_GRACE_SECONDS)
        save_trace(run)
        run.remove()


def _prepare_attached(options: ServeOptions, machines: tuple[str, ...]) -> tuple[RunDirectory, Sequence[str]]:
    """In rank 0: refuse what cannot be served, then the run directory and the frontend's command."""
    from moemesh.mesh_plan import plan_mesh

    if not outlives_ranks(os.environ):
        logger.warning(ENDS_WITH_A_RANK)
    check_port_free(options.host, options.port)
    plan_mesh(options, machines)
    run = RunDirectory.create(num_ranks=options.ranks)
    run.write_options(options)
    return run, module_command("moemesh", ATTACHED_FRONTEND, str(run.path), str(ProcessIdentity.current()))
