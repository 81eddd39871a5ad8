"""`python -m moemesh.bench.exchange_rank`: one rank of `moemesh bench dispatch` over MPI."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from moemesh.bench.exchange import measure_between_processes
from moemesh.flags import counts
from moemesh.run_directory import RunDirectory
from moemesh.watchdog import Watchdog, end_failed
from transport.mpi_link import MpiLink
from transport.mpi_runtime import init_mpi

RESULT = "exchange.json"


def main(arguments: Sequence[str]) -> NoReturn:
    """Measure; rank 0 writes the times into the run directory. Never returns."""
    started_by = os.getppid()
    parser = argparse.ArgumentParser(description="one rank of `moemesh bench dispatch`")
    parser.add_argument("--run-directory", required=True)
    parser.add_argument("--sizes", type=counts, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    given = parser.parse_args(arguments)
    run = RunDirectory.open(given.run_directory)
    Watchdog(run, started_by=started_by).start()
    torch.set_num_threads(1)
    try:
        _measure(run.path / RESULT, given.sizes, given.repeats)
    except Exception as error:
        print(f"bench dispatch: {error}", file=sys.stderr, flush=True)
        end_failed()
    sys.stdout.flush()
    os._exit(0)


def _measure(result: Path, sizes: Sequence[int], repeats: int) -> None:
    world = init_mpi().COMM_WORLD
    link = MpiLink(world.Dup())
    times = measure_between_processes(link, "mpi", sizes, repeats)
    if world.rank == 0:
        result.write_text(json.dumps([dataclasses.asdict(time) for time in times]))
    # Nobody goes while another still waits for a frame, and only polling drives what is still being sent.
    all_done = world.Ibarrier()
    while not all_done.Test():
        link.poll()
        os.sched_yield()


if __name__ == "__main__":
    main(sys.argv[1:])
