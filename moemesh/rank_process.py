"""`python -m moemesh.rank_process`: one rank, from its first line to its last.

Hello to the frontend, Start from it with the mesh it has planned, load, Ready, serve until Stop. A rank ends in order
with `os._exit(0)` and in any other case with SIGKILL: MPI sees the one and not the other.
"""

import argparse
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import torch

import kernels
from mesh_config import ConfigError, MeshConfig, load_model_config
from moemesh.checkpoint import Checkpoint, CheckpointError
from moemesh.mesh_plan import placement_of, threads_per_rank
from moemesh.model_loader import ModelLoader
from moemesh.mpi_launch import mpi_launch
from moemesh.options import EngineOptions
from moemesh.rank_build import build_rank
from moemesh.run_directory import RunDirectory
from moemesh.watchdog import Watchdog, end_failed
from transport import messages
from transport.control import ControlClient
from transport.links import Link
from transport.local_link import LocalNetwork
from transport.mpi_link import MpiLink
from transport.mpi_runtime import init_mpi

PROGRESS_SECONDS = 0.2
START_SECONDS = 60.0
GOODBYE_SECONDS = 1.0

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> NoReturn:
    """The rank's process; never returns."""
    parser = argparse.ArgumentParser(description="one rank of a mesh; started by `moemesh serve`")
    parser.add_argument("--run-directory", required=True)
    run_rank(RunDirectory.open(parser.parse_args(arguments).run_directory))


def run_rank(run: RunDirectory) -> NoReturn:
    """Be the rank that the launcher's environment says we are, in the mesh of `run`. Never returns."""
    started_by = os.getppid()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    Watchdog(run, started_by=started_by).start()
    launch = mpi_launch(os.environ)
    rank, num_ranks = launch or (0, 1)
    control = ControlClient(run.control_endpoint, rank)
    try:
        _serve(run.read_options(), rank, num_ranks, control)
    except (ConfigError, CheckpointError) as error:
        _fail(control, rank, str(error))
    except Exception as error:
        logger.exception("rank %d cannot go on", rank)
        _fail(control, rank, f"{type(error).__name__}: {error}")
    control.close()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _fail(control: ControlClient, rank: int, error: str) -> NoReturn:
    control.send(messages.Failed(rank=rank, error=error))
    control.close(linger_s=GOODBYE_SECONDS)
    end_failed()


def _serve(options: EngineOptions, rank: int, num_ranks: int, control: ControlClient) -> None:
    device, ranks_on_host = _claim_device(options, num_ranks)
    kernels.set_num_threads(threads_per_rank(options, ranks_on_host))
    if rank == 0:
        _say_what_is_slow(device)
    # Torch moves rows and adds them, no more: a second pool of threads would only spin against ours.
    torch.set_num_threads(1)
    control.send(
        messages.Hello(
            rank=rank,
            pid=os.getpid(),
            incarnation=0,
            host=socket.gethostname(),
            num_threads=kernels.num_threads(),
            isa=kernels.isa(),
        )
    )
    mesh = MeshConfig.from_dict(_await_start(control).config)
    if mesh.num_ranks != num_ranks:
        raise ConfigError(f"the frontend planned {mesh.num_ranks} ranks, {num_ranks} were started: start as many")
    link = _connect(rank, mesh)
    config = load_model_config(options.model_folder)
    placement = placement_of(config, mesh)
    model = ModelLoader(
        Checkpoint(options.model_folder, config),
        mesh=mesh,
        placement=placement,
        rank=rank,
        device=device,
        weight_dtype=_weight_dtype(options),
        report=_Reporter(control, rank).report,
    ).load()
    engine = build_rank(model, mesh, placement, link=link, control=control, device=device)
    control.send(messages.Ready(rank=rank, num_blocks=mesh.num_cache_blocks or 0))
    engine.run()


def _claim_device(options: EngineOptions, num_ranks: int) -> tuple[torch.device, int]:
    """The device this rank computes on, and how many ranks share the host."""
    local_size = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", num_ranks))
    local_rank = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))
    use_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    if not use_cuda:
        return torch.device("cpu"), local_size
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no CUDA device: use --device cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device, local_size


def _weight_dtype(options: EngineOptions) -> torch.dtype | None:
    """The format that 16- and 32-bit weights are held in; None keeps each tensor's own."""
    if options.dtype == "auto":
        return None
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def _say_what_is_slow(device: torch.device) -> None:
    if device.type == "cpu" and not kernels.native_available():
        logger.warning("serving slowly and not exactly (tokens may depend on the batch): %s", kernels.native_reason())
    if device.type == "cuda":
        logger.warning("on CUDA torch's own kernels are used: tokens may depend on the batch")


def _await_start(control: ControlClient) -> messages.Start:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        control.wait(1.0)
        for message in control.receive_all():
            if isinstance(message, messages.Start):
                return message
    raise ConfigError(f"the frontend did not answer for {START_SECONDS:.0f} s")


def _connect(rank: int, mesh: MeshConfig) -> Link:
    if mesh.num_ranks == 1:
        return LocalNetwork(1).links[0]
    world = init_mpi().COMM_WORLD
    if world.rank != rank or world.size != mesh.num_ranks:
        raise ConfigError(f"MPI says rank {world.rank} of {world.size}, the launcher {rank} of {mesh.num_ranks}")
    return MpiLink(world.Dup(), credit_window=mesh.credit_window)


class _Reporter:
    """Tells the frontend how loading goes, a few times a second."""

    def __init__(self, control: ControlClient, rank: int) -> None:
        self._control = control
        self._rank = rank
        self._next = 0.0

    def report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next or done == total:
            self._next = now + PROGRESS_SECONDS
            self._control.send(messages.Progress(rank=self._rank, stage="loading", done=done, total=total))


if __name__ == "__main__":
    main(sys.argv[1:])
